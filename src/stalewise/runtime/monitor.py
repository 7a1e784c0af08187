"""How one worker's failure ends the others.

Every worker's monitor looks for a record of a failure a few times a second, wakes its worker where it waits for a
message, and ends the process if it does not stop by itself:

    worker 1 raises ─► record ─► store ◄─ monitor 0, 2: wake ─► WorkerError ─► exit 1
                                              └─ GRACE_S later, if still alive ─► os._exit(1)

A worker that can leave no record, because it is stopped or its host is gone, is missed: every monitor also leaves signs
of life in the store with what its worker is doing, looks for those of the others, and leaves the record for a rank that
shows none.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from stalewise.errors import PeerLost, ReceiveTimeout, StalewiseError, WorkerError
from stalewise.runtime.failure import (
    connect_to_store,
    describe_doing,
    failure_header,
    failure_key,
    name_failure,
    rank_key,
    read_record,
    record_failure,
)
from stalewise.runtime.patience import Patience

__all__ = ["WAITING", "Monitor"]

POLL_S = 0.2
STATUS_S = 0.5
GRACE_S = 5.0
QUIET_S = 3 * STATUS_S
"""Without a sign of life after which a rank is said to show none."""

CAUSE_WAIT_S = 1.5
"""How long a worker that lost a peer waits for the peer's own account of it."""

_FROM_ABOVE = frozenset({"receive activation"})
_FROM_BELOW = frozenset({"receive gradient", "receive loss"})
"""Actions that wait for a neighbour."""
WAITING = "wait for a message"
"""What an elastic rank does that waits for either of its neighbours."""


@dataclass
class _Sight:
    """What this rank saw of another.

    Args:
        who: it is, in messages.
        beat: its last sign of life, a number that grows.
        status: it gave with that.
        seen_s: when the sign came.
        since_s: when it began with what it is doing.
    """

    who: str
    beat: int = -1
    status: dict[str, Any] = field(default_factory=dict)
    seen_s: float = 0.0
    since_s: float = 0.0

    @property
    def doing(self) -> str:
        """In words; empty where nothing is known."""
        return describe_doing(self.status)

    @property
    def action(self) -> str | None:
        """What it is doing."""
        return self._doing[0]

    @property
    def batch(self) -> int | None:
        """Of that."""
        return self._doing[1]

    @property
    def _doing(self) -> tuple[str | None, int | None]:
        action, batch = self.status.get("doing") or (None, None)
        return action, batch


