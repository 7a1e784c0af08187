"""Traces keep records in order, and drop the oldest half when they are full."""

from __future__ import annotations

from stalewise.protocol.actions import Action, Kind
from stalewise.protocol.trace import KIND_CODES, Span, Trace


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
