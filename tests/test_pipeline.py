"""The public interface, with all stages in one process."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from engine_nets import (
    NETS,
    Batches,
    adamw,
    assert_same,
    classification,
    cnn,
    decay,
    documented_streams,
    mlp,
    model_state,
    momentum,
    reference_optimizer_state,
    sgd,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import train_reference
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import LBFGS, SGD
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.utils.data import DataLoader, TensorDataset

from stalewise import BP, DSP, ConfigError, Method, Pipeline, PlanError

CUTS = (2, 6)
MINIMAL = DSP.minimal(3)


def pipeline(net: str = "mlp", **options: Any) -> Pipeline:
    arguments: dict[str, Any] = {
        "method": MINIMAL,
        "loss_fn": cross_entropy,
        "optimizer": momentum,
        "partition": CUTS,
        "seed": 0,
    }
    arguments |= options
    return Pipeline(arguments.pop("model", None) or nn.Sequential(*NETS[net]()), **arguments)


def reference(
    batches: Batches, drains: tuple[int, ...] = (), staleness: tuple[int, ...] = (4, 2, 0), net: str = "mlp"
) -> tuple[list[float], dict[str, Tensor]]:
    layers = NETS[net]()
    result = train_reference(
        layers,
        CUTS,
        staleness,
        copy.deepcopy(batches),
        cross_entropy,
        momentum,
        drains=drains,
        pass_context=documented_streams(0),
    )
    return result.losses, model_state(layers)


def test_an_example_as_a_user_writes_it() -> None:
    """Against the reference, with everything on: Dropout, BatchNorm, layers in place, a schedule, clipping."""
    torch.manual_seed(3)
    batches = classification("cnn", 9, last_size=2)
    p = Pipeline(
        nn.Sequential(*cnn()),
        method=DSP.minimal(num_stages=3),
        loss_fn=nn.CrossEntropyLoss(),
        optimizer=lambda params: torch.optim.AdamW(params, lr=0.01),
        lr_scheduler=decay,
        partition=CUTS,
        seed=5,
        clip_grad_norm=0.5,
    )
    losses = [loss for _ in range(2) for loss in p.train(batches)]
    truth = cnn()
    expected = train_reference(
        truth,
        CUTS,
        (4, 2, 0),
        copy.deepcopy([*batches, *batches]),
        cross_entropy,
        adamw,
        decay,
        drains=(9,),
        clip_grad_norm=0.5,
        pass_context=documented_streams(5),
    )
    assert losses == expected.losses
    assert all(type(loss) is float for loss in losses)
    assert_same(p.state_dict(), model_state(truth))
    assert_same(p.optimizer_state_dict(), reference_optimizer_state(expected, truth, CUTS))
    assert p.learning_rate == expected.optimizers[0].param_groups[0]["lr"]


# --- train and drain ------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(0, 6), st.booleans()), min_size=1, max_size=4))
@settings(deadline=None, derandomize=True, max_examples=25)
def test_calls_of_train_with_and_without_drain_give_every_loss_once_in_order(calls: list[tuple[int, bool]]) -> None:
    batches = classification("mlp", sum(count for count, _ in calls))
    p = pipeline()
    losses: list[float] = []
    drains: list[int] = []
    done = 0
    for count, drain in calls:
        got = list(p.train(batches[done : done + count], drain=drain))
        losses += got
        done += count
        if drain:
            drains.append(done)
            assert len(losses) == done
            assert p.batches_in_flight == 0
        else:
            entered = done - max(drains, default=0)
            assert p.batches_in_flight == min(entered, 4)
            assert len(losses) == done - p.batches_in_flight
    losses += list(p.drain())
    assert list(p.drain()) == []
    expected, state = reference(batches, tuple(drains))
    assert losses == expected
    assert_same(p.state_dict(), state)


def test_batches_in_flight_is_true_in_the_body_of_the_loop() -> None:
    p = pipeline()
    assert [p.batches_in_flight for _ in p.train(classification("mlp", 6))] == [4, 4, 3, 2, 1, 0]


LEAVE = ["break", "close", "return", "raise"]


@pytest.mark.parametrize("how", LEAVE)
@pytest.mark.parametrize("drain", [True, False])
def test_leaving_the_loop_early_drains(how: str, drain: bool) -> None:
    """After 3 losses of minimal DSP 7 batches are in: all 7 are trained, the others are still in the iterator."""
    p = pipeline()
    batches = classification("mlp", 12)
    iterator = iter(batches)

    def leave() -> None:
        losses = p.train(iterator, drain=drain)
        for j, _ in enumerate(losses):
            if j < 2:
                continue
            match how:
                case "break":
                    break
                case "close":
                    losses.close()
                case "return":
                    return
                case "raise":
                    raise KeyError

    if how == "raise":
        with pytest.raises(KeyError):
            leave()
    else:
        leave()
    assert p.batches_in_flight == 0
    assert_same(p.state_dict(), reference(batches[:7])[1])
    rest = list(iterator)
    assert len(rest) == 5
    losses = list(p.train(rest))
    expected, state = reference(batches, (7,))
    assert losses == expected[7:]
    assert_same(p.state_dict(), state)


def test_leaving_the_loop_during_the_drain_finishes_it() -> None:
    p = pipeline()
    batches = classification("mlp", 6)
    for j, _ in enumerate(p.train(batches)):
        if j == 3:
            break
    assert_same(p.state_dict(), reference(batches)[1])


@pytest.mark.parametrize("make", [list, tuple, iter, lambda b: (x for x in b), lambda b: map(list, b), dict.fromkeys])
def test_batches_may_come_from_any_iterable(make: Callable[[Batches], Any]) -> None:
    batches = classification("mlp", 5)
    assert list(pipeline().train(make(batches))) == reference(batches)[0]


def test_batches_may_come_from_a_data_loader_epoch_after_epoch() -> None:
    whole = classification("mlp", 1, size=22)[0]
    loader = DataLoader(TensorDataset(*whole), batch_size=4, shuffle=True)
    p = pipeline()
    torch.manual_seed(8)
    losses = [loss for _ in range(2) for loss in p.train(loader, drain=False)]
    losses += list(p.drain())
    torch.manual_seed(8)
    batches = [tuple(batch) for _ in range(2) for batch in loader]
    assert [len(h) for h, _ in batches] == [4, 4, 4, 4, 4, 2] * 2
    assert losses == reference(batches)[0]


@pytest.mark.parametrize("partition", [CUTS, "profile"])
def test_no_batches_at_all(partition: Any) -> None:
    p = pipeline(partition=partition)
    assert list(p.train([])) == []
    assert list(p.train(iter([]), drain=False)) == []
    assert list(p.drain()) == []
    assert p.batches_in_flight == 0
    with pytest.raises(ConfigError, match=r"evaluate got no batch; a mean needs at least one sample\. Is the iterable"):
        p.evaluate([], cross_entropy)
    batches = classification("mlp", 3)
    if partition == CUTS:
        assert list(p.train(batches)) == reference(batches)[0]


def test_an_empty_train_with_drain_drains() -> None:
    p = pipeline()
    batches = classification("mlp", 3)
    assert list(p.train(batches, drain=False)) == []
    assert list(p.train([])) == reference(batches)[0]


def test_a_call_that_is_not_iterated_does_nothing() -> None:
    p = pipeline()
    before = p.state_dict()
    p.train(classification("mlp", 3))
    unused = p.train(classification("mlp", 3))
    assert_same(p.state_dict(), before)
    losses = list(p.train(classification("mlp", 2)))
    assert losses == reference(classification("mlp", 2))[0]
    unused.close()
    assert p.batches_in_flight == 0


# --- one thing at a time --------------------------------------------------------------------------------------


def test_nothing_else_may_run_while_training() -> None:
    p = pipeline()
    batches = classification("mlp", 6)
    losses = []
    for loss in p.train(batches):
        losses.append(loss)
        for call in (
            lambda: list(p.train(batches)),
            lambda: list(p.drain()),
            lambda: p.evaluate(batches, cross_entropy),
        ):
            with pytest.raises(
                ConfigError, match=r"is training already; finish or leave the loop over train\(\) before"
            ):
                call()
    assert losses == reference(batches)[0]


def test_a_generator_that_waits_counts_as_training() -> None:
    p = pipeline()
    first = p.train(classification("mlp", 6))
    next(first)
    with pytest.raises(ConfigError, match="is training already"):
        next(p.train(classification("mlp", 6)))
    first.close()
    assert len(list(p.train(classification("mlp", 1)))) == 1


def test_state_may_be_read_while_training() -> None:
    p = pipeline()
    for number, _ in enumerate(p.train(classification("mlp", 6), drain=True)):
        assert p.statuses()[0]["updates"] == number + 1
        assert len(p.state_dict()) == len(nn.Sequential(*mlp()).state_dict())


def test_a_pipeline_that_failed_within_a_step_says_so() -> None:
    calls = 0

    def loss_fn(output: Tensor, target: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise KeyError("mine")
        return cross_entropy(output, target)

    p = pipeline(loss_fn=loss_fn)
    losses: list[float] = []
    with pytest.raises(KeyError, match="mine"):
        losses.extend(p.train(classification("mlp", 6)))
    for call in (
        lambda: list(p.train(classification("mlp", 6))),
        lambda: list(p.drain()),
        lambda: p.evaluate(classification("mlp", 1), cross_entropy),
    ):
        with pytest.raises(
            ConfigError, match=r"this pipeline failed within a step.* Build a new one and load the weights"
        ):
            call()
    assert p.state_dict()


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (
            torch.ones(4, 5),
            r"a batch is a Tensor; it must be a pair \(input, target\)\. Pack several inputs into a tuple",
        ),
        ((torch.ones(4, 5),), r"a batch is a tuple of 1; it must be a pair"),
        ([torch.ones(4, 5)] * 3, r"a batch is a list of 3; it must be a pair"),
        (3, r"a batch is a int; it must be a pair"),
        ((None, torch.ones(4)), r"a batch has no tensor in its input; give at least one\."),
    ],
)
def test_a_batch_that_is_no_pair_is_refused_and_the_pipeline_goes_on(batch: Any, message: str) -> None:
    p = pipeline()
    batches = classification("mlp", 5)
    losses: list[float] = []
    with pytest.raises(ConfigError, match=message):
        losses.extend(p.train([*batches[:2], batch]))
    assert p.batches_in_flight == 2
    losses += list(p.train(batches[2:]))
    assert losses == reference(batches)[0]


@pytest.mark.parametrize("partition", [CUTS, "profile"])
@pytest.mark.parametrize(
    ("batch", "part"),
    [
        ((torch.ones(4, 5), 3), "target"),
        ((torch.ones(4, 5), ["cat"]), "target"),
        (({"x": "text"}, torch.ones(4)), "input"),
    ],
)
def test_a_batch_with_something_else_than_tensors_is_told_where(partition: Any, batch: Any, part: str) -> None:
    with pytest.raises(ConfigError) as caught:
        list(pipeline(partition=partition).train([batch]))
    assert part in str(caught.value)
    assert "model is cut" not in str(caught.value)


@pytest.mark.parametrize("partition", [CUTS, "profile"])
@pytest.mark.parametrize("batches", [None, 5, 1.5])
def test_what_is_not_iterable_is_refused(partition: Any, batches: Any) -> None:
    for call in (lambda p: list(p.train(batches)), lambda p: p.evaluate(batches, cross_entropy)):
        with pytest.raises(ConfigError, match=rf"batches is a {type(batches).__name__}; it must be an iterable of"):
            call(pipeline(partition=partition))


@pytest.mark.parametrize(
    ("loss_fn", "message"),
    [
        (lambda z, y: (z - 1) ** 2, r"loss_fn returned a tensor of shape \(4, 3\); it must return the batch's loss"),
        (lambda z, y: 0.5, r"loss_fn returned float"),
        (
            lambda z, y: cross_entropy(z, y).detach(),
            r"does not require grad; nothing could be trained\. Compute the loss",
        ),
    ],
)
def test_a_loss_that_cannot_be_trained_is_refused(loss_fn: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        list(pipeline(loss_fn=loss_fn).train(classification("mlp", 2)))


# --- what a method asks of its stages -------------------------------------------------------------------------


@pytest.mark.parametrize("method", [BP(3, accumulate=3), DSP(staleness=(0, 0, 0), accumulate=3)], ids=repr)
def test_accumulation_is_the_plain_loop_with_the_mean_of_a_groups_gradients(method: Method) -> None:
    """Groups of 3 by global index, over a pause; a drain flushes the remainder of a group."""
    batches = classification("mlp", 11)
    model = nn.Sequential(*mlp(dropout=0.0))
    p = pipeline(model=model, method=method, lr_scheduler=decay)
    losses = list(p.train(batches[:4], drain=False))
    losses += list(p.train(batches[4:8]))  # 8 = 2 * 3 + 2: drained within a group
    losses += list(p.train(batches[8:]))  # batch 8 ends the group of 6 and 7, which was flushed
    truth = nn.Sequential(*mlp(dropout=0.0))
    optimizer = momentum(truth.parameters())
    scheduler = decay(optimizer)
    expected = []
    for group in ((0, 1, 2), (3, 4, 5), (6, 7), (8,), (9, 10)):
        optimizer.zero_grad()
        for index in group:
            loss = cross_entropy(truth(batches[index][0]), batches[index][1])
            loss.backward()
            expected.append(loss.item())
        for parameter in truth.parameters():
            parameter.grad /= len(group)
        optimizer.step()
        scheduler.step()
    assert losses == expected
    assert_same(p.state_dict(), dict(truth.state_dict()))
    assert [status["updates"] for status in p.statuses()] == [5, 5, 5]


@pytest.mark.parametrize("weights", ["stashed", "current"])
def test_stored_graphs_at_rest_are_recomputed_ones(weights: Any) -> None:
    """At learning rate 0 all weights are one, so whether a graph was kept or rebuilt changes no gradient."""

    def trained(method: Method) -> list[Tensor]:
        model = nn.Sequential(*cnn())
        seen: list[Tensor] = []

        def make_optimizer(params: Any) -> torch.optim.Optimizer:
            optimizer = SGD(params, lr=0.0)
            optimizer.register_step_pre_hook(lambda *_: seen.extend(q.grad.clone() for q in params))
            return optimizer

        p = pipeline(model=model, method=method, optimizer=make_optimizer)
        list(p.train(classification("cnn", 6)))
        seen.extend(p.state_dict().values())
        return seen

    stored = trained(DSP(staleness=(3, 1, 0), activations="stored", weights=weights))
    assert_same(stored, trained(DSP(staleness=(3, 1, 0))))


# --- evaluate -------------------------------------------------------------------------------------------------


def accuracy(output: Tensor, target: Tensor) -> Tensor:
    return (output.argmax(1) == target).float().mean()


def test_evaluate_is_the_mean_over_samples_in_eval_mode() -> None:
    trained = nn.Sequential(*cnn())
    p = pipeline(model=trained)
    list(p.train(classification("cnn", 4)))
    state = p.state_dict()
    batches = classification("cnn", 6, last_size=1)
    model = nn.Sequential(*cnn())
    model.load_state_dict(state)
    model.eval()
    with torch.no_grad():
        hits = sum(int((model(h).argmax(1) == y).sum()) for h, y in batches)
    assert p.evaluate(batches, accuracy) == pytest.approx(hits / 21, abs=1e-7)
    assert p.evaluate(iter(batches), accuracy) == p.evaluate(batches, accuracy)
    assert_same(p.state_dict(), state)
    assert p.batches_in_flight == 0
    assert all(module.training for layer in trained for module in layer.modules())


def test_evaluations_change_no_number_of_the_training() -> None:
    batches = classification("cnn", 8)
    p = pipeline("cnn")
    losses = []
    for start in (0, 4):
        p.evaluate(batches[:2], cross_entropy)
        losses += list(p.train(batches[start : start + 4]))
    expected, state = reference(batches, (4,), net="cnn")
    assert losses == expected
    assert_same(p.state_dict(), state)


def test_evaluate_wants_a_drained_pipeline() -> None:
    p = pipeline()
    list(p.train(classification("mlp", 3), drain=False))
    with pytest.raises(
        ConfigError,
        match=r"^3 batches are in flight; .* Call drain\(\) and take its losses first, or train\(\.\.\., drain=True\)",
    ):
        p.evaluate(classification("mlp", 1), cross_entropy)
    list(p.drain())
    assert p.evaluate(classification("mlp", 1), cross_entropy) > 0


@pytest.mark.parametrize("metric", [None, 3, "accuracy"])
def test_a_metric_is_a_function(metric: Any) -> None:
    with pytest.raises(ConfigError, match="metric"):
        pipeline().evaluate(classification("mlp", 1), metric)


def test_a_metric_that_fails_leaves_a_pipeline_that_trains() -> None:
    p = pipeline()

    def metric(output: Tensor, target: Tensor) -> float:
        raise KeyError

    with pytest.raises(KeyError):
        p.evaluate(classification("mlp", 2), metric)
    assert list(p.train(classification("mlp", 5))) == reference(classification("mlp", 5))[0]


# --- the seed -------------------------------------------------------------------------------------------------


def test_the_seed_makes_a_run_repeatable_and_is_the_callers_where_none_is_given() -> None:
    def losses(seed: int | None) -> list[float]:
        p = pipeline(seed=seed)
        torch.rand(3)
        return list(p.train(classification("mlp", 5)))

    torch.manual_seed(77)
    model = nn.Sequential(*mlp())
    torch.manual_seed(77)
    of_none = list(pipeline(model=model, seed=None).train(classification("mlp", 5)))
    assert of_none == losses(77)
    assert losses(1) == losses(1)
    assert losses(1) != losses(2)


def test_the_callers_random_state_is_untouched() -> None:
    for partition in (CUTS, "profile"):
        p = pipeline("cnn", partition=partition)
        torch.manual_seed(1)
        before = torch.get_rng_state()
        for _ in p.train(classification_without_drawing("cnn", 5)):
            assert torch.equal(torch.get_rng_state(), before)
        p.evaluate(classification_without_drawing("cnn", 2), accuracy)
        assert torch.equal(torch.get_rng_state(), before)


def classification_without_drawing(net: str, count: int) -> Batches:
    with torch.random.fork_rng(devices=()):
        return classification(net, count)


# --- the partition --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first_call", ["train", "evaluate"])
def test_a_profiled_run_is_the_run_with_the_cuts_that_it_found(
    first_call: str, capsys: pytest.CaptureFixture[str]
) -> None:
    batches = classification("cnn", 9)
    p = pipeline("cnn", partition="profile")
    assert (p.cuts, p.partition, p.traces(), p.statuses(), p.learning_rate) == (None, None, [], [], None)
    assert p.batches_in_flight == 0
    if first_call == "evaluate":
        score = p.evaluate(iter(batches), cross_entropy)
        losses = list(p.train(batches))
    else:
        losses = list(p.train(iter(batches)))
    assert p.cuts is not None
    assert p.partition is not None
    assert p.partition.cuts == p.cuts
    assert capsys.readouterr().out == p.partition.table() + "\n"
    fixed = pipeline("cnn", partition=p.cuts)
    if first_call == "evaluate":
        assert score == fixed.evaluate(batches, cross_entropy)
    assert losses == list(fixed.train(batches))
    assert_same(p.state_dict(), fixed.state_dict())
    assert_same(p.optimizer_state_dict(), fixed.optimizer_state_dict())
    assert capsys.readouterr().out == ""


def test_the_profile_knows_which_stages_recompute() -> None:
    for method, recompute in (
        (MINIMAL, (True, True, False)),
        (BP(3), (False,) * 3),
        (DSP(staleness=(1, 0)), (True, False)),
    ):
        p = pipeline(method=method, partition="profile")
        list(p.train(classification("mlp", 1)))
        assert p.partition is not None
        assert p.partition.recompute == recompute
        assert p.partition.predicted_step_s is not None


def test_fixed_cuts_are_known_at_once_and_nothing_is_measured() -> None:
    p = pipeline()
    assert p.cuts == CUTS
    assert p.partition is not None
    assert p.partition.predicted_step_s is None
    assert [cost.name for cost in p.partition.layers] == [str(index) for index in range(8)]
    assert [cost.type for cost in p.partition.layers] == [type(layer).__name__ for layer in mlp()]
    assert [cost.parameters for cost in p.partition.layers] == [48, 0, 64, 0, 0, 16, 54, 21]


@pytest.mark.parametrize("partition", [(3,), "profile"])
def test_a_factory_is_called_once_and_trains_like_its_module(partition: Any) -> None:
    calls: list[str] = []

    def factory(name: str, make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
        def build() -> nn.Module:
            calls.append(name)
            return make()

        return build

    makes = [
        lambda: nn.Linear(5, 8),
        lambda: nn.BatchNorm1d(8),
        lambda: nn.ReLU(inplace=True),
        lambda: nn.Dropout(0.2),
        lambda: nn.Linear(8, 3),
    ]
    batches = classification("mlp", 6)
    torch.manual_seed(4)
    p = pipeline(
        model=[factory("abcde"[i], make) for i, make in enumerate(makes)], method=DSP.minimal(2), partition=partition
    )
    losses = list(p.train(batches))
    p.evaluate(batches, cross_entropy)
    assert sorted(calls) == list("abcde")
    torch.manual_seed(4)
    fixed = pipeline(model=[make() for make in makes], method=DSP.minimal(2), partition=p.cuts)
    assert losses == list(fixed.train(batches))
    assert_same(p.state_dict(), fixed.state_dict())


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("state_dict", ()),
        ("load_state_dict", ({},)),
        ("optimizer_state_dict", ()),
        ("load_optimizer_state_dict", ({},)),
    ],
)
def test_state_is_there_once_the_cuts_are_known(name: str, arguments: tuple[Any, ...]) -> None:
    p = pipeline(partition="profile")
    with pytest.raises(
        ConfigError, match=rf"^{name} was called before the cuts are known: .* Call train or evaluate first"
    ):
        getattr(p, name)(*arguments)


# --- state ----------------------------------------------------------------------------------------------------


def test_a_module_used_twice_is_used_twice() -> None:
    """The common `nn.Sequential(.., act, .., act)`: bitwise the plain loop over that very model."""

    def model() -> nn.Sequential:
        torch.manual_seed(0)
        act = nn.Tanh()
        return nn.Sequential(nn.Linear(5, 5), act, nn.Linear(5, 5), act, nn.Linear(5, 3))

    p = pipeline(model=model(), method=BP(2), partition=(3,), optimizer=sgd)
    truth = model()
    optimizer = sgd(truth.parameters())
    for (h, y), loss in zip(batches := classification("mlp", 3), p.train(batches), strict=True):
        expected = cross_entropy(truth(h), y)
        optimizer.zero_grad()
        expected.backward()
        optimizer.step()
        assert loss == expected.item()


def test_state_goes_from_pipeline_to_model_to_pipeline() -> None:
    p = pipeline("cnn")
    list(p.train(classification("cnn", 4)))
    model = nn.Sequential(*cnn())
    assert list(p.state_dict()) == list(model.state_dict())
    model.load_state_dict(p.state_dict())
    assert_same(dict(model.state_dict()), p.state_dict())
    other = pipeline("cnn", partition=(3,), method=DSP(staleness=(1, 0)))
    other.load_state_dict(model.state_dict())
    assert_same(other.state_dict(), p.state_dict())


def test_a_run_goes_on_from_its_state_and_with_other_cuts() -> None:
    batches = classification("mlp", 10)

    def plain() -> nn.Sequential:
        return nn.Sequential(*mlp(dropout=0.0))

    whole = pipeline(model=plain(), optimizer=adamw)
    losses = list(whole.train(batches[:5])) + list(whole.train(batches[5:]))
    first = pipeline(model=plain(), optimizer=adamw)
    halves = list(first.train(batches[:5]))
    second = pipeline(model=nn.Sequential(*mlp(dropout=0.0)), optimizer=adamw)
    second.load_state_dict(first.state_dict())
    second.load_optimizer_state_dict(first.optimizer_state_dict())
    halves += list(second.train(batches[5:]))
    assert halves == losses
    assert_same(second.optimizer_state_dict(), whole.optimizer_state_dict())
    recut = pipeline(model=plain(), optimizer=adamw, partition=(4,), method=DSP(staleness=(2, 0)))
    recut.load_state_dict(first.state_dict())
    recut.load_optimizer_state_dict(first.optimizer_state_dict())
    assert_same(recut.optimizer_state_dict()["state"], first.optimizer_state_dict()["state"])
    assert len(list(recut.train(batches[5:]))) == 5


def test_states_of_another_model_are_refused() -> None:
    p = pipeline()
    with pytest.raises(ConfigError, match=r"the state has no value for '0\.weight' and 1 more of stage 0"):
        p.load_state_dict({})
    with pytest.raises(ConfigError, match=r"'0\.weight' is of shape \(8, 5\) in the model and"):
        p.load_state_dict(nn.Sequential(nn.Linear(2, 2), *mlp()[1:]).state_dict())
    with pytest.raises(ConfigError, match=r"the optimizer state has no group with '0\.weight' of stage 0"):
        p.load_optimizer_state_dict(momentum(nn.Sequential(*mlp()).parameters()).state_dict())
    with pytest.raises(ConfigError, match="optimizer"):
        p.load_optimizer_state_dict({})


# --- arguments ------------------------------------------------------------------------------------------------


class Residual(nn.Sequential):
    def forward(self, h: Tensor) -> Tensor:
        return h + super().forward(h)


def tied() -> nn.Sequential:
    model = nn.Sequential(*mlp())
    model[7] = nn.Linear(6, 8, bias=False)
    model[7].weight = nn.Parameter(torch.zeros(8, 6))
    model.append(nn.Linear(8, 8, bias=False))
    model[8].weight = model[2].weight
    return model


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "model": ({"model": nn.Linear(5, 3)}, "model is a Linear; it must be an nn.Sequential or a list of modules"),
    "residual": ({"model": Residual(*mlp())}, "Residual"),
    "empty": ({"model": [], "partition": ()}, "the model has no layers; give at least one"),
    "layer": ({"model": [nn.Linear(5, 3), 7, nn.Tanh()]}, "layer 1 of the model is a int; each must be a module or"),
    "lazy": ({"model": [nn.LazyLinear(8), *mlp()[1:]]}, "Run the model once"),
    "tied": ({"model": tied()}, "'2.weight' (stage 1) and '8.weight' (stage 2) are the same tensor"),
    "method": ({"method": "dsp"}, "method is 'dsp'; it must be a method such as stalewise.DSP.minimal(num_stages=3)"),
    "method class": ({"method": DSP}, "it must be a method such as stalewise.DSP.minimal(num_stages=3)"),
    "loss_fn": ({"loss_fn": None}, "loss_fn is None; it must be a function"),
    "optimizer": ({"optimizer": "sgd"}, "optimizer is 'sgd'; it must be a function"),
    "built optimizer": (
        {"optimizer": SGD(nn.Linear(2, 2).parameters(), lr=0.1)},
        "optimizer is an optimizer already; each stage builds its own. Give a function, such as",
    ),
    "optimizer of another": (
        {"optimizer": lambda params: SGD(nn.Linear(2, 2).parameters(), lr=0.1)},
        "optimizer",
    ),
    "optimizer result": ({"optimizer": lambda params: 3}, "optimizer returned a int; it must return a torch optimizer"),
    "optimizer with a closure": ({"optimizer": LBFGS}, "optimizer"),
    "lr_scheduler": ({"lr_scheduler": 0.1}, "lr_scheduler is 0.1; it must be a function optimizer -> scheduler"),
    "lr_scheduler result": (
        {"lr_scheduler": lambda o: 3},
        "lr_scheduler returned a int; it must return a torch scheduler",
    ),
    "lr_scheduler of a metric": ({"lr_scheduler": ReduceLROnPlateau}, "lr_scheduler"),
    "partition": ({"partition": "even"}, "partition is 'even'; it must be \"profile\" or cut indices, such as (2, 4)"),
    "no partition": ({"partition": None}, "it must name the first layer of each stage but stage 0, such as (2, 5)"),
    "few cuts": ({"partition": (3,)}, "cuts (3,) make 2 stages of 8 layers; 3 stages need 2 of them, such as (2, 5)"),
    "far cut": ({"partition": (3, 8)}, "cuts[1] is 8; with 8 layers a cut lies between 1 and 7"),
    "order": ({"partition": (5, 2)}, "they must grow strictly, so that no stage is empty. Did you mean (2, 5)?"),
    "fractional cut": ({"partition": (2.0, 5)}, "cuts[0] is 2.0; a cut is the index of a stage's first layer"),
    "too many stages": ({"method": DSP.minimal(9), "partition": "profile"}, "8 layers cannot fill 9 stages"),
    "engine": ({"engine": "fast"}, 'engine is \'fast\'; it must be "auto", "sequential" or "distributed"'),
    "alone": ({"engine": "distributed"}, "needs one process per stage, and this process is alone. Start it with"),
    "device": ({"device": "abacus"}, "device 'abacus' cannot be used"),
    "no device": ({"device": None}, "device None cannot be used"),
    "seed": ({"seed": "lucky"}, "seed is 'lucky'"),
    "fractional seed": ({"seed": 0.5}, "seed is 0.5"),
    "clip_grad_norm": ({"clip_grad_norm": 0}, "clip_grad_norm is 0; it must be a number above 0"),
    "clip_grad_norm text": ({"clip_grad_norm": "1"}, "clip_grad_norm is '1'; it must be a number above 0"),
    "clip_grad_norm bool": ({"clip_grad_norm": True}, "clip_grad_norm is True; it must be a number above 0"),
    "clip_grad_norm nan": ({"clip_grad_norm": float("nan")}, "clip_grad_norm is nan; it must be a number above 0"),
    "recv_timeout_s": ({"recv_timeout_s": -1.0}, "recv_timeout_s is -1.0; it must be a number above 0, or None"),
    "no start_timeout_s": ({"start_timeout_s": None}, "start_timeout_s is None; it must be a number above 0."),
    "param_groups": ({"param_groups": [{"lr": 0.1}]}, "param_groups is [{'lr': 0.1}]; it must be a function"),
    "param_groups result": ({"param_groups": lambda name, p: 0.1}, "param_groups returned"),
}


@pytest.mark.parametrize(("options", "message"), WRONG.values(), ids=WRONG)
def test_a_wrong_argument_is_refused_at_once(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Pipeline(
            options.get("model", nn.Sequential(*mlp())),
            **{
                "method": MINIMAL,
                "loss_fn": cross_entropy,
                "optimizer": momentum,
                "partition": CUTS,
                **{name: value for name, value in options.items() if name != "model"},
            },
        )
    assert message in str(caught.value)


def test_what_concerns_the_cut_is_a_plan_error() -> None:
    for options in ({"partition": (3,)}, {"model": tied()}, {"method": DSP.minimal(9), "partition": "profile"}):
        with pytest.raises(PlanError):
            pipeline(**options)


def test_one_stage_is_a_pipeline_too() -> None:
    batches = classification("mlp", 4)
    p = pipeline(method=DSP.minimal(1), partition=())
    layers = mlp()
    expected = train_reference(layers, (), (0,), batches, cross_entropy, momentum, pass_context=documented_streams(0))
    assert list(p.train(batches)) == expected.losses
    assert_same(p.state_dict(), model_state(layers))


def test_attributes() -> None:
    method: Method = DSP(staleness=(2, 1, 0))
    p = pipeline(method=method, lr_scheduler=decay, device="cpu", engine="sequential")
    assert p.method is method
    assert p.rank == 0
    assert p.learning_rate == 0.05
    list(p.train(classification("mlp", 3)))
    assert p.learning_rate == 0.05 * 0.8**3
    assert [trace.stage for trace in p.traces()] == [0, 1, 2]
    assert [status["updates"] for status in p.statuses()] == [3, 3, 3]
