"""Trace records: which action a stage took, from when to when.

A trace is kept as columns of 64-bit integers, because a long run has millions of records. Times are nanoseconds
of the clock of rank 0 (each rank adds its own offset). The wait for a message is the length of its
RECV record; compute kinds (`COMPUTE` in `protocol.actions`) keep the stage busy.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from stalewise.protocol.actions import Action, Kind

__all__ = ["KIND_CODES", "Span", "Trace"]

KIND_CODES: tuple[Kind, ...] = tuple(Kind)
"""The kind of each code in the `kind` column: the order of `Kind`."""

COLUMNS = ("kind", "batch", "start_ns", "end_ns")

_CODE_OF = {kind: code for code, kind in enumerate(KIND_CODES)}


class Span(NamedTuple):
    """One record. `batch` counts from the start of the run, over all epochs; -1 where there is none."""

    stage: int
    kind: Kind
    batch: int
    start_ns: int
    end_ns: int


class Trace:
    """The records of one stage, in the order in which they ended.

    Args:
        stage: index of the stage.
        limit: records kept; older ones are dropped half at a time beyond it.
    """

    def __init__(self, stage: int, *, limit: int = 1_000_000) -> None:
        self.stage = stage
        self.dropped = 0
        self._limit = limit
        self._kind, self._batch, self._start, self._end = (array("q") for _ in range(4))

    def add(self, action: Action, batch: int, start_ns: int, end_ns: int) -> None:
        """Append one record; `batch` is the index over the whole run."""
        if len(self._kind) >= self._limit:
            half = self._limit // 2
            for column in (self._kind, self._batch, self._start, self._end):
                del column[:half]
            self.dropped += half
        self._kind.append(_CODE_OF[action.kind])
        self._batch.append(batch)
        self._start.append(start_ns)
        self._end.append(end_ns)

    def columns(self) -> dict[str, array[int]]:
        """`kind` (a code), `batch`, `start_ns` and `end_ns`, equally long."""
        return dict(zip(COLUMNS, (self._kind, self._batch, self._start, self._end), strict=True))

    @classmethod
    def from_columns(cls, stage: int, columns: Mapping[str, Iterable[int]]) -> Trace:
        """The trace that has these `columns()`."""
        trace = cls(stage)
        trace._kind, trace._batch, trace._start, trace._end = (array("q", columns[name]) for name in COLUMNS)
        return trace

    def __len__(self) -> int:
        return len(self._kind)

    def __iter__(self) -> Iterator[Span]:
        for kind, batch, start, end in zip(self._kind, self._batch, self._start, self._end, strict=True):
            yield Span(self.stage, KIND_CODES[kind], batch, start, end)
