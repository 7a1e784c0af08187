"""The sequential engine: steps, pauses, drains, failures, evaluation, and what it tells of itself."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from engine_nets import assert_same, build_engine, classification, mlp, train
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from stalewise.engine.interpreter import Interpreter
from stalewise.engine.score import Score, mean
from stalewise.engine.sequential import SequentialEngine
from stalewise.errors import ConfigError, ProgramError
from stalewise.methods.method import stale_slots
from stalewise.protocol.actions import Action, Kind
from stalewise.protocol.program import Program, StageProgram
from stalewise.protocol.staleness import Staleness

STALENESS = [(0, 0, 0), (2, 1, 0), (4, 2, 0), (3, 3, 0)]


@pytest.mark.parametrize("staleness", STALENESS)
@pytest.mark.parametrize("count", [1, 3, 8])
def test_counters_are_true_at_every_loss(staleness: tuple[int, ...], count: int) -> None:
    """In the body of the loop, too, and while the pipeline drains: the loss of batch j says that j + 1 are done."""
    engine = build_engine(mlp(), staleness, (2, 6))
    entered = 0

    def batches() -> Iterator[Any]:
        nonlocal entered
        for batch in classification("mlp", count):
            entered += 1
            yield batch

    for cycle in range(2):
        entered = 0
        for j, _ in enumerate(engine.train(batches(), drain=True)):
            assert entered == min(j + 1 + staleness[0], count)
            assert engine.num_batches == cycle * count + entered
            assert engine.batches_in_flight == entered - (j + 1)
        assert engine.batches_in_flight == 0
        assert engine.num_batches == (cycle + 1) * count


@pytest.mark.parametrize("count", [1, 3, 8])
def test_counters_after_a_pause(count: int) -> None:
    engine = build_engine(mlp(), (4, 2, 0), (2, 6))
    losses = train(engine, classification("mlp", count), drain=False)
    assert len(losses) == max(0, count - 4)
    assert engine.batches_in_flight == min(count, 4)
    assert engine.num_batches == count
    losses += [loss.item() for loss in engine.drain()]
    assert len(losses) == count
    assert engine.batches_in_flight == 0


def test_a_batch_is_read_only_when_its_step_comes() -> None:
    """Nothing is taken from the caller's iterator that is not trained."""
    engine = build_engine(mlp(), (2, 1, 0), (2, 6))
    iterator = iter(classification("mlp", 9))
    for j, _ in enumerate(engine.train(iterator, drain=True)):
        if j == 1:
            break
    assert engine.num_batches == 4
    assert len(list(iterator)) == 5
    assert engine.batches_in_flight == 0


def test_a_program_that_deadlocks_is_a_program_error_that_says_who_waits() -> None:
    slots = [stale_slots(k, 2, lag=k, recompute=False) for k in range(2)]
    program = Program(stages=tuple(StageProgram(s) for s in slots), staleness=Staleness((0, 0)))
    stages = build_engine(mlp(), (0, 0), (4,)).stages
    with pytest.raises(ProgramError, match=r"V9: deadlock in step 0: stage 0 at RECV_G0\. Check the program with"):
        train(SequentialEngine(program, stages), classification("mlp", 2))


def test_an_engine_that_failed_within_a_step_refuses_to_go_on() -> None:
    def loss_fn(output: Tensor, target: Tensor) -> Tensor:
        if target is batches[3][1]:
            raise KeyError("in the loss")
        return cross_entropy(output, target)

    batches = classification("mlp", 6)
    engine = build_engine(mlp(), (4, 2, 0), (2, 6), loss_fn=loss_fn)
    with pytest.raises(KeyError, match="in the loss"):
        train(engine, batches)
    for call in (
        lambda: train(engine, batches),
        lambda: list(engine.drain()),
        lambda: engine.evaluate(batches, cross_entropy),
    ):
        with pytest.raises(ConfigError, match=r"failed within a step, .* Build a new one and load the weights"):
            call()
    assert len(engine.state_dict()) > 0


def test_an_error_of_the_loader_leaves_a_pipeline_that_goes_on() -> None:
    """It comes between steps: the batches in flight are drained later, and every number is that of a run without it."""
    batches = classification("mlp", 7)

    def broken() -> Iterator[Any]:
        yield from batches[:5]
        raise OSError("disk")

    engine, whole = build_engine(mlp(), (2, 1, 0), (2, 6)), build_engine(mlp(), (2, 1, 0), (2, 6))
    losses: list[float] = []
    with pytest.raises(OSError, match="disk"):
        losses.extend(loss.item() for loss in engine.train(broken(), drain=True))
    assert engine.batches_in_flight == 2
    losses += train(engine, batches[5:])
    assert losses == train(whole, batches)
    assert_same(engine.state_dict(), whole.state_dict())


