"""Traces keep records in order, and drop the oldest half when they are full."""

from __future__ import annotations

from array import array

from stalewise.protocol.actions import Action, Kind
from stalewise.protocol.trace import COLUMNS, KIND_CODES, Columns, Span, Trace


def test_records_come_back_as_they_were_added() -> None:
    trace = Trace(2)
    trace.add(Action(Kind.FORWARD, 1), 11, 5, 9)
    trace.add(Action(Kind.UPDATE), 7, 9, 10)
    assert list(trace) == [Span(2, Kind.FORWARD, 11, 5, 9), Span(2, Kind.UPDATE, 7, 9, 10)]
    assert len(trace) == 2
    assert trace.dropped == 0


def test_columns_code_the_kinds_in_their_order() -> None:
    trace = Trace(0)
    for number, kind in enumerate(Kind):
        trace.add(Action(kind, number), number, 10 * number, 10 * number + 1)
    columns = trace.columns()
    assert [KIND_CODES[code] for code in columns["kind"]] == list(Kind)
    assert list(columns["kind"]) == list(columns["batch"]) == list(range(len(Kind)))
    assert list(columns["end_ns"]) == [start + 1 for start in columns["start_ns"]]


def test_a_full_trace_drops_its_oldest_half_and_counts_it() -> None:
    trace = Trace(0, limit=4)
    for batch in range(9):
        trace.add(Action(Kind.FORWARD, batch), batch, batch, batch)
        assert len(trace) <= 4
        assert trace.dropped + len(trace) == batch + 1
        assert [span.batch for span in trace] == list(range(trace.dropped, batch + 1))
    assert trace.dropped == 6


class Kept:
    """A store in memory."""

    dropped = 0

    def __init__(self) -> None:
        self.rows: list[tuple[int, ...]] = []

    def __len__(self) -> int:
        return len(self.rows)

    def add(self, columns: Columns) -> None:
        self.rows += zip(*columns.values(), strict=True)

    def columns(self) -> Columns:
        return {name: array("q", column) for name, column in zip(COLUMNS, zip(*self.rows, strict=True), strict=True)}


def test_a_trace_with_a_store_hands_over_what_is_full() -> None:
    store = Kept()
    trace = Trace(0, limit=4, store=store)
    for batch in range(11):
        trace.add(Action(Kind.FORWARD, batch), batch, 2 * batch, 2 * batch + 1)
        assert len(trace) == batch + 1
        assert len(trace) - len(store) <= 4
        assert list(trace) == [Span(0, Kind.FORWARD, b, 2 * b, 2 * b + 1) for b in range(batch + 1)]
    assert len(store) == 8
