"""How the ranks of a job meet: each leaves its name in the store, and waits until all names are there.

    rank 1 ── name ──►  store  ◄── name ── rank 0
      └─ all here? ─ yes ─► connect           └─ all here? ─ no, and start_timeout_s is over ─► who is missing

Connecting before that would wait in torch, which can neither say for whom nor be told that another rank failed.
"""

from __future__ import annotations

import itertools
import json
import os
import platform
import socket
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta

import torch
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from stalewise._version import __version__
from stalewise.errors import ConfigError, ReceiveTimeout, WorkerError
from stalewise.runtime.failure import failure_key, name_failure, rank_key, read_record, start_key
from stalewise.runtime.store import host_store

__all__ = ["Member", "is_member", "meet"]

POLL_S = 0.05
LOOK_S = 1.0
"""Between two looks at those who are there while others are not."""

STORE_TIMEOUT = timedelta(minutes=5)
"""Of what is asked of a store that is there."""


@dataclass(frozen=True, kw_only=True)
class Member:
    """One rank of the job."""

    rank: int
    host: str
    pid: int

    @classmethod
    def own(cls, rank: int) -> Member:
        """This process."""
        return cls(rank=rank, host=socket.gethostname(), pid=os.getpid())

    def __str__(self) -> str:
        return f"stage {self.rank} (rank {self.rank}, host {self.host}, pid {self.pid})"


@dataclass(frozen=True, kw_only=True)
class _Start:
    """What a rank leaves in the store when it starts."""

    member: Member
    releases: str
    world_size: int

    def text(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def read(cls, text: bytes | str, key: str) -> _Start:
        try:
            fields = json.loads(text)
            return cls(**{**fields, "member": Member(**fields["member"])})
        except (ValueError, TypeError, KeyError, RecursionError):
            raise ConfigError(
                f"the store of the job holds {text[:60]!r} as {key}, which no rank of stalewise {__version__} wrote. "
                "Start the same release on all hosts, and let nothing else use MASTER_PORT."
            ) from None


def meet(start_timeout_s: float) -> tuple[TCPStore, tuple[Member, ...]]:
    """Wait for all ranks of the job that the environment describes.

    Args:
        start_timeout_s: how long.

    Returns:
        The job's store, and all members in order.

    Raises:
        ConfigError: where the environment describes no job, ranks run other releases, or another process is this rank.
        ReceiveTimeout: naming those who are not there in time.
        WorkerError: where another rank failed meanwhile.
    """
    rank, world_size = _number("RANK"), _number("WORLD_SIZE")
    if not 0 <= rank < world_size:
        raise ConfigError(f"RANK is {rank} and WORLD_SIZE {world_size}; ranks are 0 .. WORLD_SIZE - 1.")
    store = _store(rank, start_timeout_s)
    own = _Start(member=Member.own(rank), releases=_releases(), world_size=world_size)
    _enter(store, own)
    keys = [start_key(other) for other in range(world_size)]
    deadline = time.monotonic() + start_timeout_s
    for attempt in itertools.count():
        complete = store.check(keys)
        if complete or attempt % round(LOOK_S / POLL_S) == 0:
            present = keys if complete else [key for key in keys if store.check([key])]
            starts = [_Start.read(store.get(key), key) for key in present]
            _compare(starts)
        if complete:
            return store, tuple(start.member for start in starts)
        if store.check([failure_key()]):
            record = read_record(store.get(failure_key()))
            raise WorkerError(f"{own.member} stops because {name_failure(record)}: {record['message']}")
        if time.monotonic() > deadline:
            missing = [other for other, key in enumerate(keys) if not store.check([key])]
            if missing:
                raise _late(missing, world_size, start_timeout_s)
        time.sleep(POLL_S)
    raise AssertionError("the loop ends by itself")


def is_member(store: TCPStore, rank: int) -> bool:
    """Whether this process is that rank of the job, or may still become it."""
    key = start_key(rank)
    return not store.check([key]) or _Start.read(store.get(key), key).member == Member.own(rank)


def _enter(store: TCPStore, own: _Start) -> None:
    """Leave one's name, unless somebody else has left it under the same rank."""
    rank = own.member.rank
    first = _Start.read(store.compare_set(start_key(rank), "", own.text()), start_key(rank)).member
    if first != own.member:
        raise ConfigError(
            f"{own.member} finds {first} in its place, in the store of the job at {os.environ.get('MASTER_ADDR')}:"
            f"{os.environ.get('MASTER_PORT')}. Every rank starts once; two jobs need two ports (MASTER_PORT)."
        )
    store.set(rank_key(rank), json.dumps({"beat": -1, "status": {}}))


def _compare(starts: Sequence[_Start]) -> None:
    """With rank 0, once it is there."""
    for other in starts if starts[0].member.rank == 0 else ():
        for field in ("releases", "world_size"):
            if getattr(other, field) != getattr(starts[0], field):
                raise ConfigError(
                    f"{other.member} runs with {field} {getattr(other, field)}, {starts[0].member} with "
                    f"{getattr(starts[0], field)}. Install and start the same on all hosts."
                )


def _late(missing: list[int], world_size: int, start_timeout_s: float) -> ReceiveTimeout:
    here = [rank for rank in range(world_size) if rank not in missing]
    return ReceiveTimeout(
        f"{_ranks(missing)} did not start in {start_timeout_s:.4g} s; {_ranks(here)} of {world_size} did. Look at the "
        f"log of rank {missing[0]} first: it was not started, cannot reach {os.environ.get('MASTER_ADDR')}, or waits "
        "before it builds its Pipeline; raise start_timeout_s only if the start really takes that long."
    )


def _ranks(ranks: list[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


def _releases() -> str:
    python = ".".join(platform.python_version_tuple()[:2])
    return f"stalewise {__version__}, torch {torch.__version__.partition('+')[0]}, Python {python}"


def _store(rank: int, start_timeout_s: float) -> TCPStore:
    """The launcher's or torchrun's; where there is none, rank 0 hosts one."""
    host, port = os.environ.get("MASTER_ADDR", ""), _number("MASTER_PORT")
    hosts = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    timeout = timedelta(seconds=start_timeout_s)
    try:
        if hosts:
            store = host_store(host, port, timeout, multi_tenant=True)
        else:
            store = TCPStore(host, port, is_master=False, timeout=timeout)
    except (RuntimeError, ValueError) as error:
        where = f"{host}:{port}"
        reason = str(error).splitlines()[0]
        if hosts:
            raise ConfigError(f"rank 0 cannot host the store of the job at {where}: {reason}.") from None
        raise ReceiveTimeout(
            f"rank {rank} did not reach the store of the job at {where} in {start_timeout_s:.4g} s: {reason}. Look at "
            "the log of rank 0 first; see that MASTER_ADDR and MASTER_PORT are right and that no firewall is between."
        ) from None
    store.set_timeout(STORE_TIMEOUT)
    return store


def _number(name: str) -> int:
    value = os.environ.get(name, "")
    if not value.isdigit():
        raise ConfigError(
            f"{name} is {value!r} in the environment of this rank; it must be a whole number. Start ranks with "
            "stalewise.launch or torchrun, which set RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT."
        )
    return int(value)
