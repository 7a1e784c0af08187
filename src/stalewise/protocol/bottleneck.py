"""Which stage or link sets the pace now, since when, by how much, and what the others lose to it.

Every stage says of its last steps how long it computed and waited (`StepRecord`). Over the last `WINDOW` of them:

    compute_k    median time that stage k computes in a step
    step         median time from update to update of the slowest stage

    a stage  limits, if it computes at least 10% longer than any other, and for most of its step (not asked where links
             have no slack: there stages wait by construction, and the slowest one still costs the most)
    loader   limits, if stage 0 waits for data most
    link     limits, if no stage computes for most of its step: the one whose ends wait longest for each other
    nothing  limits alone in all other cases: the stages are even

A change is told once it has held for half a window of new steps, so that a short spell is not told at all.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from statistics import median
from typing import Any, Literal, NamedTuple

__all__ = ["WINDOW", "Bottleneck", "BottleneckWatch", "StepRecord"]

WINDOW = 12
"""Steps of a stage that are looked at."""
UNEVEN = 1.1
MOSTLY = 0.75
CHANGED = 1.25
"""A bottleneck that became so much worse or better is told again."""
_KEPT = 512

Kind = Literal["compute", "link", "loader"]


class StepRecord(NamedTuple):
    """A step of a stage: everything after one update up to the next; times in nanoseconds."""

    update: int
    compute_ns: int
    load_ns: int
    activation_wait_ns: int
    gradient_wait_ns: int
    end_ns: int

    @property
    def wait_ns(self) -> int:
        """For messages and for data."""
        return self.load_ns + self.activation_wait_ns + self.gradient_wait_ns


@dataclass(frozen=True, kw_only=True)
class Bottleneck:
    """What sets the pace.

    Args:
        kind: "compute": the stage itself; "link": messages between it and the stage after; "loader": the data.
        stage: the stage; of a link the one above it.
        factor: its computing over that of the next slowest stage; of a link or loader the step over the longest
            computing of all stages.
        step_s: what a step takes now.
        since_update: local update of the stage from which on it is so, as far as known.
        since_ns: when that step began, on the clock of the stages.
        update: local update of the stage when this was told.
        waits: of each stage, the part of its time in which it waits.
    """

    kind: Kind
    stage: int
    factor: float
    step_s: float
    since_update: int
    since_ns: int
    update: int
    waits: tuple[float, ...]

    def as_dict(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Bottleneck | None:
        """What a `bottleneck` line of metrics.jsonl says; None where nothing limits alone any more."""
        if record.get("kind") is None:
            return None
        values = {name: record[name] for name in (entry.name for entry in fields(cls))}
        return cls(**{**values, "waits": tuple(values["waits"])})

    @property
    def where(self) -> str:
        """`"stage 1"`, `"link 1 -> 2"` or `"the data loader"`."""
        if self.kind == "link":
            return f"link {self.stage} -> {self.stage + 1}"
        return f"stage {self.stage}" if self.kind == "compute" else "the data loader"

    def sentence(self) -> str:
        """For people."""
        if self.kind == "compute":
            how = f"it computes {self.factor:.2f} times as long as the next slowest stage"
        else:
            how = f"a step takes {self.factor:.2f} times as long as any stage computes"
        others = ", ".join(
            f"stage {stage} {100 * share:.0f}%"
            for stage, share in enumerate(self.waits)
            if self.kind != "compute" or stage != self.stage
        )
        return f"{self.where} limits the pace since update {self.since_update}: {how}; waiting: {others}"


class BottleneckWatch:
    """Learns from statuses while a run goes on.

    Args:
        num_stages: K.
        locked: whether stages wait for each other by construction: a link without slack, or all stages in one process.

    Attributes:
        current: what was told last; None where nothing limits alone.
    """

    def __init__(self, num_stages: int, *, locked: bool) -> None:
        self.current: Bottleneck | None = None
        self._locked = locked
        self._steps: list[deque[StepRecord]] = [deque(maxlen=_KEPT) for _ in range(num_stages)]
        self._candidate: tuple[str, int] | None = None
        self._since = 0

    def update(self, statuses: Sequence[Mapping[str, Any]]) -> bool:
        """Take the statuses of the stages, each with its last `steps`; returns whether `current` is another now."""
        news = False
        for status in statuses:
            known = self._steps[status["stage"]]
            newest = known[-1].update if known else -1
            for step in status.get("steps", ()):
                if step[0] > newest:
                    known.append(StepRecord(*step))
                    news = True
        if not news or any(len(steps) < WINDOW for steps in self._steps):
            return False
        found = self._look()
        candidate = None if found is None else (found.kind, found.stage)
        newest = min(steps[-1].update for steps in self._steps)
        if candidate != self._candidate or not self._differs(found):
            self._candidate, self._since = candidate, newest
        if newest - self._since < WINDOW // 2:
            return False
        self.current = found
        return True

    def _differs(self, found: Bottleneck | None) -> bool:
        if found is None or self.current is None:
            return found is not self.current
        ratio = found.factor / self.current.factor
        same = (found.kind, found.stage) == (self.current.kind, self.current.stage)
        return not same or not 1 / CHANGED < ratio < CHANGED

    def _look(self) -> Bottleneck | None:
        last = [list(steps)[-WINDOW:] for steps in self._steps]
        compute = [median(step.compute_ns for step in steps) for steps in last]
        slowest = max(range(len(compute)), key=compute.__getitem__)
        others = [time for stage, time in enumerate(compute) if stage != slowest]
        second = max(others, default=0)
        step_ns = _step_ns(last[slowest])
        if self._locked or compute[slowest] >= MOSTLY * step_ns:
            if second == 0 or compute[slowest] < UNEVEN * second:
                return None
            return self._told("compute", slowest, compute[slowest] / second, step_ns, last, (compute[slowest], second))
        load = median(step.load_ns for step in last[0])
        waits = [
            median(step.gradient_wait_ns for step in above) + median(step.activation_wait_ns for step in below)
            for above, below in pairwise(last)
        ]
        factor = step_ns / max(compute[slowest], 1)
        if load >= max(waits, default=0):
            return self._told("loader", 0, factor, step_ns, last, None)
        return self._told("link", max(range(len(waits)), key=waits.__getitem__), factor, step_ns, last, None)

    def _told(
        self,
        kind: Kind,
        stage: int,
        factor: float,
        step_ns: float,
        last: Sequence[Sequence[StepRecord]],
        levels: tuple[float, float] | None,
    ) -> Bottleneck:
        since = self._since_when(stage, levels)
        return Bottleneck(
            kind=kind,
            stage=stage,
            factor=factor,
            step_s=step_ns / 1e9,
            since_update=since.update,
            since_ns=since.end_ns - since.compute_ns - since.wait_ns,
            update=self._steps[stage][-1].update,
            waits=tuple(min(1.0, median(step.wait_ns for step in steps) / max(_step_ns(steps), 1)) for steps in last),
        )

    def _since_when(self, stage: int, levels: tuple[float, float] | None) -> StepRecord:
        """The first of the last steps that are slow without a break; one quick step is no break."""
        steps = self._steps[stage]
        if levels is None:
            return steps[-WINDOW]
        limit = (levels[0] + levels[1]) / 2
        first, quick = steps[-1], 0
        for step in reversed(steps):
            if step.compute_ns >= limit:
                first, quick = step, 0
            elif quick:
                break
            else:
                quick = 1
        return first


def _step_ns(steps: Sequence[StepRecord]) -> float:
    return median(after.end_ns - before.end_ns for before, after in pairwise(steps))
