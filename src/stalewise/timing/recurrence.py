"""The max-plus recurrence: when every action of a run ends, exactly.

    begin of an action = the end of the one before on its stage, or for a receive its message's arrival if that is later
    end                = begin + its cost
    arrival            = end of the send + latency

Values are int64 nanoseconds, [stages of a level, replicas] at a time (`timing.wavefront`). Messages wait in rings that
are as long as a message can possibly wait, so memory is that of one period unless ends are recorded.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby

import numpy as np
from numpy.typing import NDArray

from stalewise.protocol.actions import Kind
from stalewise.timing.costs import IntArray, StepCosts
from stalewise.timing.period import Period
from stalewise.timing.wavefront import Levels

__all__ = ["Ends", "compute_ends"]


@dataclass(frozen=True, eq=False)
class Ends:
    """When things end, in nanoseconds since the first stage began.

    Args:
        steps: [stages, local steps, replicas], the end of each local step.
        actions: [stages, local steps, slots, replicas], the end of each slot, where that was asked for; a silent slot
            ends where the one before does, and so do the slots that pad stages with fewer.
    """

    steps: IntArray
    actions: IntArray | None


def compute_ends(
    period: Period,
    levels: Levels,
    costs: StepCosts,
    *,
    num_batches: int,
    rows: NDArray[np.integer] | None = None,
    record_actions: bool = False,
) -> Ends:
    """Run a program for `num_batches` batches and its drain.

    Args:
        period: the graph.
        levels: its order of computation.
        costs: of the stages.
        num_batches: N >= 1.
        rows: [stages, local steps, replicas], which row of its table each step costs; None: row 0, one replica.
        record_actions: whether to keep the end of every action, too.
    """
    run = _Run(period, levels, costs, num_batches, rows, record_actions)
    groups = [run.group(list(members)) for _, members in groupby(sorted(run.keys()), key=lambda entry: entry[:-2])]
    by_residue: list[list[_Group]] = [[] for _ in range(levels.stride)]
    for group in groups:
        by_residue[int(group.offsets[0]) % levels.stride].append(group)
    last = int(levels.offsets.max()) + levels.stride * (run.num_steps - 1)
    for level in range(last + 1):
        for group in by_residue[level % levels.stride]:
            group.compute(level)
    return Ends(run.finish, run.actions)


class _Run:
    """The state that all groups of segments share."""

    def __init__(
        self,
        period: Period,
        levels: Levels,
        costs: StepCosts,
        num_batches: int,
        rows: NDArray[np.integer] | None,
        record_actions: bool,
    ) -> None:
        stages = period.program.num_stages
        self.period, self.levels, self.num_batches, self.rows = period, levels, num_batches, rows
        self.num_steps = num_batches + period.program.drain_steps
        self.replicas = 1 if rows is None else rows.shape[2]
        self.most_slots = max(len(processor.slots) for processor in period.processors)
        self.tables = np.zeros((stages, costs.num_rows, self.most_slots), np.int64)
        for stage, table in enumerate(costs.tables):
            self.tables[stage, : len(table), : table.shape[1]] = table
        self.now = np.zeros((len(period.processors), self.replicas), np.int64)
        self.finish = np.zeros((stages, self.num_steps, self.replicas), np.int64)
        self.actions = None
        if record_actions:
            self.actions = np.zeros((stages, self.num_steps, self.most_slots, self.replicas), np.int64)
        waits = [number for number, part in enumerate(period.segments) if part.source is not None]
        self.inbox = {number: channel for channel, number in enumerate(waits)}
        self.outbox = {
            (period.segments[part.source].processor, part.source_slot): self.inbox[number]
            for number, part in enumerate(period.segments)
            if part.source is not None
        }
        self.depth = self._ring_depth(waits)
        self.ring = np.zeros((max(len(waits), 1) * self.depth, self.replicas), np.int64)

    def _ring_depth(self, waits: list[int]) -> int:
        """Batches of one message that may be sent before the first of them is taken, as a power of two."""
        depth = 1
        for number in waits:
            part = self.period.segments[number]
            assert part.source is not None
            apart = self.levels.offsets[number] - self.levels.offsets[part.source]
            apart += self.levels.stride * part.source_steps
            depth = max(depth, int(apart) // self.levels.stride + 1)
        return 1 << (depth - 1).bit_length()

    def keys(self) -> list[tuple[int, ...]]:
        """Per segment what those that are computed together have in common, then its level and its number."""
        keys: list[tuple[int, ...]] = []
        for number, part in enumerate(self.period.segments):
            owner = self.period.processors[part.processor]
            sends = [int((part.processor, place) in self.outbox) for place in range(part.begin, part.end)]
            sent = int("1" + "".join(map(str, sends)), 2)
            closes = part.end == len(owner.slots)
            updates = [
                place - part.begin for place in range(part.begin, part.end) if owner.slots[place].kind is Kind.UPDATE
            ]
            offset = int(self.levels.offsets[number])
            keys.append(
                (
                    offset % self.levels.stride,
                    int(owner.stage is None),
                    int(part.source is not None),
                    sent,
                    int(closes),
                    owner.accumulate,
                    updates[0] if updates else -1,
                    offset,
                    number,
                )
            )
        return keys

    def group(self, members: list[tuple[int, ...]]) -> _Group:
        """The segments of one key, in the order of their levels."""
        return _Group(self, [key[-1] for key in members], update=members[0][-3], closes=bool(members[0][-5]))


class _Group:
    """Segments of one shape whose levels coincide."""

    def __init__(self, run: _Run, numbers: list[int], *, update: int, closes: bool) -> None:
        parts = [run.period.segments[number] for number in numbers]
        owners = [run.period.processors[part.processor] for part in parts]
        width = parts[0].end - parts[0].begin
        self._run, self._update, self._closes = run, update, closes
        self._accumulate = owners[0].accumulate
        self.offsets = run.levels.offsets[numbers]
        self._processors = np.array([part.processor for part in parts])
        self._begins = np.array([part.begin for part in parts])
        self._lags = np.array(
            [
                [slot.lag for slot in owner.slots[part.begin : part.end]]
                for owner, part in zip(owners, parts, strict=True)
            ]
        )
        self._inbox = np.array([run.inbox.get(number, -1) for number in numbers]) * run.depth
        self._waits = parts[0].source is not None
        self._latency = np.array([part.latency_ns for part in parts])[:, None]
        self._outbox = [
            np.array([run.outbox[part.processor, part.begin + place] for part in parts]) * run.depth
            if (parts[0].processor, parts[0].begin + place) in run.outbox
            else None
            for place in range(width)
        ]
        self._of_stages = owners[0].stage is not None
        self._drawn = self._of_stages and run.rows is not None
        self._places = self._begins[:, None] + np.arange(width)
        fixed = [
            run.tables[owner.stage, 0, part.begin : part.end]
            if owner.stage is not None
            else np.array((owner.transfers_ns or ())[part.begin : part.end], np.int64)
            for owner, part in zip(owners, parts, strict=True)
        ]
        self._costs = np.array(fixed, np.int64)
        self._until = np.cumsum(self._costs, axis=1)
        exists_from = self.offsets[:, None] + run.levels.stride * self._lags
        self._steady = range(int(exists_from.max()), int(exists_from.min()) + run.levels.stride * run.num_batches)
        self._fast = not self._drawn and self._accumulate == 1 and run.actions is None

    def compute(self, level: int) -> None:
        """All segments of the group whose local step has this level."""
        if level in self._steady and self._fast:
            self._compute_steady(level)
            return
        stride = self._run.levels.stride
        begin = int(np.searchsorted(self.offsets, level - stride * self._run.num_steps, side="right"))
        end = int(np.searchsorted(self.offsets, level, side="right"))
        if begin < end:
            self._compute_slots(slice(begin, end), (level - self.offsets[begin:end]) // stride)

    def _compute_steady(self, level: int) -> None:
        """Every slot acts, and costs what it always does."""
        run = self._run
        steps = (level - self.offsets) // run.levels.stride
        time = run.now[self._processors]
        if self._waits:
            places = self._inbox + ((steps - self._lags[:, 0]) & (run.depth - 1))
            np.maximum(time, run.ring[places] + self._latency, out=time)
        for place, outbox in enumerate(self._outbox):
            if outbox is not None:
                run.ring[outbox + ((steps - self._lags[:, place]) & (run.depth - 1))] = (
                    time + self._until[:, place, None]
                )
        time += self._until[:, -1:]
        run.now[self._processors] = time
        if self._closes and self._of_stages:
            run.finish[self._processors, steps] = time

    def _compute_slots(self, chosen: slice, steps: IntArray) -> None:
        """Slot by slot, each only where its batch exists."""
        run = self._run
        processors, lags = self._processors[chosen], self._lags[chosen]
        time = run.now[processors]
        drawn = run.rows[processors, steps] if self._drawn and run.rows is not None else None
        for place, outbox in enumerate(self._outbox):
            batches = steps - lags[:, place]
            exists = (batches >= 0) & (batches < run.num_batches)
            if place == 0 and self._waits:
                arrival = run.ring[self._inbox[chosen] + (batches & (run.depth - 1))] + self._latency[chosen]
                time = np.where(exists[:, None], np.maximum(time, arrival), time)
            if place == self._update and self._accumulate > 1:
                exists = self._updates(exists, batches, steps)
            if drawn is None:
                cost = self._costs[chosen, place, None]
            else:
                cost = run.tables[processors[:, None], drawn, self._places[chosen, place, None]]
            time = time + cost * exists[:, None]
            if outbox is not None:
                sent = outbox[chosen] + (batches & (run.depth - 1))
                run.ring[sent[exists]] = time[exists]
            if run.actions is not None and self._of_stages:
                run.actions[processors, steps, self._places[chosen, place]] = time
        run.now[processors] = time
        if self._closes and self._of_stages:
            run.finish[processors, steps] = time
            if run.actions is not None:
                width = int(self._places[0, -1]) + 1
                run.actions[processors, steps, width:] = time[:, None]

    def _updates(self, exists: NDArray[np.bool_], batches: IntArray, steps: IntArray) -> NDArray[np.bool_]:
        """Where gradients accumulate: an update after each full group, and after the last batch for the remainder."""
        num_batches = self._run.num_batches
        acts: NDArray[np.bool_] = exists & ((batches + 1) % self._accumulate == 0)
        if num_batches % self._accumulate:
            acts = acts | (steps == np.maximum(num_batches - 1 + steps - batches, num_batches))
        return acts
