"""The record of the first failure of a job, from which all ranks know the first cause.

The first worker that fails writes it to the job's store (a compare-and-set, so there is only one first); `monitor`
reads it. The store is that of the launcher or of torchrun; it outlives any worker. (Where rank 0 hosts it, it may end
before the other ranks do; then they just stop watching.) Where there is none, dead peers are still found by their
closed connections.
"""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
import traceback
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

from torch.distributed import TCPStore  # type: ignore[attr-defined]

from stalewise.errors import PeerLost, ReceiveTimeout, WorkerError

__all__ = [
    "connect_to_store",
    "describe_doing",
    "describe_failure",
    "failure_header",
    "failure_key",
    "name_failure",
    "rank_key",
    "read_record",
    "record_failure",
    "start_key",
]

STORE_WAIT_S = 5.0
"""How long a failing worker waits for the store; on a link that is down TCP would wait for a quarter of an hour."""


def failure_key(restart: int | None = None) -> str:
    """Where the record of the first failure lies in the store.

    Args:
        restart: how often the job was started before; None: as the environment of this worker says.
    """
    return f"stalewise/{_count(restart)}/failure"


def rank_key(rank: int, restart: int | None = None) -> str:
    """Where the signs of life of a rank lie in the store; see `failure_key`."""
    return f"stalewise/{_count(restart)}/rank/{rank}"


def start_key(rank: int, restart: int | None = None) -> str:
    """Where a rank says that it has started; see `failure_key`."""
    return f"stalewise/{_count(restart)}/start/{rank}"


def _count(restart: int | None) -> str:
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if restart is None else str(restart)


def describe_doing(status: Mapping[str, Any]) -> str:
    """What a worker is doing by its status, in words; empty where it says nothing."""
    if "doing" not in status:
        return ""
    action, batch = status["doing"] or (None, None)
    if action is None:
        return "in code that no pipeline calls" + ("" if batch is None else f", after batch {batch}")
    return f"in {action}" if batch is None else f"in {action} of batch {batch}"


def name_failure(record: Mapping[str, Any]) -> str:
    """Who failed, and where."""
    at = f", batch {record['batch']}" if record.get("batch") is not None else ""
    doing = f", {record['action']}" if record.get("action") else ""
    return f"{record['who']} failed{at}{doing}"


def describe_failure(record: Mapping[str, Any]) -> str:
    """The record as text: who, where, and the original traceback."""
    return f"{name_failure(record)}:\n{record['traceback'].rstrip()}"


def read_record(text: bytes | str) -> dict[str, Any]:
    """A record from the store; where no rank wrote it, one that says so."""
    try:
        record: dict[str, Any] = json.loads(text)
        if isinstance(record["rank"], int) and all(isinstance(record[key], str) for key in _TEXTS):
            return record
    except (ValueError, TypeError, KeyError, RecursionError):
        pass
    found = f"it holds {text[:60]!r} where ranks leave why they fail. Let nothing else use MASTER_PORT."
    return {"rank": -1, "who": "the store of the job", "type": "Unreadable", "message": found, "traceback": found}


def record_failure(
    error: BaseException,
    *,
    rank: int,
    who: str,
    batch: int | None = None,
    action: str | None = None,
    store: TCPStore | None,
) -> dict[str, Any] | None:
    """Leave a record of the first failure of a job in its store, and a header for the printed traceback on the error.

    An error that was recorded before, or that another worker's failure caused, is left alone.

    Returns:
        The record of another worker that was there first; None where this one is the first as far as known.
    """
    if isinstance(error, WorkerError) or failure_header(error) is not None:
        return None
    brief = isinstance(error, PeerLost | ReceiveTimeout)
    record = {
        "rank": rank,
        "who": who,
        "batch": batch,
        "action": action,
        "type": type(error).__name__,
        "message": str(error),
        "traceback": f"{type(error).__name__}: {error}" if brief else "".join(traceback.format_exception(error)),
    }
    text = json.dumps(record)
    first = text if store is None else _first_record(store, text)
    earlier = read_record(first)
    if earlier["rank"] != rank:
        return earlier
    setattr(error, _HEADER, describe_failure({**record, "traceback": ""}).rstrip())
    return None


def _first_record(store: TCPStore, own: str) -> str:
    """The record that the store holds once this one was offered to it; our own where the store cannot be reached."""
    answers: queue.Queue[str | RuntimeError] = queue.Queue()

    def offer() -> None:
        try:
            answers.put(store.compare_set(failure_key(), "", own).decode())
        except RuntimeError as problem:
            answers.put(problem)

    threading.Thread(target=offer, name="report", daemon=True).start()
    try:
        answer = answers.get(timeout=STORE_WAIT_S)
    except queue.Empty:
        answer = RuntimeError(f"the job's store does not answer in {STORE_WAIT_S:g} s; its host or the link is down.")
    if isinstance(answer, str):
        return answer
    print(f"stalewise: could not tell the other ranks of a failure: {answer}", file=sys.stderr)
    return own


_TEXTS = ("who", "type", "message", "traceback")
_HEADER = "__stalewise_header__"


def failure_header(error: BaseException) -> str | None:
    """Who failed and where, of an error that was recorded; else None."""
    return getattr(error, _HEADER, None)


def connect_to_store() -> TCPStore | None:
    """A connection of our own to the job's store; None where the environment names none."""
    address, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    if not address or not port:
        return None
    try:
        return TCPStore(address, int(port), is_master=False, timeout=timedelta(seconds=10))
    except (RuntimeError, ValueError):
        return None
