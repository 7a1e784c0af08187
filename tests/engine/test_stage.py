"""A stage alone: what is trained, by whom, and the errors of what the user gives it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from engine_nets import (
    CPU,
    adamw,
    assert_same,
    build_engine,
    classification,
    cnn,
    decay,
    mlp,
    model_state,
    momentum,
    reference_optimizer_state,
    sgd,
    train,
)
from reference import train_reference
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import SGD, Optimizer

from stalewise.engine.assemble import assemble_stage
from stalewise.engine.messages import Activation
from stalewise.errors import ConfigError

# --- frozen layers --------------------------------------------------------------------------------------------

FROZEN = {
    "stage 0": ["0", "1"],
    "stage 1": ["2", "3", "4", "5"],
    "stage 2": ["6", "7", "8"],
    "all but stage 1": ["0", "1", "6", "7", "8"],
    "a layer of each": ["0", "4", "8"],
    "one weight": ["1.weight"],
}


def frozen_cnn(names: list[str]) -> list[nn.Module]:
    layers = cnn(dropout=0.0)
    for name, parameter in nn.Sequential(*layers).named_parameters():
        parameter.requires_grad_(not any(name == f or name.startswith(f + ".") for f in names))
    return layers


@pytest.mark.parametrize("staleness", [(0, 0, 0), (2, 1, 0), (4, 2, 0)])
@pytest.mark.parametrize("names", FROZEN.values(), ids=FROZEN)
def test_frozen_parameters_stay_and_the_others_train_as_in_the_reference(
    names: list[str], staleness: tuple[int, ...]
) -> None:
    layers, truth = frozen_cnn(names), frozen_cnn(names)
    before = model_state(layers)
    engine = build_engine(layers, staleness, (2, 6), lr_scheduler=decay, clip_grad_norm=0.5)
    losses = train(engine, classification("cnn", 7))
    expected = train_reference(
        truth, (2, 6), staleness, classification("cnn", 7), cross_entropy, momentum, decay, clip_grad_norm=0.5
    )
    assert losses == expected.losses
    assert_same(engine.state_dict(), model_state(truth))
    assert_same(engine.optimizer_state_dict(), reference_optimizer_state(expected, truth, (2, 6)))
    for name, parameter in nn.Sequential(*layers).named_parameters():
        assert torch.equal(parameter, before[name]) != parameter.requires_grad
        assert parameter.grad is None


def test_the_optimizer_recipe_is_called_once_per_stage_with_something_to_train_and_with_just_that() -> None:
    layers = frozen_cnn(["0", "1", "4.weight"])
    given: list[list[int]] = []

    def make_optimizer(params: Any) -> Optimizer:
        given.append([id(p) for p in params])
        return sgd(params)

    engine = build_engine(layers, (6, 4, 2, 0), (2, 6, 8), optimizer=make_optimizer, lr_scheduler=decay)
    train(engine, classification("cnn", 3))
    by_stage = [layers[:2], layers[2:6], layers[6:8], layers[8:]]
    wanted = [[id(p) for p in nn.Sequential(*part).parameters() if p.requires_grad] for part in by_stage]
    assert given == [wanted[1], wanted[3]]
    assert [stage.optimizer is None for stage in engine.stages] == [True, False, True, False]
    assert [stage.lr_scheduler is None for stage in engine.stages] == [True, False, True, False]
    assert [stage.learning_rate for stage in engine.stages] == [None, 0.05 * 0.8**3, None, 0.05 * 0.8**3]
    assert [stage.num_updates for stage in engine.stages] == [3] * 4
    assert engine.learning_rate == 0.05 * 0.8**3


@pytest.mark.parametrize("cuts", [(), (2, 6)])
def test_a_model_with_nothing_to_train_runs_and_gives_its_losses(cuts: tuple[int, ...]) -> None:
    layers = frozen_cnn([str(index) for index in range(9)])
    engine = build_engine(layers, (4, 2, 0)[-1 - len(cuts) :], cuts, clip_grad_norm=1.0)
    truth = nn.Sequential(*frozen_cnn([str(index) for index in range(9)]))
    batches = classification("cnn", 3)
    assert train(engine, batches) == [cross_entropy(truth(h), target).item() for h, target in batches]
    assert engine.optimizer_state_dict() == {"state": {}, "param_groups": []}
    assert engine.learning_rate is None


def test_each_stage_clips_the_norm_of_its_own_gradient() -> None:
    norms: list[list[float]] = [[], [], []]
    layers = mlp(dropout=0.0)
    firsts = [layers[0], layers[2], layers[6]]

    def make_optimizer(params: Any) -> Optimizer:
        stage = next(k for k, first in enumerate(firsts) if first.weight is params[0])
        optimizer = sgd(params)

        def record(*_: object) -> None:
            norms[stage].append(torch.linalg.vector_norm(torch.cat([p.grad.flatten() for p in params])).item())

        optimizer.register_step_pre_hook(record)
        return optimizer

    train(
        build_engine(layers, (4, 2, 0), (2, 6), optimizer=make_optimizer, clip_grad_norm=0.01),
        classification("mlp", 5),
    )
    assert [len(stage) for stage in norms] == [5, 5, 5]
    assert all(norm == pytest.approx(0.01, rel=1e-3) for stage in norms for norm in stage)


# --- parameter groups -----------------------------------------------------------------------------------------


def no_decay_on_biases(name: str, parameter: nn.Parameter) -> dict[str, Any] | None:
    if parameter.ndim == 1:
        return {"weight_decay": 0.0}
    return {"lr": 0.2} if name == "8.weight" else None


def test_param_groups_are_made_by_name_in_order_of_appearance() -> None:
    names: list[str] = []

    def options(name: str, parameter: nn.Parameter) -> dict[str, Any] | None:
        assert parameter is dict(nn.Sequential(*layers).named_parameters())[name]
        names.append(name)
        return no_decay_on_biases(name, parameter)

    layers = cnn()
    engine = build_engine(layers, (4, 2, 0), (2, 6), param_groups=options)
    assert names == [name for name, _ in nn.Sequential(*layers).named_parameters()]
    groups = [
        (group["params"], group["lr"], group["weight_decay"]) for group in engine.optimizer_state_dict()["param_groups"]
    ]
    assert groups == [
        (["0.weight"], 0.05, 1e-3),
        (["1.weight", "1.bias"], 0.05, 0.0),
        (["4.weight"], 0.05, 1e-3),
        (["4.bias", "5.weight", "5.bias"], 0.05, 0.0),
        (["8.weight"], 0.2, 1e-3),
        (["8.bias"], 0.05, 0.0),
    ]


def test_param_groups_train_as_groups_of_the_unsplit_model() -> None:
    layers, truth = cnn(dropout=0.0), nn.Sequential(*cnn(dropout=0.0))
    engine = build_engine(layers, (0, 0, 0), (2, 6), param_groups=no_decay_on_biases, lr_scheduler=decay)
    batches = classification("cnn", 6)
    losses = train(engine, batches)
    named = dict(truth.named_parameters())
    optimizer = momentum([{"params": [p], **(no_decay_on_biases(name, p) or {})} for name, p in named.items()])
    scheduler = decay(optimizer)
    for (h, target), loss in zip(batches, losses, strict=True):
        optimizer.zero_grad()
        expected = cross_entropy(truth(h), target)
        expected.backward()
        optimizer.step()
        scheduler.step()
        assert loss == expected.item()
    assert_same(engine.state_dict(), dict(truth.state_dict()))


# --- tensors used twice within a stage ------------------------------------------------------------------------


class Tied(nn.Module):
    """Decodes with the weight of an embedding."""

    def __init__(self, source: nn.Linear) -> None:
        super().__init__()
        self.weight = source.weight

    def forward(self, h: Tensor) -> Tensor:
        return h @ self.weight


@pytest.mark.parametrize("make_optimizer", [momentum, adamw])
def test_a_parameter_shared_within_a_stage_gets_both_gradients_and_one_update(make_optimizer: Any) -> None:
    def layers() -> list[nn.Module]:
        torch.manual_seed(0)
        encoder = nn.Linear(5, 8)
        return [nn.Linear(5, 5), encoder, nn.Tanh(), Tied(encoder), nn.Linear(5, 3)]

    truth = layers()
    engine = build_engine(layers(), (4, 2, 0), (1, 4), optimizer=make_optimizer)
    losses = train(engine, classification("mlp", 8))
    expected = train_reference(truth, (1, 4), (4, 2, 0), classification("mlp", 8), cross_entropy, make_optimizer)
    assert losses == expected.losses
    assert_same(engine.state_dict(), model_state(truth))
    assert torch.equal(engine.state_dict()["1.weight"], engine.state_dict()["3.weight"])


def test_a_buffer_shared_within_a_stage_is_counted_by_both() -> None:
    def layers() -> list[nn.Module]:
        torch.manual_seed(0)
        built: list[nn.Module] = [nn.BatchNorm1d(5), nn.Linear(5, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)]
        built[2].running_mean = built[0].running_mean
        return built

    truth = layers()
    engine = build_engine(layers(), (2, 0), (3,))
    assert train(engine, classification("mlp", 6)) == (
        train_reference(truth, (3,), (2, 0), classification("mlp", 6), cross_entropy, momentum).losses
    )
    assert_same(engine.state_dict(), model_state(truth))


# --- the last stage --------------------------------------------------------------------------------------------


def test_a_last_stage_may_recompute_too() -> None:
    """As in GPipe: its loss then has no graph at first."""
    torch.manual_seed(0)
    layer = nn.Linear(5, 3)
    stage = assemble_stage(
        nn.Sequential(layer, nn.Dropout(0.5)),
        index=1,
        num_stages=2,
        device=CPU,
        seed=0,
        optimizer=sgd,
        lr_scheduler=None,
        loss_fn=cross_entropy,
        clip_grad_norm=None,
        param_groups=None,
    )
    h, target = classification("mlp", 1)[0]
    at_once = stage.forward(Activation([h], "tensor", target), 0, keep_graph=True)
    expected = stage.backward(None, 0)
    gradient = layer.weight.grad
    layer.zero_grad()
    first = stage.forward(Activation([h], "tensor", target), 0, keep_graph=False)
    stage.recompute(0)
    assert_same(first, at_once)
    assert_same(stage.backward(None, 0), expected)
    assert torch.equal(layer.weight.grad, gradient)


# --- what the user's functions return -------------------------------------------------------------------------


@pytest.mark.parametrize("cuts", [(), (1,)])
@pytest.mark.parametrize(
    ("loss_fn", "message"),
    [
        (lambda z, y: z, r"loss_fn returned a tensor of shape \(4, 3\); it must return .* with \.mean\(\)\."),
        (lambda z, y: z.sum().item(), r"loss_fn returned float; it must return the batch's loss as one number in a"),
        (lambda z, y: None, r"loss_fn returned NoneType; it must"),
        (lambda z, y: z.mean().detach(), r"does not require grad; nothing could be trained\. .* without \.detach\(\)"),
        (lambda z, y: (z.argmax(1) == y).float().mean(), r"does not require grad"),
        (lambda z, y: torch.tensor(1.0), r"does not require grad"),
    ],
)
def test_a_loss_is_one_number_that_requires_grad(loss_fn: Any, message: str, cuts: tuple[int, ...]) -> None:
    engine = build_engine([nn.Linear(5, 5), nn.Linear(5, 3)], (2, 0)[-1 - len(cuts) :], cuts, loss_fn=loss_fn)
    with pytest.raises(ConfigError, match=message):
        train(engine, classification("mlp", 2))


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_a_loss_of_one_element_may_have_any_shape(shape: tuple[int, ...]) -> None:
    engine = build_engine([nn.Linear(5, 3)], (0,), (), loss_fn=lambda z, y: cross_entropy(z, y).reshape(shape))
    (loss,) = engine.train(classification("mlp", 1), drain=True)
    assert loss.shape == ()


def assembled(**options: Any) -> Any:
    arguments = {
        "index": 0,
        "num_stages": 1,
        "device": CPU,
        "seed": 0,
        "optimizer": sgd,
        "lr_scheduler": None,
        "loss_fn": cross_entropy,
        "clip_grad_norm": None,
        "param_groups": None,
    }
    return assemble_stage(nn.Sequential(nn.Linear(5, 3)), **{**arguments, **options})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"optimizer": lambda params: None},
            "optimizer returned a NoneType; it must return a torch optimizer, such as",
        ),
        ({"optimizer": lambda params: [sgd(params)]}, "optimizer returned a list; it must"),
        ({"lr_scheduler": lambda optimizer: 0.1}, "lr_scheduler returned a float; it must return a torch scheduler"),
    ],
)
def test_recipes_return_what_they_should(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        assembled(**options)


def test_a_recipe_may_return_no_scheduler() -> None:
    assert assembled(lr_scheduler=lambda optimizer: None).lr_scheduler is None


def test_an_optimizer_of_other_parameters_than_the_stages_is_refused() -> None:
    """`lambda params: SGD(model.parameters(), ..)` would make every stage update the whole model."""
    model = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 3))
    with pytest.raises(ConfigError, match="optimizer"):
        build_engine(list(model), (2, 0), (1,), optimizer=lambda params: SGD(model.parameters(), lr=0.1))


class Plain(Optimizer):
    """An optimizer of the user's own, whose step takes no closure."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter -= group["lr"] * parameter.grad


def test_an_optimizer_of_the_users_own_steps_too() -> None:
    def layers() -> list[nn.Module]:
        torch.manual_seed(0)
        return [nn.Linear(5, 5), nn.Linear(5, 3)]

    truth = layers()
    engine = build_engine(layers(), (2, 0), (1,), optimizer=Plain)
    losses = train(engine, classification("mlp", 5))
    assert losses == train_reference(truth, (1,), (2, 0), classification("mlp", 5), cross_entropy, Plain).losses
    assert_same(engine.state_dict(), model_state(truth))


def test_an_optimizer_may_leave_parameters_out() -> None:
    layers = [nn.Linear(5, 3)]
    before = layers[0].bias.detach().clone()
    engine = build_engine(layers, (0,), (), optimizer=lambda params: sgd([p for p in params if p.ndim > 1]))
    train(engine, classification("mlp", 2))
    assert torch.equal(layers[0].bias, before)
    assert engine.optimizer_state_dict()["param_groups"][0]["params"] == ["0.weight"]
