"""The timeline as Chrome trace JSON, which https://ui.perfetto.dev and chrome://tracing open.

    process "stage 0"    compute    | F7 |    | R3 |  B3  |U|
                         messages        |SEND_A7|        | SEND_G3 |
                                             \\                         one arrow per message
    process "stage 1"    messages   | RECV_A7 |
                         compute              | F7 | ...

Records of one row never overlap: what overlaps (a recompute beside a forward) moves to a further row, such as
"compute 2". Times are microseconds since the first record, with three decimals, so no nanosecond is lost.

Source: "Trace Event Format", the Chromium project; phases M (metadata), X (complete), s and f (flow).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from stalewise.protocol.actions import COMPUTE, Action, Kind
from stalewise.protocol.trace import KIND_CODES
from stalewise.report.atomic import atomic_text
from stalewise.report.timeline import IntArray, StageSpans, Timeline, Window

__all__ = ["write_chrome_trace"]

_ROWS = ("compute", "messages")
_IS_COMPUTE = np.array([kind in COMPUTE for kind in KIND_CODES])
_LANES = 100
"""Thread ids between two rows: the lanes that a row may have."""


def write_chrome_trace(timeline: Timeline, path: Path, *, window: Window | None = None) -> Path:
    """Write the timeline as Chrome trace JSON.

    Events are written one after another as they are made, so no list of them is ever in memory. The file
    appears under `path` only when it is complete.

    Args:
        timeline: what to write.
        path: file to write, by custom `trace.json`.
        window: only records that share time with it; None for the whole run, about 180 bytes a record.

    Returns:
        `path`.
    """
    stages = timeline.stages
    if window is not None:
        stages = tuple(spans.within(window) for spans in stages)
    origin = min((int(spans.start_ns[0]) for spans in stages if len(spans)), default=0)
    with atomic_text(path) as file:
        file.write('{"displayTimeUnit":"ms","traceEvents":[')
        separator = "\n"
        for event in _events(stages, origin):
            file.write(separator + json.dumps(event, separators=(",", ":")))
            separator = ",\n"
        file.write("\n]}\n")
    return path


def _events(stages: tuple[StageSpans, ...], origin: int) -> Iterator[dict[str, object]]:
    threads = [_threads(spans) for spans in stages]
    for spans, thread in zip(stages, threads, strict=True):
        yield from _metadata(spans.stage, thread)
        yield from _complete(spans, thread, origin)
    number = 0
    for above in range(len(stages) - 1):
        for sender, send, receiver, receive in (
            (above, Kind.SEND_ACTIVATION, above + 1, Kind.RECEIVE_ACTIVATION),
            (above + 1, Kind.SEND_GRADIENT, above, Kind.RECEIVE_GRADIENT),
        ):
            name = "activation" if send is Kind.SEND_ACTIVATION else "gradient"
            for i, j in _pairs(stages[sender], send, stages[receiver], receive):
                # A flow binds to the slice that is open at its time: the start of the send, and the last
                # nanosecond of the receive. A receive that ends before its send is clock error: no arrow.
                left = int(stages[sender].start_ns[i])
                right = max(int(stages[receiver].end_ns[j]) - 1, int(stages[receiver].start_ns[j]))
                if right < left:
                    continue
                number += 1
                common = {"cat": "message", "name": f"{name} {int(stages[sender].batch[i])}", "id": number}
                yield common | {
                    "ph": "s",
                    "pid": sender,
                    "tid": int(threads[sender][i]),
                    "ts": _us(left - origin),
                }
                yield common | {
                    "ph": "f",
                    "bp": "e",
                    "pid": receiver,
                    "tid": int(threads[receiver][j]),
                    "ts": _us(right - origin),
                }


def _metadata(stage: int, thread: IntArray) -> Iterator[dict[str, object]]:
    named = {"ph": "M", "pid": stage}
    yield named | {"name": "process_name", "args": {"name": f"stage {stage}"}}
    yield named | {"name": "process_sort_index", "args": {"sort_index": stage}}
    for tid in sorted({0, _LANES, *(int(value) for value in np.unique(thread))}):
        row, lane = _ROWS[tid // _LANES], tid % _LANES
        yield named | {
            "tid": tid,
            "name": "thread_name",
            "args": {"name": row if lane == 0 else f"{row} {lane + 1}"},
        }
        yield named | {"tid": tid, "name": "thread_sort_index", "args": {"sort_index": tid}}


def _complete(spans: StageSpans, thread: IntArray, origin: int) -> Iterator[dict[str, object]]:
    for row in range(len(spans)):
        kind, batch = KIND_CODES[int(spans.kind[row])], int(spans.batch[row])
        start, end = int(spans.start_ns[row]), int(spans.end_ns[row])
        event: dict[str, object] = {
            "ph": "X",
            "name": str(Action(kind, None if kind is Kind.UPDATE or batch < 0 else batch)),
            "cat": _ROWS[kind not in COMPUTE],
            "pid": spans.stage,
            "tid": int(thread[row]),
            "ts": _us(start - origin),
            "dur": _us(end - start),
        }
        yield event if batch < 0 else event | {"args": {"batch": batch}}


def _threads(spans: StageSpans) -> IntArray:
    """The thread of each record: the first lane of its row that is free when it starts."""
    threads = np.zeros(len(spans), np.int64)
    free_from: tuple[list[int], list[int]] = ([], [])
    for place in range(len(spans)):
        row = 0 if _IS_COMPUTE[spans.kind[place]] else 1
        lanes, start = free_from[row], spans.start_ns[place]
        lane = next((index for index, free in enumerate(lanes) if free <= start), len(lanes))
        if lane == len(lanes):
            lanes.append(0)
        lanes[lane] = int(spans.end_ns[place])
        threads[place] = row * _LANES + min(lane, _LANES - 1)
    return threads


def _pairs(sender: StageSpans, send: Kind, receiver: StageSpans, receive: Kind) -> Iterator[tuple[int, int]]:
    """Places of each send and its receive: links are first in, first out, so equals pair in order.

    A batch whose sends and receives differ in number (some were dropped, or the run was cut short) has none.
    """
    sends = np.flatnonzero(sender.kind == KIND_CODES.index(send))
    receives = np.flatnonzero(receiver.kind == KIND_CODES.index(receive))
    batches, counts = np.unique(sender.batch[sends], return_counts=True)
    matches, others = np.unique(receiver.batch[receives], return_counts=True)
    known = dict(zip(matches.tolist(), others.tolist(), strict=True))
    paired = [
        batch for batch, count in zip(batches.tolist(), counts.tolist(), strict=True) if known.get(batch) == count
    ]
    sends = sends[np.isin(sender.batch[sends], paired)]
    receives = receives[np.isin(receiver.batch[receives], paired)]
    left = sends[np.argsort(sender.batch[sends], kind="stable")]
    right = receives[np.argsort(receiver.batch[receives], kind="stable")]
    yield from zip(left.tolist(), right.tolist(), strict=True)


def _us(nanoseconds: int) -> float:
    return round(nanoseconds / 1000, 3)
