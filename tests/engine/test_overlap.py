"""Forwards in a lane of their own: what may be at the same time, what may not, and the same numbers."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from engine_nets import CPU, assert_same, cnn, momentum
from stand_in_streams import RaceDetector, RecordedStreams
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import stalewise
from stalewise.engine import stage as stage_module
from stalewise.engine.feed import Feed
from stalewise.engine.interpreter import Interpreter
from stalewise.engine.messages import Activation, Gradient
from stalewise.engine.overlap import ForwardLane
from stalewise.engine.stage import Stage
from stalewise.engine.streams import Streams
from stalewise.methods import DSP, GPipe, Method

STEPS = 8


class Neighbours:
    """The links of the middle stage of three: threads that send and receive, each with a stream of its own."""

    def __init__(self, streams: RecordedStreams) -> None:
        self._streams = streams
        self._in, self._back, self._out = (streams.side() for _ in range(3))
        self.sent: list[Tensor] = []

    def _arrives(self, stream: str, *shape: int) -> Tensor:
        with self._streams.on(stream):
            tensor = torch.randn(*shape, generator=torch.Generator().manual_seed(len(self.sent)))
            ready = self._streams.mark()
        self._streams.wait(ready)
        self._streams.keep([tensor])
        return tensor

    def _leaves(self, tensors: list[Any]) -> None:
        ready = self._streams.mark()
        with self._streams.on(self._out):
            self._streams.wait(ready)
            self._streams.keep(tensors)
            self.sent += [tensor.clone() for tensor in tensors if tensor is not None]

    def receive_activation(self, batch: int) -> Activation:
        return Activation([self._arrives(self._in, 4, 4, 4, 4)], "tensor", None)

    def send_activation(self, batch: int, activation: Activation) -> None:
        self._leaves(activation.values)

    def receive_gradient(self, batch: int) -> Gradient:
        return Gradient([self._arrives(self._back, 4, 4, 2, 2)], torch.zeros(()))

    def send_gradient(self, batch: int, gradient: Gradient) -> None:
        self._leaves(gradient.values)


def run(
    method: Method, streams: RecordedStreams, *, overlap: bool = True, steps: int = STEPS
) -> tuple[RaceDetector, list[Tensor], nn.Module]:
    """Some steps of stage 1: a ReLU in place first, Dropout and BatchNorm, whose statistics are buffers."""
    program = method.program().stages[1]
    module = nn.Sequential(*cnn()[2:6])
    stage = Stage(
        module,
        index=1,
        num_stages=3,
        device=CPU,
        seed=4,
        optimizer=momentum(module.parameters()),
        lr_scheduler=None,
        loss_fn=cross_entropy,
        program=program,
        overlap=overlap,
        streams=streams,
    )
    links = Neighbours(streams)
    interpreter = Interpreter(stage, program, links)  # type: ignore[arg-type]
    detector = RaceDetector(streams)
    with detector:
        for step in range(steps):
            for action in program.step(step, None):
                detector.phase = str(action)
                interpreter.execute(action, 0)
    return detector, links.sent, module


@pytest.mark.parametrize("method", [DSP.minimal(3), DSP(staleness=(2, 1, 0)), GPipe(3, 1)], ids=repr)
def test_nothing_races(method: Method) -> None:
    detector, *_ = run(method, RecordedStreams())
    assert detector.races() == []


@pytest.mark.parametrize("overlap", [True, False])
def test_a_forward_may_be_beside_recompute_and_backward_of_another_batch(overlap: bool) -> None:
    detector, *_ = run(DSP.minimal(3), RecordedStreams(), overlap=overlap)
    for other in ("R5", "B5"):
        assert detector.beside(lambda use: use.phase == "F7", lambda use, of=other: use.phase == of) is overlap
    assert not detector.beside(lambda use: use.phase == "F7", lambda use: use.phase in ("B4", "U"))


def test_numbers_are_the_same() -> None:
    _, sent, module = run(DSP.minimal(3), RecordedStreams())
    _, expected, other = run(DSP.minimal(3), RecordedStreams(), overlap=False)
    assert_same(sent, expected)
    assert_same(module.state_dict(), other.state_dict())


@contextmanager
def _too_late(module: nn.Module) -> Iterator[None]:
    yield


@pytest.mark.parametrize(
    ("left_out", "race"),
    [
        ("the update waits", "F.*U|U.*F"),
        ("the forward waits", "U.*F|F.*U"),
        ("memory is kept", "is not kept"),
        ("buffers are copied", "F.*R|R.*F"),
        ("outputs are sent from the lane", "F.*SEND_A|F.*F"),
    ],
)
def test_what_is_left_out_is_found(left_out: str, race: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """That the detector sees each of the things that the lane does."""
    streams = RecordedStreams()
    if left_out == "the update waits":
        monkeypatch.setattr(ForwardLane, "join", lambda self: None)
    elif left_out == "the forward waits":
        monkeypatch.setattr(streams, "wait", lambda mark: None)
    elif left_out == "memory is kept":
        monkeypatch.setattr(streams, "keep", lambda tensors: None)
    elif left_out == "buffers are copied":
        monkeypatch.setattr(stage_module, "unchanged_buffers", _too_late)
    else:
        monkeypatch.setattr(ForwardLane, "sending", lambda self: streams.on(None))
    detector, *_ = run(DSP.minimal(3), streams)
    races = "\n".join(detector.races())
    assert races
    assert re.search(race, races)


@pytest.mark.parametrize("activations", ["stored", "recompute"])
def test_passes_with_a_graph_stay_on_the_main_stream(activations: str) -> None:
    detector, *_ = run(DSP.minimal(3, activations=activations), RecordedStreams())
    streams = {use.stream for uses in detector.uses.values() for use in uses if use.phase.startswith("F")}
    assert (len(streams) > 1) is (activations == "recompute")


def test_batches_are_copied_beside_other_work() -> None:
    streams = RecordedStreams()
    feed = Feed([(torch.zeros(2, 3), torch.zeros(2))], CPU, streams)
    assert feed.another()
    (stream, _, copied), *rest = streams.log
    assert stream != "main"
    assert not rest, "nobody waits before the batch is taken"
    batch = feed.take()
    assert streams.log[-1] == ("main", "wait", copied)
    assert len(streams.kept) == len(batch.values)


def test_losses_are_waited_for_when_they_are_taken() -> None:
    """Each in a copy of its own in host memory, and for no more than that copy."""
    streams = RecordedStreams()
    module = nn.Linear(3, 2)
    program = DSP.minimal(2).program().stages[1]
    stage = Stage(
        module,
        index=1,
        num_stages=2,
        device=CPU,
        seed=0,
        optimizer=momentum(module.parameters()),
        lr_scheduler=None,
        loss_fn=cross_entropy,
        program=program,
        streams=streams,
    )

    class Links:
        def receive_activation(self, batch: int) -> Activation:
            return Activation([torch.randn(4, 3)], "tensor", torch.zeros(4, dtype=torch.long))

        def send_gradient(self, batch: int, gradient: Gradient) -> None:
            pass

    interpreter = Interpreter(stage, program, Links())  # type: ignore[arg-type]
    for step in range(3):
        for action in program.step(step, None):
            interpreter.execute(action, 0)
    marks = [what for _, kind, what in streams.log if kind == "mark"]
    assert [kind for _, kind, _ in streams.log].count("to host") == 3
    assert not [entry for entry in streams.log if entry[1] == "settle"]
    assert len(interpreter.take_losses(1)) == 2
    assert [what for _, kind, what in streams.log if kind == "settle"] == marks[:2]
    interpreter.settle_losses()
    assert streams.log[-1] == ("main", "settle", marks[2])


def test_a_cpu_has_nothing_to_order() -> None:
    streams = Streams()
    value = torch.ones(2)
    assert streams.to_host(value) is value
    assert streams.to_device(value) is value
    assert streams.pinned(value) is value
    assert (streams.side(), streams.mark()) == (None, None)


@pytest.mark.parametrize(("overlap", "message"), [(True, "overlap is on and stages are on cpu"), (1, "must be True")])
def test_it_is_refused_where_it_cannot_be(overlap: Any, message: str) -> None:
    with pytest.raises(stalewise.ConfigError, match=message):
        stalewise.Pipeline(
            cnn(), method=DSP.minimal(3), loss_fn=cross_entropy, optimizer=momentum, partition=(2, 6), overlap=overlap
        )
