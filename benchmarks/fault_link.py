"""Jobs of `faults.py` over two hosts (network namespaces) whose link fails, or loses and delays packets."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fault_kinds import LINK_SEED

TESTS = Path(__file__).parents[1] / "tests"
sys.path.insert(0, str(TESTS))

from tools.shaping import Shape  # noqa: E402
from tools.two_host_job import started_job  # noqa: E402
from tools.two_hosts import HOSTS, TwoHosts, why_not  # noqa: E402

__all__ = ["LinkEnded", "run_over_link", "why_not"]

JOB = Path(__file__).with_name("fault_job.py")
PACKETS_LOST = 3
POLL_S = 0.01
SHAPES = {"loss and delay": Shape(delay_s=0.1, loss=0.05, seed=LINK_SEED)}


@dataclass(frozen=True, kw_only=True)
class LinkEnded:
    """How a job over two hosts ended.

    Args:
        code: the larger of the two hosts' exit codes; None: one of them still ran when the time was over.
        left: processes that outlived it.
        gone: when the last process was gone (monotonic clock), or the time was over.
    """

    code: int | None
    left: int
    gone: float


def run_over_link(spec: dict[str, Any], folder: Path, timeout_s: float) -> LinkEnded:
    """Run the job and disturb its link; what the hosts print is in `folder/host-a` and `folder/host-b`.

    Args:
        spec: of the fault.
        folder: of the job.
        timeout_s: until the job is ended from outside.
    """
    shape = SHAPES.get(spec["kind"], Shape(delay_s=0.002))
    reached = folder / "fault"
    with TwoHosts(shape) as hosts, started_job(hosts, JOB, [str(folder), json.dumps(spec)], folder) as agents:
        deadline = time.monotonic() + timeout_s

        def wait_for(what: Any) -> None:
            while not what() and time.monotonic() < deadline:
                time.sleep(POLL_S)

        def over() -> bool:
            return all(agent.poll() is not None for agent in agents.values())

        wait_for(lambda: reached.exists() or any(agent.poll() is not None for agent in agents.values()))
        if spec["kind"] != "loss and delay":
            hosts.down()
            (folder / "go on").touch()
            if spec["kind"] == "link down and back":
                wait_for(lambda: hosts.counts()[0]["cut"] >= PACKETS_LOST or over())
                hosts.up()
        wait_for(lambda: over() and not any(hosts.processes(host) for host in HOSTS))
        codes = [agent.poll() for agent in agents.values()]
        return LinkEnded(
            code=None if None in codes else max(code for code in codes if code is not None),
            left=sum(len(hosts.processes(host)) for host in HOSTS),
            gone=time.monotonic(),
        )
