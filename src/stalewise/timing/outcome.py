"""A question to the model and its answer: how fast is this method with these costs?"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stalewise.protocol.numbers import check_count
from stalewise.protocol.program import Program
from stalewise.protocol.stragglers import NO_STRAGGLERS, Stragglers
from stalewise.protocol.trace import Trace
from stalewise.timing.costs import Links, StepCosts
from stalewise.timing.draws import by_update, draw_rows
from stalewise.timing.slow_steps import slow_steps
from stalewise.timing.timetable import TimedProgram, Timetable

__all__ = ["Outcome", "half_interval", "simulate"]

MOST_BATCHES = 10**9
"""So many steps fit into no memory."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Outcome:
    """What was found.

    Args:
        timetable: of all replicas.
        calm_step_ns: exact steady step time with the mean of the given costs and no slow step.
        bottleneck: who sets the pace then, in words.
    """

    timetable: Timetable
    calm_step_ns: float
    bottleneck: str

    @property
    def step_s(self) -> float:
        """Mean over replicas."""
        return float(self.timetable.step_ns.mean()) * 1e-9

    @property
    def step_interval_s(self) -> float | None:
        """Half of the 95% confidence interval of the mean; None with one replica."""
        return half_interval(self.timetable.step_ns * 1e-9)

    @property
    def utilisation(self) -> list[float]:
        """Per stage, the mean over replicas; 0 where nothing takes any time."""
        return [float(value) for value in np.nan_to_num(self.timetable.utilisation).mean(axis=1)]

    @property
    def slow_down(self) -> float:
        """Mean step time over the calm one, less 1."""
        return self.step_s * 1e9 / self.calm_step_ns - 1 if self.calm_step_ns else 0.0

    def traces(self) -> list[Trace]:
        """Of the first replica."""
        return self.timetable.traces(0)

    def as_dict(self) -> dict[str, Any]:
        """JSON values; times in seconds."""
        return {
            "batches": self.timetable.num_batches,
            "replicas": self.timetable.replicas,
            "step_s": self.step_s,
            "step_interval_s": self.step_interval_s,
            "batches_per_s": 1 / self.step_s if self.step_s else None,
            "total_s": float(self.timetable.total_ns.mean()) * 1e-9,
            "calm_step_s": self.calm_step_ns * 1e-9,
            "slow_down": self.slow_down,
            "utilisation": self.utilisation,
            "bottleneck": self.bottleneck,
        }


def simulate(
    program: Program,
    costs: StepCosts,
    links: Links | None = None,
    *,
    num_batches: int,
    stragglers: Stragglers = NO_STRAGGLERS,
    replicas: int = 1,
    seed: int = 0,
    record_actions: bool = False,
) -> Outcome:
    """Time a program.

    Args:
        program: of any method.
        costs: where tables have several rows, each step takes one of them at random.
        links: None: messages cost nothing.
        num_batches: N.
        stragglers: slow steps; replica 0 meets those that an engine would.
        replicas: independent runs; they differ only where something is random.
        seed: of the rows.
        record_actions: keep every action, for `Outcome.traces`.

    Raises:
        ConfigError: where values do not fit each other.
    """
    for name, value, least, most in (
        ("num_batches", num_batches, 1, MOST_BATCHES),
        ("replicas", replicas, 1, 10**6),
        ("seed", seed, 0, 2**64 - 1),
    ):
        check_count(name, value, least, most=most)
    calm = TimedProgram(program, costs.mean(), links)
    cycle = calm.cycle()
    num_steps = calm.num_steps(num_batches)
    rows: NDArray[np.int32] | None = None
    drawn = costs
    if costs.num_rows > 1:
        length = min(map(len, costs.tables))
        drawn = StepCosts(tuple(table[:length] for table in costs.tables))
        rows = draw_rows(program.num_stages, num_steps, length, replicas=replicas, seed=seed)
    if stragglers:
        stragglers.check_stages(program.num_stages)
        least = min(stage.backward_lag for stage in program.stages)
        length = drawn.num_rows
        drawn, blocks = slow_steps(drawn, program, stragglers, 0, num_steps - least, replicas=replicas)
        slow = length * by_update(program, blocks, num_steps)
        rows = slow if rows is None else rows + slow
    timed = TimedProgram(program, drawn, links)
    timetable = timed.run(num_batches, rows=rows, record_actions=record_actions)
    return Outcome(timetable=timetable, calm_step_ns=float(cycle.step_ns), bottleneck=calm.describe(cycle))


def half_interval(values: NDArray[np.float64]) -> float | None:
    """Half of the 95% confidence interval of the mean of independent values (Student's t); None for fewer than two."""
    freedom = len(values) - 1
    if freedom < 1:
        return None
    # Cornish and Fisher's expansion of the quantile of t around that of the normal distribution, and its exact values
    # where that is too coarse.
    normal = 1.959964
    expanded = (
        normal
        + (normal**3 + normal) / (4 * freedom)
        + (5 * normal**5 + 16 * normal**3 + 3 * normal) / (96 * freedom**2)
    )
    quantile = {1: 12.7062, 2: 4.3027, 3: 3.1824}.get(freedom, expanded)
    return float(quantile * np.std(values, ddof=1) / math.sqrt(len(values)))
