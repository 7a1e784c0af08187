"""What the model says of a row of `straggler_rounds`: durations from its calm steps, and the same slow steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from stalewise.methods import Method
from stalewise.protocol.actions import Kind
from stalewise.protocol.stragglers import Stragglers
from stalewise.timing.costs import StepCosts
from stalewise.timing.draws import by_update
from stalewise.timing.elastic import run_elastic
from stalewise.timing.slow_steps import slow_steps
from stalewise.timing.timetable import TimedProgram

__all__ = ["predicted_windows"]

WARM_UP = 16
"""Calm updates before a run, in the model, in which the pipeline fills."""


def predicted_windows(method: Method, times_ns: Mapping[Kind, Sequence[int]], schedule: Any) -> list[float]:
    """Seconds per step of the last stage in each window of a `Schedule`; each run is timed on its own."""
    predict = _fixed if method.elastic_rule is None else _elastic
    steps = []
    for run in range(len(schedule.runs)):
        first, last = (WARM_UP + update - schedule.begin(run) - 1 for update in schedule.window(run))
        ends = predict(method, times_ns, schedule, run)
        steps.append(float(ends[last] - ends[first]) / (last - first) / 1e9)
    return steps


def _fixed(method: Method, times_ns: Mapping[Kind, Sequence[int]], schedule: Any, run: int) -> Any:
    """When each step of the last stage ends, in ns."""
    program = method.program()
    begin, end = schedule.begin(run), schedule.begin(run + 1)
    calm = StepCosts.of_kinds(program, times_ns)
    costs, rows = slow_steps(calm, program, Stragglers.of(schedule.straggler(run)), begin, end)
    of_updates = np.concatenate([np.zeros((program.num_stages, WARM_UP, 1), np.int16), rows], axis=1)
    timed = TimedProgram(program, costs)
    count = of_updates.shape[1]
    return timed.run(count, rows=by_update(program, of_updates, timed.num_steps(count))).step_ends[-1, :, 0]


def _elastic(method: Method, times_ns: Mapping[Kind, Sequence[int]], schedule: Any, run: int) -> Any:
    rule = method.elastic_rule
    assert rule is not None
    stragglers = Stragglers.of(schedule.straggler(run))
    begin, end = schedule.begin(run), schedule.begin(run + 1)
    of_run = [list(stragglers.factors(stage, end))[begin:] for stage in range(rule.num_stages)]
    factors = np.concatenate([np.ones((rule.num_stages, WARM_UP)), np.array(of_run)], axis=1)
    # Sends are part of a stage's step here as they are in the recurrence.
    times = {kind: list(times) for kind, times in times_ns.items()}
    for kind, with_it in (
        (Kind.SEND_ACTIVATION, Kind.FORWARD),
        (Kind.SEND_GRADIENT, Kind.UPDATE),
        (Kind.LOAD, Kind.FORWARD),
    ):
        for stage, time in enumerate(times.pop(kind, ())):
            times.setdefault(with_it, [0] * rule.num_stages)[stage] += time
    return run_elastic(rule, times, num_batches=factors.shape[1], factors=factors).update_ns[-1]
