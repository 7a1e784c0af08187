"""What the analytic model says of a row of `stragglers.py`: durations from its calm steps, and the same slow steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from stalewise.methods import Method
from stalewise.protocol.actions import Kind
from stalewise.protocol.stragglers import Stragglers
from stalewise.timing.costs import StepCosts
from stalewise.timing.draws import by_update
from stalewise.timing.slow_steps import slow_steps
from stalewise.timing.timetable import TimedProgram

__all__ = ["predicted_windows"]

WARM_UP = 16
"""Calm updates before a run, in the model, in which the pipeline fills."""


def predicted_windows(method: Method, times_ns: Mapping[Kind, Sequence[int]], schedule: Any) -> list[float]:
    """Seconds per step of the last stage in each window of a `stragglers.Schedule`; each run is timed on its own."""
    program = method.program()
    calm = StepCosts.of_kinds(program, times_ns)
    steps = []
    for run in range(len(schedule.runs)):
        begin, end = schedule.begin(run), schedule.begin(run + 1)
        rule = schedule.straggler(run)
        costs, rows = slow_steps(calm, program, Stragglers.of(rule), begin, end)
        of_updates = np.concatenate([np.zeros((program.num_stages, WARM_UP, 1), np.int16), rows], axis=1)
        timed = TimedProgram(program, costs)
        count = of_updates.shape[1]
        table = timed.run(count, rows=by_update(program, of_updates, timed.num_steps(count)))
        first, last = (WARM_UP + update - begin - 1 for update in schedule.window(run))
        time_ns = table.step_ends[-1, last, 0] - table.step_ends[-1, first, 0]
        steps.append(float(time_ns) / (last - first) / 1e9)
    return steps
