"""How one worker's failure ends the others, and how they all know the first cause.

The first worker that fails writes a record to the job's store (a compare-and-set, so there is only one first).
Every worker's monitor looks there a few times a second, wakes its worker where it waits for a message, and ends the
process if it does not stop by itself:

    worker 1 raises ─► record ─► store ◄─ monitor 0, 2: wake ─► WorkerError ─► exit 1
                                              └─ GRACE_S later, if still alive ─► os._exit(1)

The store is that of the launcher or of torchrun; it outlives any worker. (Where rank 0 hosts it, it may end before the
other ranks do; then they just stop watching.) Where there is none, dead peers are still found by their closed
connections.
"""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from torch.distributed import TCPStore  # type: ignore[attr-defined]

from stalewise.errors import PeerLost, ReceiveTimeout, WorkerError

__all__ = [
    "Monitor",
    "connect_to_store",
    "describe_failure",
    "failure_header",
    "failure_key",
    "record_failure",
]

POLL_S = 0.2
STATUS_S = 0.5
GRACE_S = 5.0
CAUSE_WAIT_S = 1.5
"""How long a worker that lost a peer waits for the peer's own account of it."""

STORE_WAIT_S = 5.0
"""How long a failing worker waits for the store; on a link that is down TCP would wait for a quarter of an hour."""


def failure_key(restart: int | None = None) -> str:
    """Where the record of the first failure lies in the store.

    Args:
        restart: how often the job was started before; None: as the environment of this worker says.
    """
    count = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if restart is None else restart
    return f"stalewise/{count}/failure"


def describe_failure(record: dict[str, Any]) -> str:
    """The record as text: who, where, and the original traceback."""
    at = f", batch {record['batch']}" if record.get("batch") is not None else ""
    doing = f", {record['action']}" if record.get("action") else ""
    return f"{record['who']} failed{at}{doing}:\n{record['traceback'].rstrip()}"


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
    earlier: dict[str, Any] = json.loads(first)
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


_HEADER = "__stalewise_header__"


def failure_header(error: BaseException) -> str | None:
    """Who failed and where, of an error that was recorded; else None."""
    return getattr(error, _HEADER, None)


class Monitor:
    """Watches the store for failures from a thread of its own, and publishes this worker's status.

    Args:
        rank: of this process.
        who: of this process in records.
    """

    def __init__(self, rank: int, who: str) -> None:
        self._rank = rank
        self._who = who
        self._store = connect_to_store()
        self._wakers: list[Callable[[WorkerError], None]] = []
        self._status: Callable[[], dict[str, Any]] | None = None
        self._statuses: dict[int, dict[str, Any]] = {}
        self._cause: WorkerError | None = None
        self._known = threading.Event()
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None
        if self._store is not None:
            self._thread = threading.Thread(target=self._watch, name="monitor", daemon=True)
            self._thread.start()

    def on_failure(self, wake: Callable[[WorkerError], None]) -> None:
        """Call `wake` when another worker has failed."""
        self._wakers.append(wake)

    def publish(self, status: Callable[[], dict[str, Any]], *, watch: range) -> None:
        """Show `status()` (JSON values) to the other ranks twice a second, and look at theirs.

        Args:
            status: of this worker.
            watch: ranks whose status `statuses` gives.
        """
        self._statuses = {rank: {} for rank in watch}
        self._status = status

    def statuses(self) -> dict[int, dict[str, Any]]:
        """The last status of each watched rank; empty where it published none yet."""
        return dict(self._statuses)

    def report(self, error: BaseException, *, batch: int | None, action: str | None) -> None:
        """Record a failure of this worker, unless another one was first, which then is the `cause`."""
        if self._cause is None and not (isinstance(error, PeerLost) and self._known.wait(CAUSE_WAIT_S)):
            first = record_failure(error, rank=self._rank, who=self._who, batch=batch, action=action, store=self._store)
            if first is not None:
                self._cause = self._because_of(first)

    def stop(self) -> None:
        """End the thread."""
        self._stopped.set()
        if self._thread is not None:
            self._thread.join(GRACE_S)

    def cause(self) -> WorkerError | None:
        """The failure of another worker that ended this one, if there was one."""
        return self._cause

    def wait_for_cause(self) -> WorkerError | None:
        """The same, waiting a moment for it: for workers that lost a peer."""
        self._known.wait(CAUSE_WAIT_S)
        return self._cause

    def _watch(self) -> None:
        assert self._store is not None
        rounds = 0
        while not self._stopped.wait(POLL_S):
            try:
                if self._store.check([failure_key()]):
                    record = json.loads(self._store.get(failure_key()))
                    if record["rank"] != self._rank:
                        self._end(record)
                    return
                if rounds % round(STATUS_S / POLL_S) == 0:
                    self._exchange_status()
            except RuntimeError:
                if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
                    self._end({"who": "the launcher", "traceback": "its store does not answer; the job is over."})
                return
            rounds += 1

    def _exchange_status(self) -> None:
        assert self._store is not None
        if self._status is not None:
            self._store.set(f"stalewise/status/{self._rank}", json.dumps(self._status()))
        for rank in list(self._statuses):
            key = f"stalewise/status/{rank}"
            if self._store.check([key]):
                self._statuses[rank] = json.loads(self._store.get(key))

    def _end(self, record: dict[str, Any]) -> None:
        """Stop this worker because of another: ask first, insist after `GRACE_S`."""
        self._cause = self._because_of(record)
        self._known.set()
        for wake in self._wakers:
            wake(self._cause)
        if not self._stopped.wait(GRACE_S):
            print(f"stalewise: {self._cause}", file=sys.stderr, flush=True)
            os._exit(1)

    def _because_of(self, record: dict[str, Any]) -> WorkerError:
        first_line = record["traceback"].strip().splitlines()[-1]
        return WorkerError(f"{self._who} stops because {record['who']} failed: {first_line}")


def connect_to_store() -> TCPStore | None:
    """A connection of our own to the job's store; None where the environment names none."""
    address, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    if not address or not port:
        return None
    try:
        return TCPStore(address, int(port), is_master=False, timeout=timedelta(seconds=10))
    except (RuntimeError, ValueError):
        return None
