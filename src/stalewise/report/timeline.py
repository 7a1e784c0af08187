"""What the stages did and when: shares of time, waits, step times, the bottleneck.

Every number is taken over a *window* of the run, and every instant of a stage's window belongs to exactly one
`Activity`, so that the shares of a stage sum to one:

    stage 0   | F7 |S| R3 |..wait..|   B3   |U|  |
              └─ window: from the end of one U to the end of a later one ─┘

    utilisation   share of the window in which the stage computes (F, R, B or U)
    bubble        1 - utilisation: waits, sends, and time that no record covers
    wait          share in a RECV or LOAD record while the stage computes nothing and sends nothing
    step time     interval between the ends of consecutive updates
    bottleneck    the stage that computes longest in a step (utilisation x step time): it sets the pace of all.
                  In an endless steady state all steps last equally long, and it is the busiest stage as well

Where records overlap (a recompute beside a forward, a receive in the background) the instant counts once, for
the first activity in the order of `Activity`.
"""

from __future__ import annotations

import enum
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from stalewise.errors import ConfigError
from stalewise.protocol.actions import COMPUTE, Kind
from stalewise.protocol.trace import KIND_CODES, Trace

__all__ = ["Activity", "StageSpans", "StageUsage", "Timeline", "Usage", "Window"]

IntArray: TypeAlias = NDArray[np.int64]
BoolArray: TypeAlias = NDArray[np.bool_]

_COLUMNS = ("kind", "batch", "start_ns", "end_ns")
_CODE_OF = {kind: code for code, kind in enumerate(KIND_CODES)}


class Activity(enum.Enum):
    """What a stage does with an instant; earlier members win where records overlap."""

    BACKWARD = "backward"
    RECOMPUTE = "recompute"
    FORWARD = "forward"
    UPDATE = "update"
    SYNTHESIZE = "synthesize"
    SEND = "send"
    WAIT_ACTIVATION = "wait for an activation"
    WAIT_GRADIENT = "wait for a gradient"
    WAIT_LOADER = "wait for the loader"
    UNRECORDED = "not recorded"

    @classmethod
    def of(cls, kind: Kind) -> Activity:
        """The activity that a record of this kind counts for."""
        return _ACTIVITY_OF[kind]

    @property
    def is_wait(self) -> bool:
        """Whether the stage waits for something to arrive."""
        return self in (Activity.WAIT_ACTIVATION, Activity.WAIT_GRADIENT, Activity.WAIT_LOADER)


_ACTIVITY_OF = {
    Kind.LOAD: Activity.WAIT_LOADER,
    Kind.RECEIVE_ACTIVATION: Activity.WAIT_ACTIVATION,
    Kind.FORWARD: Activity.FORWARD,
    Kind.SEND_ACTIVATION: Activity.SEND,
    Kind.RECOMPUTE: Activity.RECOMPUTE,
    Kind.RECEIVE_GRADIENT: Activity.WAIT_GRADIENT,
    Kind.BACKWARD: Activity.BACKWARD,
    Kind.SEND_GRADIENT: Activity.SEND,
    Kind.UPDATE: Activity.UPDATE,
    Kind.SYNTHESIZE: Activity.SYNTHESIZE,
    Kind.TRAIN_SYNTHESIZER: Activity.SYNTHESIZE,
    Kind.SEND_TOKEN: Activity.SEND,
    # The token says that the last stage has forwarded the batch before: forward locking.
    Kind.RECEIVE_TOKEN: Activity.WAIT_ACTIVATION,
    Kind.SEND_LOSS: Activity.SEND,
    Kind.RECEIVE_LOSS: Activity.WAIT_GRADIENT,
}
_COMPUTE = tuple(activity for activity in Activity if any(_ACTIVITY_OF[kind] is activity for kind in COMPUTE))


@dataclass(frozen=True, eq=False)
class StageSpans:
    """The records of one stage as equally long columns, in the order of their start.

    Args:
        stage: index of the stage.
        kind: codes into `protocol.trace.KIND_CODES`.
        batch: index over the whole run; -1 where there is none.
        start_ns: start, on the clock that all stages share.
        end_ns: end, on the same clock.
    """

    stage: int
    kind: IntArray
    batch: IntArray
    start_ns: IntArray
    end_ns: IntArray

    def __len__(self) -> int:
        return len(self.kind)

    def only(self, *kinds: Kind) -> StageSpans:
        """The records of these kinds."""
        return self.where(np.isin(self.kind, [_CODE_OF[kind] for kind in kinds]))

    def within(self, window: Window) -> StageSpans:
        """The records that share some time with the window, at their full length."""
        return self.where((self.end_ns > window.start_ns) & (self.start_ns < window.end_ns))

    def where(self, mask: BoolArray) -> StageSpans:
        """The records at which `mask` is true."""
        columns = (column[mask] for column in (self.kind, self.batch, self.start_ns, self.end_ns))
        return StageSpans(self.stage, *columns)