# --- evaluation -----------------------------------------------------------------------------------------------


def test_a_score_is_a_mean_over_samples() -> None:
    engine = build_engine(mlp(), (2, 0), (4,))
    batches = classification("mlp", 3, last_size=1)
    model = nn.Sequential(*mlp()).eval()
    with torch.no_grad():
        outputs = [model(h) for h, _ in batches]
    expected = sum(len(y) * cross_entropy(z, y).item() for z, (_, y) in zip(outputs, batches, strict=True)) / 9
    assert engine.evaluate(batches, cross_entropy) == pytest.approx(expected, rel=1e-12)
    assert engine.evaluate(batches, lambda z, y: len(y)) == (4 * 4 + 4 * 4 + 1) / 9


@pytest.mark.parametrize(
    ("target", "weight"),
    [(torch.zeros(7), 7), ({"a": None, "b": torch.zeros(2, 5)}, 2), (torch.tensor(0.0), 1), (None, 4)],
)
def test_samples_are_counted_in_the_target_or_in_the_output_without_one(target: Any, weight: int) -> None:
    engine = build_engine([nn.Linear(5, 3)], (0,), ())
    values = iter([1.0, 0.0])
    h = torch.zeros(4, 5)
    assert engine.evaluate([(h, target), (h, torch.zeros(1))], lambda z, y: next(values)) == weight / (weight + 1)


@pytest.mark.parametrize("value", [0.25, torch.tensor(0.25), torch.tensor([[0.25]]), 1, True])
def test_a_metric_gives_one_number(value: Any) -> None:
    engine = build_engine([nn.Linear(5, 3)], (0,), ())
    assert engine.evaluate(classification("mlp", 2), lambda z, y: value) == float(value)


@pytest.mark.parametrize(
    ("value", "got"),
    [(torch.zeros(4), r"a tensor of shape \(4,\)"), (None, "NoneType"), ("0.5", "str"), ([0.5], "list")],
)
def test_a_metric_that_gives_something_else_is_refused(value: Any, got: str) -> None:
    engine = build_engine([nn.Linear(5, 3)], (0,), ())
    with pytest.raises(ConfigError, match=rf"metric returned {got}; it must return the batch's mean as one number"):
        engine.evaluate(classification("mlp", 2), lambda z, y: value)


def test_totals_of_a_score_add_up_over_ranks() -> None:
    assert Score(cross_entropy).totals() == (0, 0)
    assert mean(3.0, 4) == 0.75
    with pytest.raises(ConfigError, match="evaluate got no batch; a mean needs at least one sample"):
        mean(0.0, 0)


# --- what it tells of itself ----------------------------------------------------------------------------------


def test_statuses_count_batches_updates_and_time() -> None:
    engine = build_engine(mlp(), (4, 2, 0), (2, 6))
    assert [status["batch"] for status in engine.statuses()] == [-1, -1, -1]
    train(engine, classification("mlp", 3))
    train(engine, classification("mlp", 2))
    statuses = engine.statuses()
    assert json.loads(json.dumps(statuses)) == statuses
    assert [status["stage"] for status in statuses] == [0, 1, 2]
    assert [status["batch"] for status in statuses] == [4, 4, 4]
    assert [status["updates"] for status in statuses] == [5, 5, 5]
    for status, trace in zip(statuses, engine.traces(), strict=True):
        busy = sum(s.end_ns - s.start_ns for s in trace if s.kind.value in "FRBU")
        assert status["busy_ns"] == busy > 0


class Nothing:
    """A stage and links that do nothing; the clock alone goes on."""

    index, is_first, is_last, num_updates = 1, False, True, 0

    def update(self) -> None:
        self.num_updates += 1

    def receive_activation(self, batch: int) -> Any:
        assert batch == 17
        return None


def test_an_interpreter_records_global_batches_and_times_by_its_clock() -> None:
    ticks = iter(range(0, 1000, 10))
    nothing: Any = Nothing()
    interpreter = Interpreter(nothing, StageProgram(()), nothing, clock=lambda: next(ticks))
    interpreter.execute(Action(Kind.RECEIVE_ACTIVATION, 2), first_batch=15)
    interpreter.execute(Action(Kind.UPDATE), first_batch=15)
    assert [tuple(span)[1:] for span in interpreter.trace] == [
        (Kind.RECEIVE_ACTIVATION, 17, 0, 10),
        (Kind.UPDATE, 17, 20, 30),
    ]
    assert interpreter.time_ns[Kind.RECEIVE_ACTIVATION] == interpreter.waiting_ns == 10
    assert interpreter.action is Kind.UPDATE
    assert interpreter.status() == {
        "stage": 1,
        "batch": 17,
        "updates": 1,
        "time_ns": 40,
        "busy_ns": 10,
        "wait_ns": 10,
        "steps": [],
    }
