"""What a stage keeps: m_k + 1 inputs, no graph beyond a step, nothing after a drain."""

from __future__ import annotations

import weakref
from collections.abc import Iterator

import pytest
import torch
from engine_nets import NETS, build_engine, classification, mlp, train
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from stalewise.protocol.actions import Kind


@given(st.lists(st.integers(0, 10), max_size=3), st.integers(1, 14), st.booleans())
@settings(deadline=None, derandomize=True, max_examples=40)
def test_stored_inputs_reach_m_plus_1_and_never_exceed_it(depths: list[int], count: int, drained: bool) -> None:
    staleness = (*sorted(depths, reverse=True), 0)
    engine = build_engine(mlp(), staleness, range(1, len(staleness)))
    batches = classification("mlp", count)
    if drained:  # a first cycle of one batch leaves nothing behind
        train(engine, batches[:1])
        assert [stage.peak_stored_inputs for stage in engine.stages] == [1] * len(staleness)
    train(engine, batches)
    assert [stage.peak_stored_inputs for stage in engine.stages] == [min(m + 1, count) for m in staleness]


def alive(tensors: list[weakref.ref[Tensor]]) -> int:
    return sum(tensor() is not None for tensor in tensors)


class Loader:
    """Makes batches and knows which of them are still alive."""

    def __init__(self, net: str, count: int) -> None:
        self.net, self.count = net, count
        self.inputs: list[weakref.ref[Tensor]] = []
        self.targets: list[weakref.ref[Tensor]] = []

    def make(self) -> tuple[Tensor, Tensor]:
        inputs, target = classification(self.net, 1)[0]
        self.inputs.append(weakref.ref(inputs))
        self.targets.append(weakref.ref(target))
        return inputs, target

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for _ in range(self.count):
            yield self.make()


@pytest.mark.parametrize("staleness", [(0, 0, 0), (2, 1, 0), (4, 2, 0), (5, 5, 0)])
@pytest.mark.parametrize("net", ["mlp", "cnn"])
def test_a_batch_is_let_go_once_it_was_backwarded(net: str, staleness: tuple[int, ...]) -> None:
    loader = Loader(net, 9)
    engine = build_engine(NETS[net](), staleness, (2, 6))
    left = [(alive(loader.inputs), alive(loader.targets)) for _ in engine.train(loader, drain=True)]
    m = staleness[0]
    in_flight = [min(m, 8 - j) for j in range(9)]  # after batch j's backward: the m batches after it, if there are
    assert left == [(number, number) for number in in_flight]
    assert len(loader.inputs) == len(loader.targets) == 9


@pytest.mark.parametrize("staleness", [(0, 0, 0), (2, 1, 0), (4, 2, 0)])
def test_no_graph_outlives_its_step(staleness: tuple[int, ...]) -> None:
    graphs: list[weakref.ref[Tensor]] = []

    def watch(module: nn.Module, args: object, output: Tensor) -> None:
        if output.requires_grad:
            graphs.append(weakref.ref(output))

    layers = mlp()
    for layer in layers:
        layer.register_forward_hook(watch)
    for loss in build_engine(layers, staleness, (2, 6)).train(classification("mlp", 6), drain=True):
        assert not loss.requires_grad
        assert alive(graphs) == 0
    assert len(graphs) == 6 * len(layers)


def test_messages_do_not_pile_up_on_a_link() -> None:
    """Sent minus received, at every action of the run: at most m_k + 1 activations, at most d_k + 1 gradients."""
    staleness = (5, 2, 0)
    engine = build_engine(mlp(), staleness, (2, 6))
    train(engine, classification("mlp", 12))
    ends = sorted((span.end_ns, span.stage, span.kind) for trace in engine.traces() for span in trace)
    held = {(kind, link): 0 for kind in "AG" for link in (0, 1)}
    most = dict(held)
    for _, stage, kind in ends:
        match kind:
            case Kind.SEND_ACTIVATION:
                held["A", stage] += 1
            case Kind.RECEIVE_ACTIVATION:
                held["A", stage - 1] -= 1
            case Kind.SEND_GRADIENT:
                held["G", stage - 1] += 1
            case Kind.RECEIVE_GRADIENT:
                held["G", stage] -= 1
        for place, number in held.items():
            most[place] = max(most[place], number)
    assert all(number == 0 for number in held.values())
    for link in (0, 1):
        assert most["A", link] <= staleness[link] + 1
        assert most["G", link] <= staleness[link] - staleness[link + 1] + 1


def test_gradients_are_gone_after_an_update() -> None:
    """`set_to_none`: a step that gives a weight no gradient does not move it, and no memory is held for it."""
    layers = mlp()
    for _ in build_engine(layers, (2, 1, 0), (2, 6)).train(classification("mlp", 4), drain=True):
        assert all(p.grad is None for layer in layers for p in layer.parameters())


def test_state_dict_and_traces_share_no_memory_with_the_weights() -> None:
    engine = build_engine(mlp(), (2, 1, 0), (2, 6))
    train(engine, classification("mlp", 3))
    own = {value.data_ptr() for stage in engine.stages for value in stage.module.state_dict().values()}
    state = engine.state_dict()
    optimizer = engine.optimizer_state_dict()["state"]
    inner = {v.data_ptr() for s in engine.stages for vs in s.optimizer.state.values() for v in vs.values()}
    assert not own & {value.data_ptr() for value in state.values()}
    assert not inner & {value.data_ptr() for values in optimizer.values() for value in values.values()}
    before = engine.state_dict()
    for value in (*state.values(), *(v for values in optimizer.values() for v in values.values())):
        value.zero_()
    assert all(torch.equal(value, before[name]) for name, value in engine.state_dict().items())