@dataclass(frozen=True, kw_only=True)
class Window:
    """A part of the run.

    Args:
        start_ns: its start, on the clock of the records.
        end_ns: its end.
        num_steps: local steps of the first stage in it; 0 where it was not cut at steps.
        steady: whether it holds steady state alone. False means the run has no steady step, and the window
            is the whole run: warm-up, drains and pauses included.
    """

    start_ns: int
    end_ns: int
    num_steps: int
    steady: bool

    @property
    def seconds(self) -> float:
        """Its length."""
        return (self.end_ns - self.start_ns) * 1e-9


@dataclass(frozen=True, kw_only=True)
class StageUsage:
    """How one stage spent a window.

    Args:
        stage: index of the stage.
        shares: part of the window that each activity took; they sum to 1.
        step_s: median of the intervals between the ends of consecutive updates; None below two updates.
        step_p10_s: their tenth percentile.
        step_p90_s: their ninetieth percentile.
        staleness: batches by which the latest forward is ahead of a backward, in the median, which is the
            staleness that the stage really had; None where no backward follows a forward.
    """

    stage: int
    shares: Mapping[Activity, float]
    step_s: float | None
    step_p10_s: float | None
    step_p90_s: float | None
    staleness: int | None

    @property
    def utilisation(self) -> float:
        """Part of the window in which the stage computes."""
        return sum(self.shares[activity] for activity in _COMPUTE)

    @property
    def compute_s(self) -> float | None:
        """What the stage computes in a step: utilisation x step time."""
        return None if self.step_s is None else self.utilisation * self.step_s

    @property
    def bubble(self) -> float:
        """1 - utilisation."""
        return 1.0 - self.utilisation

    @property
    def waiting(self) -> float:
        """Part of the window in which the stage waits for an activation, a gradient or the loader."""
        return sum(share for activity, share in self.shares.items() if activity.is_wait)


@dataclass(frozen=True, kw_only=True)
class Usage:
    """How all stages spent one window."""

    window: Window
    stages: tuple[StageUsage, ...]

    @property
    def bottleneck(self) -> int:
        """The stage that computes longest in a step, the first of equals.

        Where a stage shows no step time, the stage with the highest utilisation.
        """
        known = all(stage.compute_s is not None for stage in self.stages)
        return max(
            self.stages,
            key=lambda stage: ((stage.compute_s or 0.0) if known else 0.0, stage.utilisation, -stage.stage),
        ).stage

    @property
    def step_s(self) -> float | None:
        """Median step time of the bottleneck, which sets the pace of all."""
        return self.stages[self.bottleneck].step_s


