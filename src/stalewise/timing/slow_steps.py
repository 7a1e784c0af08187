"""The slow steps of a run (`protocol.stragglers`) as costs and rows: the model meets the very steps the run meets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from stalewise.protocol.actions import COMPUTE, Kind
from stalewise.protocol.program import Program
from stalewise.protocol.stragglers import Slowing, Stragglers
from stalewise.protocol.trace import Span
from stalewise.timing.costs import StepCosts
from stalewise.timing.draws import Rows, by_update
from stalewise.timing.timetable import TimedProgram

__all__ = ["mean_slowing", "mean_times", "predicted_slow_down", "replica_of", "slow_steps", "step_factors"]

_TIMED = (*(kind for kind in Kind if kind in COMPUTE), Kind.LOAD, Kind.SEND_ACTIVATION, Kind.SEND_GRADIENT)

MODEL_UPDATES = 1000
"""Updates over which `predicted_slow_down` looks, at most."""


def mean_times(spans: Sequence[Sequence[Span]], windows: Sequence[tuple[int, int]]) -> dict[Kind, list[int]]:
    """What a step of each stage takes by kind of action, in nanoseconds: the mean over some of its updates.

    Args:
        spans: of each stage, in the order in which they ended.
        windows: half-open ranges of local updates; at least one update in all.

    Returns:
        For `StepCosts.of_kinds`; waits are left out.
    """
    total = {kind: [0] * len(spans) for kind in _TIMED}
    for stage, own in enumerate(spans):
        update = 0
        for span in own:
            if span.kind in total and any(first <= update < end for first, end in windows):
                total[span.kind][stage] += span.end_ns - span.start_ns
            update += span.kind is Kind.UPDATE
    steps = sum(end - first for first, end in windows)
    return {kind: [round(time / steps) for time in times] for kind, times in total.items() if any(times)}


def step_factors(spans: Sequence[Sequence[Span]], windows: Sequence[tuple[int, int]]) -> list[list[float]]:
    """How the steps of each stage vary: what each of some updates computed over their mean, in their order.

    Arguments as for `mean_times`.
    """
    factors = []
    for own in spans:
        times: dict[int, int] = {}
        update = 0
        for span in own:
            if span.kind in COMPUTE and any(first <= update < end for first, end in windows):
                times[update] = times.get(update, 0) + span.end_ns - span.start_ns
            update += span.kind is Kind.UPDATE
        mean = sum(times.values()) / len(times)
        factors.append([times[update] / mean for update in sorted(times)])
    return factors


def slow_steps(
    calm: StepCosts, program: Program, stragglers: Stragglers, first: int, end: int, *, replicas: int = 1
) -> tuple[StepCosts, Rows]:
    """Costs with a block of rows for each way in which a step is slow, and which block each update takes.

    Args:
        calm: tables of equally many rows V, mostly one.
        program: whose costs they are.
        stragglers: of the run.
        first: first local update.
        end: the one after the last.
        replicas: independent draws; see `replica_of`.

    Returns:
        The costs, in blocks of V rows: first as they are, then one way of being slow after another. And the block of
        each update, [stages, updates, replicas]; `timing.draws.by_update` makes local steps of updates.
    """
    kinds: dict[Slowing | None, int] = {None: 0}
    blocks = np.zeros((program.num_stages, end - first, replicas), np.int32)
    for replica in range(replicas):
        drawn = replica_of(stragglers, replica)
        for stage in range(program.num_stages):
            for update in range(first, end):
                slowing = drawn.slowing(stage, update)
                blocks[stage, update - first, replica] = kinds.setdefault(slowing, len(kinds))
    tables = []
    for table, steps in zip(calm.tables, program.stages, strict=True):
        computes = np.array([slot.kind in COMPUTE for slot in steps.slots])
        ways = []
        for slowing in kinds:
            way = table.copy()
            if slowing is not None:
                way[:, computes] = np.rint(way[:, computes] * slowing.factor)
                way[:, np.flatnonzero(computes)[0]] += round(slowing.pause_s * 1e9)
            ways.append(way)
        tables.append(np.concatenate(ways))
    return StepCosts(tuple(tables)), blocks


def replica_of(stragglers: Stragglers, replica: int) -> Stragglers:
    """The same with other draws; replica 0 is what an engine meets.

    Seeds move by their own spread, so that no rule of one replica draws what another rule of another one does.
    """
    seeds = [rule.seed for rule in stragglers.rules]
    stride = max(seeds, default=0) - min(seeds, default=0) + 1
    return Stragglers(tuple(replace(rule, seed=rule.seed + replica * stride) for rule in stragglers.rules))


def mean_slowing(stragglers: Stragglers, num_stages: int, first: int, end: int) -> float:
    """By how much the steps of all stages are longer in the mean, as a share: the floor that no method avoids."""
    factors = [list(stragglers.factors(stage, end))[first:] for stage in range(num_stages)]
    return sum(map(sum, factors)) / (num_stages * (end - first)) - 1


def predicted_slow_down(
    program: Program, times_ns: Mapping[Kind, Sequence[int]], stragglers: Stragglers, num_updates: int
) -> float:
    """Step time under the slow steps of a run over that without any, minus 1.

    Args:
        program: of the method.
        times_ns: of its calm steps, as `mean_times` gives them.
        stragglers: of the run.
        num_updates: of the run; the first `MODEL_UPDATES` of them count.
    """
    count = min(num_updates, MODEL_UPDATES)
    calm = StepCosts.of_kinds(program, times_ns)
    costs, of_updates = slow_steps(calm, program, stragglers, 0, count)
    timed = TimedProgram(program, costs)
    slow = timed.run(count, rows=by_update(program, of_updates, timed.num_steps(count)))
    quiet = TimedProgram(program, calm).run(count)
    return float(slow.step_ns[0] / quiet.step_ns[0] - 1)
