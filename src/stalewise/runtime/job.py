"""The job that this process is a rank of: process group, store, and who the others are.

A job is started by `stalewise.launch` or by torchrun; both describe it in the environment (RANK, WORLD_SIZE,
LOCAL_RANK, MASTER_ADDR, MASTER_PORT). A group that the user initialised is used as it is.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from types import TracebackType

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore  # type: ignore[attr-defined]

from stalewise.errors import ConfigError, WorkerError
from stalewise.runtime.allocator import keep_freed_memory
from stalewise.runtime.exchange import all_gather_json
from stalewise.runtime.failure import connect_to_store, failure_header, record_failure
from stalewise.runtime.meeting import Member, is_member, meet
from stalewise.runtime.monitor import Monitor
from stalewise.runtime.patience import FIRST_S

__all__ = ["Job", "Member", "current_job", "in_launched_job", "leave_job", "report_failure", "restart_count"]

GROUP_TIMEOUT = timedelta(days=7)
"""Of collectives and messages; stalls are found by the receivers' own timeout, deaths by the monitor."""

CLOCK_ROUNDS = 16
PARTING_POLL_S = 0.01


@dataclass(frozen=True, kw_only=True)
class Job:
    """A job whose ranks have met.

    Args:
        rank: of this process.
        local_rank: among the processes of this host.
        members: all ranks, in order.
        group: gloo, of all ranks; stalewise's own.
        monitor: watches for failures of others.
        clock: nanoseconds, aligned with the clock of rank 0.
        closers: called before the ranks part.
    """

    rank: int
    local_rank: int
    members: tuple[Member, ...]
    group: dist.ProcessGroup
    monitor: Monitor
    clock: Callable[[], int]
    closers: list[Callable[[], None]] = field(default_factory=list)

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return len(self.members)


def in_launched_job() -> bool:
    """Whether this process is one of several ranks."""
    if dist.is_available() and dist.is_initialized():
        return True
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


_job: Job | None = None


def current_job(*, start_timeout_s: float = FIRST_S) -> Job:
    """The job of this process; joins it at the first call, which all ranks must make.

    Args:
        start_timeout_s: how long to wait for the others to start.

    Raises:
        ReceiveTimeout: where a rank did not start in time.
        ConfigError: where ranks run other releases.
    """
    global _job
    if _job is None:
        _job = _join(start_timeout_s)
        atexit.register(_leave_at_exit)
        sys.excepthook = _report_and_exit
    return _job


def leave_job() -> None:
    """Part from the other ranks when all are ready to; nothing happens where no job was joined.

    gloo lets a complete transfer fail where the peer's connection closes before the waiting thread wakes up. So no rank
    closes its connections before all are here; what fails from then on fails because others have left.

    Raises:
        WorkerError: where another rank fails meanwhile.
    """
    global _job
    if _job is not None:
        job, _job = _job, None
        for close in job.closers:
            close()
        parting = job.group.barrier()
        while not parting.is_completed():
            if (cause := job.monitor.cause()) is not None:
                raise cause
            time.sleep(PARTING_POLL_S)
        job.monitor.stop()
        if dist.is_initialized():
            dist.destroy_process_group()


def report_failure(error: BaseException) -> None:
    """Tell the other ranks that this one fails, whether it joined the job or not."""
    if _job is not None:
        _job.monitor.report(error, batch=None, action=None)
    else:
        rank = environment_number("RANK") or 0
        store = connect_to_store()
        # Who came to a job that it is no part of ends alone.
        with contextlib.suppress(RuntimeError, ConfigError):
            if store is not None and not is_member(store, rank):
                store = None
        record_failure(error, rank=rank, who=str(Member.own(rank)), store=store)


def _leave_at_exit() -> None:
    """Under torchrun; an error at the very end must not look like success."""
    try:
        leave_job()
    except BaseException as error:
        _report_and_exit(type(error), error, error.__traceback__)


def _report_and_exit(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """The last act of a worker under torchrun: the header, the original traceback, and out.

    Threads that wait for peers would keep the interpreter from ending, so the process ends here. Threads of
    multiprocessing call the hook too, for errors that end nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        sys.__excepthook__(kind, error, trace)
        return
    if isinstance(error, WorkerError):
        print(f"stalewise: {error}", file=sys.stderr)
    else:
        report_failure(error)
        cause = None if _job is None else _job.monitor.cause()
        if cause is not None and failure_header(error) is None:
            print(f"stalewise: {cause}", file=sys.stderr)
        else:
            if (header := failure_header(error)) is not None:
                print(header, file=sys.stderr)
            sys.__excepthook__(kind, error, trace)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)


def _join(start_timeout_s: float) -> Job:
    """Meet the others, then connect: from the first on, a rank that is missing can be named."""
    if not dist.is_initialized():
        store, members = meet(start_timeout_s)
        rank = int(os.environ["RANK"])
        monitor = Monitor(rank, [str(member) for member in members])
        # torchrun's store outlives a restart, and with it the addresses under which ranks of earlier lives listened.
        of_this_life = PrefixStore(f"stalewise/{restart_count()}", store)
        dist.init_process_group("gloo", store=of_this_life, rank=rank, world_size=len(members), timeout=GROUP_TIMEOUT)
        group = dist.new_group(backend="gloo", timeout=GROUP_TIMEOUT)
    else:
        rank = dist.get_rank()
        group = dist.new_group(backend="gloo", timeout=GROUP_TIMEOUT)
        members = tuple(Member(**member) for member in all_gather_json(asdict(Member.own(rank)), group))
        monitor = Monitor(rank, [str(member) for member in members])
    keep_freed_memory()
    offset = _clock_offset(rank, members, group)
    host = members[rank].host
    return Job(
        rank=rank,
        local_rank=sum(member.host == host for member in members[:rank]),
        members=members,
        group=group,
        monitor=monitor,
        clock=lambda: time.perf_counter_ns() + offset,
    )


def _clock_offset(rank: int, members: tuple[Member, ...], group: dist.ProcessGroup) -> int:
    """Nanoseconds to add to this rank's clock to get rank 0's.

    Ranks of one host share the monotonic clock. For others the offset is taken at the quickest of some round trips,
    half of which bounds its error.
    """
    offset = 0
    for other in range(1, len(members)):
        if members[other].host == members[0].host:
            continue
        if rank == 0:
            for _ in range(CLOCK_ROUNDS):
                _receive_number(other, group)
                _send_number(time.perf_counter_ns(), other, group)
        elif rank == other:
            offset = min(_round_trip(group) for _ in range(CLOCK_ROUNDS))[1]
    return offset


def _round_trip(group: dist.ProcessGroup) -> tuple[int, int]:
    start = time.perf_counter_ns()
    _send_number(0, 0, group)
    there = _receive_number(0, group)
    end = time.perf_counter_ns()
    return end - start, there - (start + end) // 2


def _send_number(value: int, rank: int, group: dist.ProcessGroup) -> None:
    dist.send(torch.tensor([value], dtype=torch.int64), rank, group=group)


def _receive_number(rank: int, group: dist.ProcessGroup) -> int:
    received: Tensor = torch.zeros(1, dtype=torch.int64)
    dist.recv(received, rank, group=group)
    return int(received.item())


def restart_count() -> int:
    """How often this job was started again; 0 in its first life."""
    return environment_number("TORCHELASTIC_RESTART_COUNT") or 0


def environment_number(name: str) -> int | None:
    """A whole number from the environment, or None."""
    value = os.environ.get(name)
    return int(value) if value is not None and value.isdigit() else None
