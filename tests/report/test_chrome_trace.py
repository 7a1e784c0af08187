"""The Chrome trace is valid JSON, its rows do not overlap, and its arrows join sends to their receives."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from report.synthetic import simulate
from report.test_timeline import trace_of

from stalewise.report import chrome_trace
from stalewise.report.chrome_trace import write_chrome_trace
from stalewise.report.timeline import Timeline


def events_of(path: Path) -> list[dict[str, Any]]:
    document = json.loads(path.read_text(encoding="utf-8"))
    return list(document["traceEvents"])


def nanoseconds(microseconds: float) -> int:
    return round(microseconds * 1000)


def assert_rows_do_not_overlap(events: Iterable[dict[str, Any]]) -> None:
    rows = defaultdict(list)
    for event in events:
        if event["ph"] == "X":
            start = nanoseconds(event["ts"])
            assert start >= 0
            assert event["dur"] >= 0
            rows[event["pid"], event["tid"]].append((start, start + nanoseconds(event["dur"])))
    assert rows
    for spans in rows.values():
        spans.sort()
        assert all(end <= start for (_, end), (start, _) in pairwise(spans))


def test_whole_run(finished_run: Path, tmp_path: Path) -> None:
    timeline = Timeline.load(finished_run)
    path = write_chrome_trace(timeline, tmp_path / "deep" / "trace.json")
    events = events_of(path)
    assert_rows_do_not_overlap(events)
    complete = [event for event in events if event["ph"] == "X"]
    assert len(complete) == sum(map(len, timeline.stages))
    assert min(event["ts"] for event in complete) == 0
    assert Counter(event["name"] for event in complete)["U"] == 3 * 230
    seen = [event for event in complete if event["name"] == "R229"]
    assert [(event["pid"], event["args"]) for event in seen] == [(0, {"batch": 229}), (1, {"batch": 229})]
    names = {
        (event["pid"], event.get("tid")): event["args"]["name"]
        for event in events
        if event["ph"] == "M" and event["name"].endswith("_name")
    }
    assert names[1, None] == "stage 1"
    assert {name for (pid, tid), name in names.items() if pid == 2 and tid is not None} == {
        "compute",
        "messages",
    }
    cat = {(event["cat"], names[event["pid"], event["tid"]]) for event in complete}
    assert cat == {("compute", "compute"), ("messages", "messages")}
    assert list(tmp_path.rglob("*.tmp")) == []


def test_arrows_join_each_send_to_its_receive(finished_run: Path, tmp_path: Path) -> None:
    events = events_of(write_chrome_trace(Timeline.load(finished_run), tmp_path / "trace.json"))
    slices = defaultdict(list)
    for event in events:
        if event["ph"] == "X":
            slices[event["pid"], event["tid"]].append(event)

    def around(event: dict[str, Any]) -> dict[str, Any]:
        at = nanoseconds(event["ts"])
        (found,) = (
            each
            for each in slices[event["pid"], event["tid"]]
            if nanoseconds(each["ts"]) <= at < nanoseconds(each["ts"]) + nanoseconds(each["dur"])
        )
        return found

    starts = {event["id"]: event for event in events if event["ph"] == "s"}
    ends = {event["id"]: event for event in events if event["ph"] == "f"}
    assert len(starts) == sum(event["ph"] == "s" for event in events), "an id is used twice"
    assert starts.keys() == ends.keys()
    # Two links, each with an activation down and a gradient up for every batch.
    assert len(starts) == 2 * 2 * 230
    for number, start in list(starts.items())[::7]:
        end = ends[number]
        assert end["bp"] == "e"
        assert start["ts"] <= end["ts"]
        assert (start["name"], start["cat"]) == (end["name"], end["cat"])
        send, receive = around(start), around(end)
        assert send["args"] == receive["args"]
        kinds = {1: ("SEND_A", "RECV_A"), -1: ("SEND_G", "RECV_G")}[receive["pid"] - send["pid"]]
        assert (send["name"], receive["name"]) == tuple(f"{kind}{send['args']['batch']}" for kind in kinds)


def test_overlapping_records_get_rows_of_their_own(tmp_path: Path) -> None:
    timeline = Timeline.from_traces(
        [trace_of(0, ("F1", 0, 60), ("R0", 40, 80), ("F2", 60, 90), ("RECV_G0", 20, 85), offset=5000)]
    )
    events = events_of(write_chrome_trace(timeline, tmp_path / "trace.json"))
    assert_rows_do_not_overlap(events)
    rows = {event["args"]["name"] for event in events if event["name"] == "thread_name"}
    assert rows == {"compute", "compute 2", "messages"}
    assert {event["name"]: event["tid"] for event in events if event["ph"] == "X"} == {
        "F1": 0,
        "R0": 1,
        "F2": 0,
        "RECV_G0": 100,
    }


def test_micro_batches_pair_in_order_and_incomplete_batches_get_no_arrow(tmp_path: Path) -> None:
    timeline = Timeline.from_traces(
        [
            trace_of(0, ("SEND_A0", 0, 1), ("SEND_A0", 10, 11), ("SEND_A1", 20, 21), ("SEND_A1", 30, 31)),
            trace_of(1, ("RECV_A0", 0, 5), ("RECV_A0", 5, 15), ("RECV_A1", 25, 35)),
        ]
    )
    events = events_of(write_chrome_trace(timeline, tmp_path / "trace.json"))
    arrows = [(event["ph"], event["name"], event["ts"]) for event in events if event["ph"] in "sf"]
    assert arrows == [
        ("s", "activation 0", 0.0),
        ("f", "activation 0", 0.004),
        ("s", "activation 0", 0.01),
        ("f", "activation 0", 0.014),
    ]


def test_window_limits_what_is_written(finished_run: Path, tmp_path: Path) -> None:
    timeline = Timeline.load(finished_run)
    window = timeline.window(8)
    events = events_of(write_chrome_trace(timeline, tmp_path / "trace.json", window=window))
    updates = [event for event in events if event["name"] == "U" and event["pid"] == 0]
    assert len(updates) == 8
    assert_rows_do_not_overlap(events)


def test_failure_leaves_the_old_file_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "trace.json"
    path.write_text("old", encoding="utf-8")

    def break_off(*_: object) -> None:
        raise RuntimeError("disk on fire")

    monkeypatch.setattr(chrome_trace, "_us", break_off)
    with pytest.raises(RuntimeError, match="disk on fire"):
        write_chrome_trace(Timeline.from_traces(simulate(epochs=1, batches=9)), path)
    assert path.read_text(encoding="utf-8") == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["trace.json"]
