"""How many cores there are for this job on a host, and whether its threads fit them.

Threads of one process that wait for each other spin. Where several processes do so on one core, each waits for
another that is not running, which is many times slower than fewer threads.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence

import torch

from stalewise.runtime.exchange import all_gather_json
from stalewise.runtime.job import Job

__all__ = ["threads_per_process", "usable_cores", "warn_of_too_many_threads"]


def usable_cores() -> int:
    """Cores that this process may run on: a container, taskset or a scheduler may leave it fewer than there are."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def threads_per_process(num_processes: int) -> int:
    """The cores of this host shared evenly; at least 1."""
    return max(1, usable_cores() // num_processes)


def warn_of_too_many_threads(job: Job, device: torch.device) -> None:
    """Warn on the first rank of each host whose stages would run more threads than it has cores; collective.

    Stages on other devices than the CPU count for nothing: their threads mostly wait.
    """
    host, cores = job.members[job.rank].host, usable_cores()
    threads = all_gather_json(torch.get_num_threads() if device.type == "cpu" else 0, job.group)
    here = [member.rank for member in job.members if member.host == host]
    if job.rank == here[0]:
        warning = too_many_threads([threads[rank] for rank in here], cores)
        if warning is not None:
            warnings.warn(warning, stacklevel=3)


def too_many_threads(threads: Sequence[int], cores: int) -> str | None:
    """What to say of the threads of the ranks of a host; None where they fit.

    Args:
        threads: of each rank.
        cores: that they share.
    """
    total = sum(threads)
    if total <= cores:
        return None
    found = f"{len(threads)} ranks on this host run {total} threads on {cores} cores"
    if max(threads) == 1:
        return (
            f"{found}, so stages wait for each other. Use {cores} stages or fewer here for speed; the numbers are "
            "the same."
        )
    fitting = max(1, cores // len(threads))
    return (
        f"{found}, which can be ten times slower than threads that fit. Call torch.set_num_threads({fitting}) in each "
        f"rank, set OMP_NUM_THREADS={fitting}, or give --threads {fitting}."
    )
