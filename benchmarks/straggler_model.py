"""What the model says of a row of `straggler_rounds`: times and jitter from its calm steps, and the same slow steps.

The steps of a real machine vary, and a shallow pipeline pays for that in the calm already. So each step takes what some
calm step took, one after another as they were, on all stages from the same one on; means over several beginnings.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stalewise.methods import Method
from stalewise.protocol.actions import Kind
from stalewise.protocol.stragglers import Stragglers
from stalewise.protocol.trace import Span
from stalewise.timing.costs import StepCosts
from stalewise.timing.draws import by_update, varied
from stalewise.timing.elastic import run_elastic
from stalewise.timing.slow_steps import mean_times, slow_steps, step_factors
from stalewise.timing.timetable import TimedProgram

__all__ = ["predicted_windows"]

WARM_UP = 16
"""Updates before a run, in the model, in which the pipeline fills."""
BEGINNINGS = 8

Times = Mapping[Kind, Sequence[int]]


def predicted_windows(
    method: Method, spans: Sequence[Sequence[Span]], calm: Sequence[tuple[int, int]], schedule: Any
) -> list[float]:
    """Seconds per step of the last stage in each window of a `Schedule`; each run is timed on its own.

    Args:
        method: of the row.
        spans: of each stage.
        calm: half-open ranges of local updates whose steps are not slow.
        schedule: of the slow steps.
    """
    predict = _fixed if method.elastic_rule is None else _elastic
    times, factors = mean_times(spans, calm), np.array(step_factors(spans, calm))
    steps = []
    for run in range(len(schedule.runs)):
        first, last = (WARM_UP + update - schedule.begin(run) - 1 for update in schedule.window(run))
        count = WARM_UP + schedule.steps
        starts = np.linspace(0, factors.shape[1], BEGINNINGS, endpoint=False).astype(np.int32)
        of_calm = (np.arange(count, dtype=np.int32)[:, None] + starts) % factors.shape[1]
        ends = predict(method, times, factors, of_calm, schedule, run)
        steps.append(float(np.mean(ends[last] - ends[first])) / (last - first) / 1e9)
    return steps


def _fixed(
    method: Method, times_ns: Times, factors: NDArray[np.float64], of_calm: NDArray[np.int32], schedule: Any, run: int
) -> Any:
    """When each step of the last stage ends, in ns, [steps, beginnings]."""
    program = method.program()
    calm = varied(StepCosts.of_kinds(program, times_ns), program, factors.tolist())
    slow = Stragglers.of(schedule.straggler(run))
    costs, blocks = slow_steps(calm, program, slow, schedule.begin(run), schedule.begin(run + 1))
    blocks = np.concatenate([np.zeros((program.num_stages, WARM_UP, 1), np.int32), blocks], axis=1)
    rows = blocks * factors.shape[1] + of_calm
    timed = TimedProgram(program, costs)
    count = rows.shape[1]
    return timed.run(count, rows=by_update(program, rows, timed.num_steps(count))).step_ends[-1]


def _elastic(
    method: Method, times_ns: Times, factors: NDArray[np.float64], of_calm: NDArray[np.int32], schedule: Any, run: int
) -> Any:
    rule = method.elastic_rule
    assert rule is not None
    stragglers = Stragglers.of(schedule.straggler(run))
    begin, end = schedule.begin(run), schedule.begin(run + 1)
    of_run = [list(stragglers.factors(stage, end))[begin:] for stage in range(rule.num_stages)]
    slow = np.concatenate([np.ones((rule.num_stages, WARM_UP)), np.array(of_run)], axis=1)
    # Sends are part of a stage's step here as they are in the recurrence.
    times = {kind: list(times) for kind, times in times_ns.items()}
    for kind, with_it in (
        (Kind.SEND_ACTIVATION, Kind.FORWARD),
        (Kind.SEND_GRADIENT, Kind.UPDATE),
        (Kind.LOAD, Kind.FORWARD),
    ):
        for stage, time in enumerate(times.pop(kind, ())):
            times.setdefault(with_it, [0] * rule.num_stages)[stage] += time
    ends = [
        run_elastic(rule, times, num_batches=slow.shape[1], factors=slow * factors[:, steps]).update_ns[-1]
        for steps in of_calm.T
    ]
    return np.stack(ends, axis=1)
