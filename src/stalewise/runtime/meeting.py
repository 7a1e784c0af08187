"""How the ranks of a job meet: each leaves its name in the store, and waits until all names are there.

    rank 1 ── name ──►  store  ◄── name ── rank 0
      └─ all here? ─ yes ─► connect           └─ all here? ─ no, and start_timeout_s is over ─► who is missing

Connecting before that would wait in torch, which can neither say for whom nor be told that another rank failed.
"""

from __future__ import annotations

import json
import os
import platform
import socket
import time
from dataclasses import asdict, dataclass
from datetime import timedelta

import torch
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from stalewise._version import __version__
from stalewise.errors import ConfigError, ReceiveTimeout, WorkerError
from stalewise.runtime.failure import failure_key, rank_key, start_key

__all__ = ["Member", "meet"]

POLL_S = 0.05
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


def meet(start_timeout_s: float) -> tuple[TCPStore, tuple[Member, ...]]:
    """Wait for all ranks of the job that the environment describes.

    Args:
        start_timeout_s: how long.

    Returns:
        The job's store, and all members in order.

    Raises:
        ConfigError: where the environment describes no job, or ranks run other releases.
        ReceiveTimeout: naming those who are not there in time.
        WorkerError: where another rank failed meanwhile.
    """
    rank, world_size = _number("RANK"), _number("WORLD_SIZE")
    if not 0 <= rank < world_size:
        raise ConfigError(f"RANK is {rank} and WORLD_SIZE {world_size}; ranks are 0 .. WORLD_SIZE - 1.")
    store = _store(rank, start_timeout_s)
    own = {"member": asdict(Member.own(rank)), "releases": _releases(), "world_size": world_size}
    store.set(rank_key(rank), json.dumps({"beat": -1, "status": {}}))
    store.set(start_key(rank), json.dumps(own))
    keys = [start_key(other) for other in range(world_size)]
    deadline = time.monotonic() + start_timeout_s
    while not store.check(keys):
        if store.check([failure_key()]):
            record = json.loads(store.get(failure_key()))
            raise WorkerError(f"{Member.own(rank)} stops because {record['who']} failed: {record['message']}")
        if time.monotonic() > deadline:
            missing = [other for other, key in enumerate(keys) if not store.check([key])]
            if missing:
                raise _late(missing, world_size, start_timeout_s)
        time.sleep(POLL_S)
    everyone = [json.loads(text) for text in store.multi_get(keys)]
    for other in everyone:
        for field in ("releases", "world_size"):
            if other[field] != everyone[0][field]:
                who, first = Member(**other["member"]), Member(**everyone[0]["member"])
                raise ConfigError(
                    f"{who} runs with {field} {other[field]}, {first} with {everyone[0][field]}. Install and start the "
                    "same on all hosts."
                )
    return store, tuple(Member(**other["member"]) for other in everyone)


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
    try:
        store = TCPStore(
            host,
            port,
            is_master=hosts,
            wait_for_workers=False,
            timeout=timedelta(seconds=start_timeout_s),
            multi_tenant=True,
        )
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