class Timeline:
    """The records of all stages of a run, on one clock.

    Args:
        stages: one entry per stage, in order.

    Raises:
        ConfigError: where there is no stage, or no record at all.
    """

    def __init__(self, stages: Sequence[StageSpans]) -> None:
        if not any(len(spans) for spans in stages):
            raise ConfigError(
                f"a timeline of {len(stages)} stages without any record shows nothing; "
                "give the traces of a run that took at least one step."
            )
        self.stages = tuple(stages)

    @classmethod
    def load(cls, run_dir: Path) -> Timeline:
        """Read `timeline/stage0.npz`, `timeline/stage1.npz`, ... of a run folder.

        Raises:
            ConfigError: where a file of a stage is missing or malformed.
        """
        folder = Path(run_dir) / "timeline"
        found = {path.name for path in folder.glob("stage*.npz")}
        if not found:
            raise ConfigError(f"{folder} holds no stage0.npz; train with the timeline switched on.")
        for index in range(len(found)):
            if f"stage{index}.npz" not in found:
                raise ConfigError(
                    f"{folder / f'stage{index}.npz'} does not exist, but {', '.join(sorted(found))} do; a "
                    "timeline needs one file per stage, counted from 0. Copy the missing file, or delete the "
                    "folder."
                )
        return cls([_read_stage(folder / f"stage{index}.npz", index) for index in range(len(found))])

    @classmethod
    def from_traces(cls, traces: Sequence[Trace]) -> Timeline:
        """The timeline of one trace per stage, in any order."""
        ordered = sorted(traces, key=lambda trace: trace.stage)
        return cls(
            [
                _ordered(trace.stage, *(np.array(trace.columns()[name], dtype=np.int64) for name in _COLUMNS))
                for trace in ordered
            ]
        )

    @property
    def num_stages(self) -> int:
        """K."""
        return len(self.stages)

    @property
    def whole(self) -> Window:
        """From the first start to the last end."""
        present = [spans for spans in self.stages if len(spans)]
        return Window(
            start_ns=min(int(spans.start_ns.min()) for spans in present),
            end_ns=max(int(spans.end_ns.max()) for spans in present),
            num_steps=0,
            steady=False,
        )

    def window(self, num_steps: int = 8) -> Window:
        """Steps in steady state, as near to the middle of the run as they are found.

        A step lasts from the end of one update of the first stage to the end of the next. It is steady where
        it holds as many forwards as backwards (a warm-up has more forwards, a drain fewer), the same numbers
        as most such steps, and no pause: no time longer than the median step in which no stage has a record
        (an evaluation, a checkpoint). The first stage decides for all: it has the largest staleness, so it
        enters steady state last and leaves it first.

        Args:
            num_steps: steps wanted. Where no stretch of steady steps is that long, the longest one is taken.

        Returns:
            The window, from the stretch nearest to the middle of the run, cut from the middle of the stretch;
            the whole run with `steady=False` where no step is steady.
        """
        if num_steps < 1:
            raise ConfigError(f"num_steps is {num_steps}; a window needs at least one step.")
        ends, steady = self._steps()
        stretches = _stretches(steady)
        if not stretches:
            return self.whole
        length = min(num_steps, max(stop - start for start, stop in stretches))
        start, stop = min(
            (stretch for stretch in stretches if stretch[1] - stretch[0] >= length),
            key=lambda stretch: abs(stretch[0] + stretch[1] - len(steady)),
        )
        first = start + (stop - start - length) // 2
        return Window(start_ns=int(ends[first]), end_ns=int(ends[first + length]), num_steps=length, steady=True)

    def usage(self, window: Window) -> Usage:
        """How each stage spent the window."""
        return Usage(window=window, stages=tuple(_stage_usage(spans, window) for spans in self.stages))

    def _steps(self) -> tuple[IntArray, BoolArray]:
        """Ends of the updates that delimit steps, and for each step whether it is steady."""
        reference = next((spans for spans in self.stages if len(spans.only(Kind.UPDATE)) > 1), None)
        if reference is None:
            return np.empty(0, np.int64), np.empty(0, np.bool_)
        ends = np.sort(reference.only(Kind.UPDATE).end_ns)
        counts = np.stack(
            [
                np.diff(np.searchsorted(np.sort(reference.only(kind).end_ns), ends, side="right"))
                for kind in (Kind.FORWARD, Kind.RECOMPUTE, Kind.BACKWARD)
            ],
            axis=1,
        )
        balanced = (counts[:, 0] == counts[:, 2]) & (counts[:, 0] > 0)
        if not balanced.any():
            return ends, balanced
        patterns, times = np.unique(counts[balanced], axis=0, return_counts=True)
        steady: BoolArray = (counts == patterns[times.argmax()]).all(axis=1)
        longest_gap = float(np.median(np.diff(ends)[steady]))
        for resumed in self._pauses(longest_gap):
            step = int(np.searchsorted(ends, resumed, side="left")) - 1
            if 0 <= step < len(steady):
                steady[step] = False
        return ends, steady

    def _pauses(self, longer_than_ns: float) -> IntArray:
        """When records resume after a time in which no stage has any."""
        starts = np.concatenate([spans.start_ns for spans in self.stages])
        ends = np.concatenate([spans.end_ns for spans in self.stages])
        order = np.argsort(starts, kind="stable")
        starts, reached = starts[order], np.maximum.accumulate(ends[order])
        resumed: IntArray = starts[1:][starts[1:] - reached[:-1] > longer_than_ns]
        return resumed


