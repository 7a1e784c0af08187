"""A job of torchrun over two hosts: stages 0 and 1 on host-a, stage 2 on host-b."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from tools.two_hosts import HOSTS, Host, TwoHosts

__all__ = ["RANKS_ON", "started_job"]

RANKS_ON: dict[Host, int] = {"host-a": 2, "host-b": 1}
PORT = 29400


@contextlib.contextmanager
def started_job(
    hosts: TwoHosts, script: Path, arguments: Sequence[str], folder: Path, environment: Mapping[str, str] | None = None
) -> Iterator[dict[Host, subprocess.Popen[bytes]]]:
    """Start torchrun on both hosts, and end it at the end of the block if it still runs.

    Args:
        hosts: which run it.
        script: of every worker.
        arguments: of the script.
        folder: gets what the hosts print, as files named after them.
        environment: on top of this process's own.
    """
    with contextlib.ExitStack() as stack:
        agents: dict[Host, subprocess.Popen[bytes]] = {}
        for index, host in enumerate(HOSTS):
            output = stack.enter_context(open(folder / host, "wb"))
            # static: what the agents need of each other crosses the link at the start alone
            torchrun = f"-m torch.distributed.run --nnodes {len(HOSTS)} --node-rank {index} --rdzv-backend static"
            torchrun += f" --nproc-per-node {RANKS_ON[host]} --master-addr {HOSTS[0]} --master-port {PORT}"
            agents[host] = hosts.start(
                host,
                [sys.executable, *torchrun.split(), str(script), *arguments],
                output=output,
                environment={"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR", **(environment or {})},
            )
            stack.callback(_end, agents[host])
        yield agents


def _end(process: subprocess.Popen[bytes]) -> None:
    """The agent's own children, if it has any left, end with their host."""
    if process.poll() is None:
        process.kill()
        process.wait()