class Monitor:
    """Watches the store for failures from a thread of its own, and gives and looks for signs of life.

    Args:
        rank: of this process.
        members: who the ranks are in records.
    """

    def __init__(self, rank: int, members: Sequence[str]) -> None:
        self._rank = rank
        self._who = members[rank]
        self._store = connect_to_store()
        self._wakers: list[Callable[[WorkerError], None]] = []
        self._status: Callable[[], dict[str, Any]] = dict
        self._patience = Patience()
        self._sights = [_Sight(who) for who in members]
        self._running_s = 0.0
        self._looked_s = -QUIET_S
        self._cause: WorkerError | None = None
        self._known = threading.Event()
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None
        if self._store is not None:
            self._thread = threading.Thread(target=self._watch, name="monitor", daemon=True)
            self._thread.start()

    def on_failure(self, wake: Callable[[WorkerError], None]) -> None:
        """Call `wake` when another worker has failed; at once where one has."""
        self._wakers.append(wake)
        if self._cause is not None:
            wake(self._cause)

    def publish(self, status: Callable[[], dict[str, Any]], patience: Patience) -> None:
        """Show `status()` to the other ranks twice a second.

        Args:
            status: of this worker, JSON values; "doing" is the action and the batch that it is at, or None.
            patience: with other ranks.
        """
        self._status = status
        self._patience = patience

    def statuses(self) -> dict[int, dict[str, Any]]:
        """The last status of each rank; empty where it published none yet."""
        return {rank: sight.status for rank, sight in enumerate(self._sights)}

    def explain(self, rank: int) -> str:
        """A sentence on what is known of a rank for which this one waits in vain."""
        sight = self._sights[rank]
        if time.monotonic() - self._looked_s > 2 * QUIET_S:  # the store is out of reach itself
            return ""
        named, seen = "It", {rank}
        while self._silent_s(sight) < QUIET_S and (other := self._awaited_by(rank, seen)) is not None:
            rank, sight = other, self._sights[other]
            seen.add(rank)
            named = f"It waits for others itself, in the end for {sight.who}, which"
        doing = f", {sight.doing}" if sight.doing else ""
        if self._silent_s(sight) >= QUIET_S:
            return f" {named} has shown no sign of life for {self._silent_s(sight):.1f} s{doing}."
        return f" {named} is alive{doing}{f' for {self._running_s - sight.since_s:.1f} s' if doing else ''}."

    def _awaited_by(self, rank: int, seen: set[int]) -> int | None:
        """The neighbour that a rank waits for; of two, rather the one that waits for nobody. None: it does not wait."""
        action = self._sights[rank].action
        above = [rank - 1] if action == WAITING or action in _FROM_ABOVE else []
        below = [rank + 1] if action == WAITING or action in _FROM_BELOW else []
        others = [other for other in (*below, *above) if 0 <= other < len(self._sights) and other not in seen]
        waits = {WAITING, *_FROM_ABOVE, *_FROM_BELOW}
        return min(others, key=lambda other: self._sights[other].action in waits, default=None)

    def report(self, error: BaseException, *, batch: int | None, action: str | None) -> WorkerError | None:
        """Record a failure of this worker. Where another one failed first, that is recorded already, and returned.

        One that lost a peer waits a moment for the peer's own account.
        """
        if self._cause is None and _is_lost_peer(error) and failure_header(error) is None:
            self._known.wait(CAUSE_WAIT_S)
        if self._cause is None:
            first = record_failure(error, rank=self._rank, who=self._who, batch=batch, action=action, store=self._store)
            if first is not None:
                self._cause = self._because_of(first)
        return self._cause

    def stop(self) -> None:
        """End the thread."""
        self._stopped.set()
        if self._thread is not None:
            self._thread.join(GRACE_S)

    def cause(self) -> WorkerError | None:
        """The failure of another worker that ended this one, if there was one."""
        return self._cause

    def _watch(self) -> None:
        assert self._store is not None
        rounds = 0
        before = time.monotonic()
        while not self._stopped.wait(POLL_S):
            # Time in which this process itself stood still says nothing about the others.
            now = time.monotonic()
            self._running_s += min(now - before, 2 * POLL_S)
            before = now
            try:
                if self._store.check([failure_key()]):
                    record = read_record(self._store.get(failure_key()))
                    if record["rank"] != self._rank:
                        self._end(record)
                    return
                if rounds % round(STATUS_S / POLL_S) == 0:
                    self._give_sign(rounds)
                    self._look_for_signs()
                    if self._known.is_set():
                        return
            except RuntimeError:
                if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
                    self._end({"who": "the launcher", "traceback": "its store does not answer; the job is over."})
                return
            rounds += 1

    def _give_sign(self, beat: int) -> None:
        assert self._store is not None
        self._store.set(rank_key(self._rank), json.dumps({"beat": beat, "status": self._status()}))

    def _look_for_signs(self) -> None:
        assert self._store is not None
        keys = [rank_key(rank) for rank in range(len(self._sights))]
        if not self._store.check(keys):
            return
        for rank, text in enumerate(self._store.multi_get(keys)):
            (beat, status), sight = _read_sign(text), self._sights[rank]
            before = sight.doing
            if beat is not None and beat != sight.beat:
                sight.beat, sight.status, sight.seen_s = beat, status, self._running_s
            if sight.doing != before:
                sight.since_s = self._running_s
            if rank != self._rank and self._silent_s(sight) > self._patience.silence_s:
                self._miss(rank, sight)
        self._looked_s = time.monotonic()

    def _silent_s(self, sight: _Sight) -> float:
        return self._running_s - sight.seen_s

    def _miss(self, rank: int, sight: _Sight) -> None:
        """Leave a record for a rank that can leave none, and stop because of it."""
        doing = describe_doing(self._status())
        text = (
            f"{sight.who} has shown no sign of life for {self._silent_s(sight):.1f} s. It was stopped, it hangs "
            f"outside of Python, or its host or the network to it is gone. "
            f"{f'{self._who} is {doing}. ' if doing else ''}Look at the log of rank {rank} first."
        )
        first = record_failure(
            ReceiveTimeout(text),
            rank=rank,
            who=sight.who,
            batch=sight.batch,
            action=sight.action,
            store=self._store,
        )
        if first is not None and first["rank"] == self._rank:
            return  # which has just failed itself, and says so
        own = {"who": sight.who, "batch": sight.batch, "action": sight.action}
        self._end(first or {**own, "traceback": f"ReceiveTimeout: {text}"})

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
        return WorkerError(f"{self._who} stops because {name_failure(record)}: {first_line}")


def _is_lost_peer(error: BaseException) -> bool:
    return isinstance(error, PeerLost) or (
        isinstance(error, RuntimeError) and not isinstance(error, StalewiseError) and "Connection" in str(error)
    )


def _read_sign(text: bytes) -> tuple[int | None, dict[str, Any]]:
    """Beat and status; None for what no monitor wrote, which the rank's next sign replaces."""
    with suppress(ValueError, TypeError, KeyError, RecursionError):
        sign = json.loads(text)
        doing = sign["status"].get("doing") if isinstance(sign["status"], dict) else ()
        if isinstance(sign["beat"], int) and (doing is None or len(doing) == 2):
            return sign["beat"], sign["status"]
    return None, {}
