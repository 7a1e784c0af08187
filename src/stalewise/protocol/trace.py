"""Trace records: which action a stage took, from when to when.

A trace is kept as columns of 64-bit integers, because a long run has millions of records. Times are nanoseconds
of the clock of rank 0 (each rank adds its own offset). The wait for a message is the length of its
RECV record; compute kinds (`COMPUTE` in `protocol.actions`) keep the stage busy.

A run of days must not hold more memory than one of minutes, so a trace may hand what is full to a store.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple, Protocol

from stalewise.protocol.actions import Action, Kind

__all__ = ["COLUMNS", "KIND_CODES", "Columns", "Span", "Trace", "TraceStore"]

KIND_CODES: tuple[Kind, ...] = tuple(Kind)
"""The kind of each code in the `kind` column: the order of `Kind`."""

COLUMNS = ("kind", "batch", "start_ns", "end_ns")

Columns = Mapping[str, "array[int]"]
"""Equally long columns, by the names in `COLUMNS`."""

BLOCK = 8192
"""Records that a trace with a store holds itself, 32 bytes each."""

_CODE_OF = {kind: code for code, kind in enumerate(KIND_CODES)}


class Span(NamedTuple):
    """One record. `batch` counts from the start of the run, over all epochs; -1 where there is none."""

    stage: int
    kind: Kind
    batch: int
    start_ns: int
    end_ns: int


class TraceStore(Protocol):
    """Keeps records elsewhere than in memory."""

    @property
    def dropped(self) -> int:
        """Of the records added, those that are not kept any more; they are the oldest."""

    def __len__(self) -> int:
        """Records kept."""

    def add(self, columns: Columns) -> None:
        """Keep these, after those before."""

    def columns(self) -> Columns:
        """All that are kept."""


class Trace:
    """The records of one stage, in the order in which they ended.

    Args:
        stage: index of the stage.
        limit: records kept in memory; older ones are dropped half at a time beyond it. With a store they go there.
        store: that takes all but the last records, or None.
    """

    def __init__(self, stage: int, *, limit: int | None = None, store: TraceStore | None = None) -> None:
        self.stage = stage
        self._store = store
        self._dropped = 0
        self._limit = limit or (1_000_000 if store is None else BLOCK)
        self._kind, self._batch, self._start, self._end = (array("q") for _ in range(4))

    @property
    def dropped(self) -> int:
        """Records that are not kept any more."""
        return self._dropped + (0 if self._store is None else self._store.dropped)

    def add(self, action: Action, batch: int, start_ns: int, end_ns: int) -> None:
        """Append one record; `batch` is the index over the whole run."""
        if len(self._kind) >= self._limit:
            self._make_room()
        self._kind.append(_CODE_OF[action.kind])
        self._batch.append(batch)
        self._start.append(start_ns)
        self._end.append(end_ns)

    def columns(self) -> dict[str, array[int]]:
        """`kind` (a code), `batch`, `start_ns` and `end_ns`, equally long."""
        own = self._own()
        if self._store is None or not len(self._store):
            return own
        before = self._store.columns()
        return {name: before[name] + own[name] for name in COLUMNS}

    def _own(self) -> dict[str, array[int]]:
        return dict(zip(COLUMNS, (self._kind, self._batch, self._start, self._end), strict=True))

    def _make_room(self) -> None:
        going = self._limit // 2 if self._store is None else self._limit
        if self._store is None:
            self._dropped += going
        else:
            self._store.add(self._own())
        for column in (self._kind, self._batch, self._start, self._end):
            del column[:going]

    @classmethod
    def from_columns(cls, stage: int, columns: Mapping[str, Iterable[int]]) -> Trace:
        """The trace that has these `columns()`."""
        trace = cls(stage)
        trace._kind, trace._batch, trace._start, trace._end = (array("q", columns[name]) for name in COLUMNS)
        return trace

    def __len__(self) -> int:
        return len(self._kind) + (0 if self._store is None else len(self._store))

    def __iter__(self) -> Iterator[Span]:
        for kind, batch, start, end in zip(*self.columns().values(), strict=True):
            yield Span(self.stage, KIND_CODES[kind], batch, start, end)
