"""Buffers change once per batch, in the pass that builds the graph, and in no other."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from block import Block
from engine_nets import assert_same, build_engine, classification, model_state, momentum, sgd, train
from reference import train_reference
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.parametrizations import spectral_norm

from stalewise.engine.buffers import unchanged_buffers


class Counter(nn.Module):
    """Counts its passes in place, in a saved and in an unsaved buffer, and sums its input by assignment."""

    in_place: Tensor
    assigned: Tensor
    unsaved: Tensor

    def __init__(self, size: int = 5) -> None:
        super().__init__()
        self.register_buffer("in_place", torch.zeros(()))
        self.register_buffer("assigned", torch.zeros(size))
        self.register_buffer("unsaved", torch.zeros(()), persistent=False)

    def forward(self, h: Tensor) -> Tensor:
        with torch.no_grad():
            self.in_place += 1
            self.unsaved.add_(1)
            self.assigned = self.assigned + h.detach().mean(0)
        return h * self.in_place


class LateCounter(nn.Module):
    """Counts its passes in a buffer that is None at first, and in one that it registers in its first pass."""

    late: Tensor | None
    registered: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("late", None)

    def forward(self, h: Tensor) -> Tensor:
        self.late = torch.ones(()) if self.late is None else self.late + 1
        if "registered" not in self._buffers:
            self.register_buffer("registered", torch.zeros(()))
        self.registered += 1
        return h


# --- the guard alone ------------------------------------------------------------------------------------------


def test_buffers_are_the_same_objects_with_the_same_values_afterwards() -> None:
    module = nn.Sequential(Counter(), nn.BatchNorm1d(5))
    objects = dict(module.named_buffers())
    values = {name: buffer.clone() for name, buffer in objects.items()}
    for size in (4, 3):
        with unchanged_buffers(module):
            module(torch.randn(size, 5))
            assert module[0].in_place == 1
            assert module[1].num_batches_tracked == 1
    after = dict(module.named_buffers())
    assert all(after[name] is objects[name] for name in objects)
    assert_same({name: after[name] for name in values}, values)


def test_a_buffer_that_was_not_there_is_not_there_afterwards() -> None:
    module = LateCounter()
    with unchanged_buffers(module):
        module(torch.ones(2, 5))
        assert module.late == module.registered == 1
    assert module.late is None
    assert dict(module._buffers) == {"late": None}


def test_inside_the_module_starts_from_the_values_of_now() -> None:
    """Not from those of the pass before."""
    module = Counter()
    for count in range(3):
        with unchanged_buffers(module):
            assert module.in_place == count
            assert module(torch.ones(2, 5))[0, 0] == count + 1
        module(torch.ones(2, 5))
    assert module.in_place == 3


def test_a_buffer_may_change_shape_and_dtype_between_passes() -> None:
    module = Counter()
    for buffer in (torch.zeros(5), torch.zeros(5, dtype=torch.float64), torch.zeros(1, 5)):
        module.assigned = buffer
        with unchanged_buffers(module):
            assert (module.assigned.dtype, module.assigned.shape) == (buffer.dtype, buffer.shape)
            module(torch.ones(2, 5))
        assert module.assigned is buffer
        assert not buffer.any()


def test_a_buffer_of_two_modules_stays_one_buffer_inside() -> None:
    first, second = Counter(), Counter()
    second.in_place = first.in_place
    module = nn.Sequential(first, second)
    with unchanged_buffers(module):
        module(torch.ones(2, 5))
        assert first.in_place is second.in_place
        assert first.in_place == 2
    assert first.in_place is second.in_place
    assert first.in_place == 0


def test_buffers_come_back_after_an_error() -> None:
    module = Counter()
    before = module.in_place

    def fail() -> None:
        with unchanged_buffers(module):
            module(torch.ones(2, 5))
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert module.in_place is before
    assert before == 0


# --- in an engine ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("staleness", [(0, 0, 0), (2, 1, 0), (4, 2, 0), (9, 9, 0)])
def test_every_buffer_counts_every_batch_once(staleness: tuple[int, ...]) -> None:
    layers: list[nn.Module] = []
    for _ in staleness:
        layers += [Counter(), nn.BatchNorm1d(5), nn.Linear(5, 5)]
    batches = classification("mlp", 7)
    train(build_engine(layers, staleness, (3, 6), optimizer=sgd), batches)
    for counter, norm in zip(layers[::3], layers[1::3], strict=True):
        assert counter.in_place == counter.unsaved == norm.num_batches_tracked == 7
    total = torch.zeros(5)
    for h, _ in batches:
        total = total + h.mean(0)
    assert torch.equal(layers[0].assigned, total)


def test_a_buffer_made_by_the_first_pass_counts_every_batch_once() -> None:
    counter = LateCounter()
    train(build_engine([counter, nn.Linear(5, 3)], (2, 0), (1,)), classification("mlp", 6))
    assert counter.late == counter.registered == 6


def test_statistics_are_those_of_the_passes_with_a_graph() -> None:
    """Hand-written: running mean and variance of the input over all batches, each once, in order."""
    norm = nn.BatchNorm1d(5)
    batches = classification("mlp", 6)
    mean, var = torch.zeros(5), torch.ones(5)
    for h, _ in batches:
        mean, var = 0.9 * mean + 0.1 * h.mean(0), 0.9 * var + 0.1 * h.var(0)
    train(build_engine([norm, nn.Linear(5, 5), nn.Linear(5, 3)], (4, 2, 0), (1, 2)), batches)
    torch.testing.assert_close(norm.running_mean, mean)
    torch.testing.assert_close(norm.running_var, var)


def test_buffers_of_parametrizations_are_kept_too() -> None:
    """Spectral norm moves its vectors in every pass in training mode, and the weights of that pass follow from them."""

    def layers() -> list[nn.Module]:
        torch.manual_seed(0)
        normed = [spectral_norm(nn.Linear(5, width)) for width in (5, 5, 3)]
        return [normed[0], nn.Tanh(), normed[1], nn.BatchNorm1d(5), normed[2]]

    truth = layers()
    engine = build_engine(layers(), (4, 2, 0), (2, 4))
    losses = train(engine, classification("mlp", 9))
    expected = train_reference(truth, (2, 4), (4, 2, 0), classification("mlp", 9), cross_entropy, momentum)
    assert losses == expected.losses
    assert_same(engine.state_dict(), model_state(truth))


def test_a_forward_uses_the_buffers_of_its_time() -> None:
    """With m = 2 the graph-less forward of batch n runs after n - 2 batches were counted, so it multiplies by n - 1."""
    counter = Counter()
    factors: list[float] = []
    record = nn.Identity()
    record.register_forward_hook(lambda _m, _i, z: factors.append(z.flatten()[0].item()))
    batches = [(torch.ones(2, 5), torch.zeros(2, dtype=torch.long)) for _ in range(6)]
    train(build_engine([counter, record, nn.Linear(5, 3)], (2, 0), (2,)), batches)
    assert factors == [1, 1, 1, 1, 2, 2, 3, 3, 4, 4, 5, 6]


def test_a_buffer_that_leaves_the_stage_arrives_as_it_was() -> None:
    """A stage may pass a buffer on; what later passes make of the buffer does not reach the message."""

    class WithCount(Counter):
        def forward(self, h: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
            return super().forward(h), self.in_place

    class Record(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.seen: list[tuple[bool, float]] = []

        def forward(self, pair: tuple[Tensor, Tensor]) -> Tensor:
            self.seen.append((torch.is_grad_enabled(), pair[1].item()))
            return pair[0]

    record = Record()
    layers = [Block(nn.Linear(5, 5), WithCount()), record, nn.Linear(5, 3)]
    train(build_engine(layers, (4, 2, 0), (1, 2)), classification("mlp", 8))
    sent = [count for graph, count in record.seen if not graph]
    assert sent == [1, 1, 1, 1, 1, 2, 3, 4]
    assert [count for graph, count in record.seen if graph] == sent


@pytest.mark.parametrize("dirty", [False, True])
def test_a_frozen_batchnorm_in_eval_stays_in_eval_and_keeps_its_statistics(dirty: bool) -> None:
    frozen, norm = nn.BatchNorm1d(5), nn.BatchNorm1d(5)
    frozen.eval().requires_grad_(False)
    layers: list[nn.Module] = [nn.Linear(5, 5), frozen, norm, nn.Linear(5, 3)]
    before = {name: value.clone() for name, value in frozen.state_dict().items()}
    engine = build_engine(layers, (2, 0), (3,))
    if dirty:
        engine.evaluate(classification("mlp", 1), lambda output, target: 0.0)
    train(engine, classification("mlp", 4))
    engine.evaluate(classification("mlp", 2), lambda output, target: 0.0)
    assert not frozen.training
    assert norm.training
    assert norm.num_batches_tracked == 4
    assert_same(dict(frozen.state_dict()), before)


def modes(module: nn.Module) -> list[bool]:
    return [part.training for part in module.modules()]


def check_mode(expected: bool) -> Callable[..., None]:
    def hook(module: nn.Module, *_: object) -> None:
        assert module.training is expected

    return hook


@pytest.mark.parametrize("fails", [False, True])
def test_evaluation_runs_in_eval_mode_and_restores_each_modules_own(fails: bool) -> None:
    layers: list[nn.Module] = [
        nn.Linear(5, 5),
        nn.BatchNorm1d(5),
        nn.Sequential(nn.Dropout(), nn.Dropout()),
        nn.Linear(5, 3),
    ]
    layers[1].eval()
    layers[2][1].eval()
    engine = build_engine(layers, (2, 0), (2,))
    before = [modes(stage.module) for stage in engine.stages]
    state = engine.state_dict()
    handles = [part.register_forward_pre_hook(check_mode(False)) for layer in layers for part in layer.modules()]

    def metric(output: Tensor, target: Tensor) -> float:
        assert not output.requires_grad
        if fails:
            raise KeyError
        return 1.0

    batches = classification("mlp", 2)
    if fails:
        with pytest.raises(KeyError):
            engine.evaluate(batches, metric)
    else:
        assert engine.evaluate(batches, metric) == 1.0
    assert [modes(stage.module) for stage in engine.stages] == before
    assert_same(engine.state_dict(), state)
    for handle in handles:
        handle.remove()
    train(engine, batches)  # a failed evaluation leaves a pipeline that trains


def test_a_module_without_weights_may_be_shared_by_stages_and_keeps_its_mode() -> None:
    dropout = nn.Dropout()
    engine = build_engine([nn.Linear(5, 5), dropout, nn.Linear(5, 3), dropout], (2, 0), (2,))
    engine.evaluate(classification("mlp", 1), lambda output, target: 0.0)
    assert dropout.training
