"""Simulated ends are those of the sequential engine's logical clock, while it really trains."""

from __future__ import annotations

import pytest
from engine_nets import build_engine, classification, mlp, train

from stalewise.engine.logical_time import LogicalTime
from stalewise.engine.sequential import SequentialEngine
from stalewise.methods import METHOD_NAMES, Method, build_method
from stalewise.protocol.actions import Action, Kind
from stalewise.timing import LinkCost, Links, StepCosts, TimedProgram

TIMES: dict[Kind, list[int]] = {
    Kind.LOAD: [3, 0, 0],
    Kind.FORWARD: [90, 110, 85],
    Kind.SEND_ACTIVATION: [4, 5, 0],
    Kind.RECOMPUTE: [95, 105, 80],
    Kind.BACKWARD: [170, 210, 180],
    Kind.SEND_GRADIENT: [0, 6, 7],
    Kind.RECEIVE_ACTIVATION: [0, 2, 3],
    Kind.RECEIVE_GRADIENT: [1, 2, 0],
    Kind.UPDATE: [13, 11, 12],
    Kind.SYNTHESIZE: [8, 9, 0],
    Kind.TRAIN_SYNTHESIZER: [6, 4, 0],
    Kind.SEND_TOKEN: [0, 0, 2],
    Kind.RECEIVE_TOKEN: [1, 0, 0],
    Kind.SEND_LOSS: [0, 1, 2],
    Kind.RECEIVE_LOSS: [2, 1, 0],
}
LATENCY = 37
CASES: list[tuple[str, dict[str, object]]] = [
    *((name, {}) for name in METHOD_NAMES),
    ("dsp", {"staleness": (3, 2, 0)}),
    ("dsp", {"staleness": (2, 2, 0), "accumulate": 2}),
    ("bp", {"accumulate": 3}),
    ("gpipe", {"micro_batches": 2, "activations": "stored"}),
]


@pytest.mark.parametrize(("name", "options"), CASES)
@pytest.mark.parametrize("num_batches", [1, 7])
def test_the_logical_clock_shows_what_is_simulated(name: str, options: dict[str, object], num_batches: int) -> None:
    method: Method = build_method(name, num_stages=3, **options)
    program = method.program()
    costs = StepCosts.of_kinds(program, TIMES)
    links = Links.equal(3, LinkCost(latency_ns=LATENCY))

    def duration(stage: int, action: Action) -> int:
        place = next(
            index
            for index, slot in enumerate(program.stages[stage].slots)
            if slot.kind is action.kind and slot.micro_batch == action.micro_batch
        )
        return int(costs.tables[stage][0, place])

    built = build_engine(mlp(), method, (2, 6))
    clock = LogicalTime(3, duration, latency_ns=LATENCY)
    engine = SequentialEngine(program, built.stages, logical_time=clock)
    losses = train(engine, classification("mlp", num_batches))
    assert len(losses) == num_batches
    simulated = TimedProgram(program, costs, links).run(num_batches, record_actions=True).traces()
    for stage, (real, predicted) in enumerate(zip(engine.traces(), simulated, strict=True)):
        assert list(real) == list(predicted), f"stage {stage}"
