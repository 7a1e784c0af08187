"""A program with costs: its timetable over any number of batches, and its steady state.

timed = TimedProgram(method.program(), StepCosts.of_kinds(program, {Kind.FORWARD: 9_000_000, ...}))
timed.run(num_batches=100).total_ns
timed.cycle().step_ns
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from stalewise.errors import ConfigError
from stalewise.protocol.actions import COMPUTE, Kind
from stalewise.protocol.program import Program
from stalewise.protocol.trace import KIND_CODES, Trace
from stalewise.timing.costs import IntArray, Links, StepCosts
from stalewise.timing.cycle import Cycle, critical_cycle
from stalewise.timing.period import Period, period_of
from stalewise.timing.recurrence import compute_ends
from stalewise.timing.wavefront import levels_of

__all__ = ["TimedProgram", "Timetable"]

FloatArray = NDArray[np.float64]


class TimedProgram:
    """A program of fixed order with the costs of its actions and links.

    Args:
        program: of any method.
        costs: one table per stage, with a column per slot.
        links: None: messages cost nothing.

    Raises:
        ConfigError: where the costs do not fit the program.
        ProgramError: where messages do not fit each other, or the program deadlocks.
    """

    def __init__(self, program: Program, costs: StepCosts, links: Links | None = None) -> None:
        widths = [table.shape[1] for table in costs.tables]
        wanted = [len(stage.slots) for stage in program.stages]
        if widths != wanted:
            raise ConfigError(f"the costs have {widths} slots per stage and the program {wanted}; they must be equal.")
        self.program, self.costs = program, costs
        self.links = Links.equal(program.num_stages) if links is None else links
        self.period: Period = period_of(program, self.links)
        self._levels = levels_of(self.period)

    def num_steps(self, num_batches: int) -> int:
        """Local steps of a run, its drain included."""
        return num_batches + self.program.drain_steps

    def run(
        self, num_batches: int, *, rows: NDArray[np.integer] | None = None, record_actions: bool = False
    ) -> Timetable:
        """When everything ends in a run of `num_batches` batches that ends with a drain.

        Args:
            num_batches: N >= 1.
            rows: [stages, local steps, replicas], the row of its costs that each step takes, as `timing.draws` makes
                them; None: row 0 always, one replica.
            record_actions: keep the end of every action, which traces need.

        Raises:
            ConfigError: where there is no batch, or `rows` has another shape or names a row that is not there.
        """
        if num_batches < 1:
            raise ConfigError(f"num_batches is {num_batches}; there is nothing to time below 1.")
        if rows is not None:
            shape = (self.program.num_stages, self.num_steps(num_batches))
            most = min(map(len, self.costs.tables))
            if rows.shape[:2] != shape or not 0 <= rows.min() <= rows.max() < most:
                raise ConfigError(
                    f"rows has shape {rows.shape} and entries up to {rows.max()}; it must be (stages, steps, replicas) "
                    f"with {shape} first, and the costs have {most} rows."
                )
        ends = compute_ends(
            self.period,
            self._levels,
            self.costs,
            num_batches=num_batches,
            rows=rows,
            record_actions=record_actions,
        )
        return Timetable(self, num_batches, rows, ends.steps, ends.actions)

    def cycle(self) -> Cycle:
        """The cycle that sets the pace of the steady state, and its exact time per step.

        Raises:
            ConfigError: where steps are drawn from several rows: then there is no such cycle.
        """
        if self.costs.num_rows != 1:
            raise ConfigError(
                f"the costs have {self.costs.num_rows} rows; a maximum cycle mean needs constant costs. Give one "
                "row, such as costs.mean()."
            )
        return critical_cycle(self.period, tuple(table[0] for table in self.costs.tables))

    def describe(self, cycle: Cycle) -> str:
        """Who sets the pace, in words."""
        *others, last = [self.period.processors[index].name for index in sorted(set(cycle.processors))]
        if not others:
            return f"{last}: its own work fills every step"
        return f"{', '.join(others)} and {last} wait for each other in a cycle"


@dataclass(frozen=True, eq=False)
class Timetable:
    """When everything ends.

    Args:
        timed: what was run.
        num_batches: N.
        rows: that were drawn, or None.
        step_ends: [stages, local steps, replicas], nanoseconds since the first stage began.
        action_ends: [stages, local steps, slots, replicas], where they were recorded.
    """

    timed: TimedProgram
    num_batches: int
    rows: NDArray[np.integer] | None
    step_ends: IntArray
    action_ends: IntArray | None

    @property
    def replicas(self) -> int:
        """R."""
        return int(self.step_ends.shape[2])

    @property
    def total_ns(self) -> IntArray:
        """[replicas], until the last stage has drained."""
        total: IntArray = self.step_ends[:, -1].max(axis=0)
        return total

    @cached_property
    def window(self) -> tuple[int, int]:
        """The local steps between whose ends step times are taken: the last nine tenths before the drain."""
        end = self.num_batches - 1
        return min(max(self.num_batches // 10, self.timed.program.max_lag), end // 2), end

    @cached_property
    def step_ns(self) -> FloatArray:
        """[replicas], mean time of a local step of the last stage in the window; of a single batch, its whole time.

        The last stage neither runs ahead nor drains, and in the long run all stages have one pace.
        """
        begin, end = self.window
        if begin == end:
            return self.total_ns.astype(np.float64)
        return np.asarray((self.step_ends[-1, end] - self.step_ends[-1, begin]) / (end - begin), np.float64)

    @property
    def utilisation(self) -> FloatArray:
        """[stages, replicas], the part of the window's steps in which each stage computes."""
        begin, end = self.window
        busy = np.zeros((len(self.step_ends), self.replicas))
        for stage, (table, steps) in enumerate(zip(self.timed.costs.tables, self.timed.program.stages, strict=True)):
            group = steps.policy.accumulate
            weights = [(slot.kind in COMPUTE) / (group if slot.kind is Kind.UPDATE else 1) for slot in steps.slots]
            compute = table @ np.array(weights)
            chosen = slice(min(begin + 1, end), end + 1)
            drawn = compute[:1, None] if self.rows is None else compute[self.rows[stage, chosen]]
            busy[stage] = drawn.mean(axis=0)
        with np.errstate(invalid="ignore"):
            return np.asarray(busy / self.step_ns, np.float64)

    def traces(self, replica: int = 0) -> list[Trace]:
        """The records that a run with these times would leave, one trace per stage.

        Raises:
            ConfigError: where the ends of actions were not recorded.
        """
        if self.action_ends is None:
            raise ConfigError("only step ends were kept; run with record_actions=True to have traces.")
        program = self.timed.program
        traces = []
        for stage, steps in enumerate(program.stages):
            width = len(steps.slots)
            ends = self.action_ends[stage, :, :width, replica].reshape(-1)
            begins = np.concatenate(([0], ends[:-1]))
            kinds = np.tile([KIND_CODES.index(slot.kind) for slot in steps.slots], len(ends) // width)
            acts, batches = self._acting(stage)
            columns = {"kind": kinds[acts], "batch": batches[acts], "start_ns": begins[acts], "end_ns": ends[acts]}
            traces.append(Trace.from_columns(stage, {name: column.tolist() for name, column in columns.items()}))
        return traces

    def _acting(self, stage: int) -> tuple[NDArray[np.bool_], IntArray]:
        """Which slots of which steps act, in the order of the stage; and the batch that each record names.

        An update's record names the batch last acted on.
        """
        program = self.timed.program.stages[stage]
        places = {(slot.kind, slot.lag, slot.micro_batch): place for place, slot in enumerate(program.slots)}
        steps = self.timed.num_steps(self.num_batches)
        acts = np.zeros((steps, len(program.slots)), np.bool_)
        batches = np.full((steps, len(program.slots)), -1, np.int64)
        last = -1
        for step in range(steps):
            for action in program.step(step, self.num_batches):
                if action.batch is None:
                    place = next(index for index, slot in enumerate(program.slots) if slot.kind is Kind.UPDATE)
                else:
                    place = places[action.kind, step - action.batch, action.micro_batch]
                    last = action.batch
                acts[step, place], batches[step, place] = True, last
        return acts.reshape(-1), batches.reshape(-1)