def _read_stage(path: Path, stage: int) -> StageSpans:
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            columns = {name: archive[name] for name in archive.files}
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile) as error:
        raise ConfigError(
            f"{path} is not a readable .npz file ({error}). Copy it again from the run, or delete the timeline folder."
        ) from error
    repair = "Write it with Trace.columns() and numpy.savez, or delete the timeline folder."
    for name in _COLUMNS:
        column = columns.get(name)
        if column is None:
            raise ConfigError(f"{path} lacks the array {name!r}; it has {sorted(columns)}. {repair}")
        if column.ndim != 1 or not np.issubdtype(column.dtype, np.integer):
            raise ConfigError(
                f"{path}: the array {name!r} is {column.dtype} of shape {column.shape}; it must be "
                f"one-dimensional int64. {repair}"
            )
        if len(column) != len(columns["kind"]):
            raise ConfigError(
                f"{path}: the array {name!r} has {len(column)} entries and 'kind' has "
                f"{len(columns['kind'])}; they must be equally long. {repair}"
            )
    bad_kind = (columns["kind"] < 0) | (columns["kind"] >= len(KIND_CODES))
    for bad, rule in (
        (bad_kind, f"kind must be a code from 0 to {len(KIND_CODES) - 1}"),
        (columns["end_ns"] < columns["start_ns"], "it must not end before it starts"),
    ):
        if bad.any():
            record = int(bad.argmax())
            values = ", ".join(f"{name}={columns[name][record]}" for name in _COLUMNS)
            raise ConfigError(f"{path}: record {record} is {values}; {rule}. {repair}")
    return _ordered(stage, *(columns[name].astype(np.int64) for name in _COLUMNS))


def _ordered(stage: int, kind: IntArray, batch: IntArray, start_ns: IntArray, end_ns: IntArray) -> StageSpans:
    order = np.lexsort((end_ns, start_ns))
    return StageSpans(stage, kind[order], batch[order], start_ns[order], end_ns[order])


def _stretches(steady: BoolArray) -> list[tuple[int, int]]:
    """The runs of true entries as half-open ranges."""
    edges = np.flatnonzero(np.diff(np.concatenate(([False], steady, [False]))))
    return [(int(start), int(stop)) for start, stop in zip(edges[::2], edges[1::2], strict=True)]


def _stage_usage(spans: StageSpans, window: Window) -> StageUsage:
    updates = np.sort(spans.only(Kind.UPDATE).end_ns)
    inside = updates[(updates >= window.start_ns) & (updates <= window.end_ns)]
    step: tuple[float | None, ...] = (None, None, None)
    if len(inside) > 1:
        step = tuple(float(value) * 1e-9 for value in np.percentile(np.diff(inside), (50, 10, 90)))
    return StageUsage(
        stage=spans.stage,
        shares=_shares(spans, window),
        step_s=step[0],
        step_p10_s=step[1],
        step_p90_s=step[2],
        staleness=_staleness(spans, window),
    )


def _shares(spans: StageSpans, window: Window) -> dict[Activity, float]:
    """Part of the window of each activity, each instant counted for the first that covers it."""
    spans = spans.within(window)
    starts = np.maximum(spans.start_ns, window.start_ns)
    ends = np.minimum(spans.end_ns, window.end_ns)
    edges = np.unique(np.concatenate((starts, ends, [window.start_ns, window.end_ns])))
    lengths = np.diff(edges)
    free = np.ones(len(lengths), np.bool_)
    total = max(window.end_ns - window.start_ns, 1)
    shares = {}
    for activity in Activity:
        codes = [_CODE_OF[kind] for kind in KIND_CODES if Activity.of(kind) is activity]
        mask = np.isin(spans.kind, codes)
        change = np.zeros(len(edges), np.int64)
        np.add.at(change, np.searchsorted(edges, starts[mask]), 1)
        np.add.at(change, np.searchsorted(edges, ends[mask]), -1)
        covered = np.cumsum(change)[:-1] > 0
        shares[activity] = float(lengths[covered & free].sum()) / total
        free &= ~covered
    shares[Activity.UNRECORDED] = float(lengths[free].sum()) / total
    return shares


def _staleness(spans: StageSpans, window: Window) -> int | None:
    """How many batches the latest forward is ahead of a backward that starts, in the median."""
    forwards, backwards = spans.only(Kind.FORWARD), spans.only(Kind.BACKWARD).within(window)
    latest = np.searchsorted(forwards.start_ns, backwards.start_ns, side="right") - 1
    known = latest >= 0
    if not known.any():
        return None
    return int(np.median(forwards.batch[latest[known]] - backwards.batch[known]))
