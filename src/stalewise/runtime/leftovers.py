"""What processes that are killed leave behind, and nobody else removes (Linux; elsewhere nothing is found).

A data loader's process passes tensors on in shared memory that has a name for a moment only. One that is killed in that
moment leaves it to the system.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

__all__ = ["group_members", "remove_shared_memory", "wait_until_dead"]

_SHARED_MEMORY = Path("/dev/shm")


def group_members(group: int) -> list[int]:
    """The processes of a process group that are alive."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError, ValueError):
            state, _, own_group, *_ = stat.read_text().rpartition(")")[2].split()
            if int(own_group) == group and state not in "ZX":
                found.append(int(stat.parent.name))
    return found


def wait_until_dead(pids: Iterable[int], timeout_s: float) -> None:
    """Until all of them have ended, or the time is over."""
    deadline = time.monotonic() + timeout_s
    for pid in pids:
        while _is_alive(pid) and time.monotonic() < deadline:
            time.sleep(0.001)


def remove_shared_memory(pids: Iterable[int]) -> None:
    """Remove the shared memory that torch made in these processes, which are dead; what others hold stays theirs."""
    for pid in pids:
        for file in _SHARED_MEMORY.glob(f"torch_{pid}_*"):
            with suppress(OSError):
                file.unlink()


def _is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False
