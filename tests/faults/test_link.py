"""Three stages over two hosts whose link fails: stages 0 and 1 on one host, stage 2 on the other, under torchrun."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dist_link
import pytest
import torch
from dist_equal import assert_equal
from tools.shaping import Shape
from tools.two_host_job import RANKS_ON, started_job
from tools.two_hosts import HOSTS, Host, TwoHosts, why_not

pytestmark = [
    pytest.mark.dist,
    pytest.mark.slow,
    pytest.mark.skipif(why_not() is not None, reason=str(why_not())),
]

RECV_TIMEOUT_S = 5.0
LIMIT_S = 30.0
"""From the timeout until torchrun and all that it started are gone."""

PATIENCE_S = 240.0
PACKETS_LOST = 3
SCRIPT = Path(dist_link.__file__)


@dataclass(frozen=True)
class Finished:
    """A job that has ended, or was ended.

    Args:
        codes: exit codes of torchrun by host; None: it still ran after `PATIENCE_S`.
        outputs: what it printed.
        seconds: from the fault until the last process was gone.
        left: processes that outlived it.
        counts: packets there and back.
        folder: with the results.
    """

    codes: dict[Host, int | None]
    outputs: dict[Host, str]
    seconds: float
    left: list[int]
    counts: tuple[dict[str, int], dict[str, int]]
    folder: Path


def stays_down(hosts: TwoHosts, folder: Path) -> None:
    hosts.down()
    (folder / "go on").touch()


def comes_back(hosts: TwoHosts, folder: Path) -> None:
    stays_down(hosts, folder)
    wait_for(lambda: hosts.counts()[0]["cut"] >= PACKETS_LOST)
    hosts.up()


JOBS: dict[str, tuple[Shape, float, Callable[[TwoHosts, Path], None] | None]] = {
    "down for good": (Shape(delay_s=0.002), RECV_TIMEOUT_S, stays_down),
    "down and back": (Shape(delay_s=0.002), PATIENCE_S, comes_back),
    "5% loss, 100 ms": (Shape(delay_s=0.1, loss=0.05, seed=1), PATIENCE_S, None),
}


def wait_for(what: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not what():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.01)


def run(name: str, folder: Path) -> Finished:
    shape, timeout_s, fault = JOBS[name]
    arguments = [str(folder), str(timeout_s), "held" if fault else "free"]
    with TwoHosts(shape) as hosts, started_job(hosts, SCRIPT, arguments, folder) as agents:
        if fault is not None:
            reached = folder / "reached"
            wait_for(lambda: reached.exists() or any(agent.poll() is not None for agent in agents.values()))
            fault(hosts, folder)
        began = time.monotonic()
        while time.monotonic() < began + PATIENCE_S and any(agent.poll() is None for agent in agents.values()):
            time.sleep(0.01)
        return Finished(
            codes={host: agent.poll() for host, agent in agents.items()},
            seconds=time.monotonic() - began,
            left=[pid for host in HOSTS for pid in hosts.processes(host)],
            counts=hosts.counts(),
            outputs={host: (folder / host).read_text() for host in HOSTS},
            folder=folder,
        )


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Finished]:
    """All jobs, run beside each other: each new process takes seconds to import torch."""
    with ThreadPoolExecutor(len(JOBS)) as pool:
        futures = {name: pool.submit(run, name, tmp_path_factory.mktemp("link")) for name in JOBS}
        return {name: future.result() for name, future in futures.items()}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a run of all stages in one process leaves."""
    return dist_link.train(tmp_path_factory.mktemp("alone"), held=False, engine="sequential")


def assert_undisturbed(job: Finished, expected: dict[str, Any]) -> None:
    assert job.codes == dict.fromkeys(HOSTS, 0), job.outputs
    assert job.left == []
    for rank in range(sum(RANKS_ON.values())):
        result = torch.load(job.folder / f"result.{rank}.pt")
        for what in ("losses", "state", "optimizer"):
            assert_equal(result[what], expected[what], f"{what} of rank {rank}")


def test_down_for_longer_than_the_timeout(finished: dict[str, Finished]) -> None:
    """Each host sees the other fall silent; on each the job ends, with one cause that names who is silent.

    On host-a two stages wait, and one of them is the first whose time is over; on host-b there is but one.
    """
    job = finished["down for good"]
    assert job.left == []
    assert set(job.codes.values()) == {1}, job.outputs
    assert job.seconds < RECV_TIMEOUT_S + LIMIT_S
    for host, ranks in (("host-a", (0, 1)), ("host-b", (2,))):
        lines = job.outputs[host].splitlines()
        (header,) = (line for line in lines if line.startswith("stage ") and " failed, batch " in line)
        (cause,) = (line for line in lines if "stalewise.errors.ReceiveTimeout: " in line)
        assert any(header.startswith(f"stage {rank} (rank {rank}, host {host}, pid ") for rank in ranks)
        reporting = int(header.split()[1])
        silent = 1 if host == "host-b" else reporting + 1
        kind = "activation" if host == "host-b" else "gradient"
        assert header.endswith(f", receive {kind}:")
        assert f"got no {kind} of batch " in cause
        assert f" from stage {silent} (rank {silent}, host {'host-b' if silent == 2 else 'host-a'}, pid " in cause
        assert f" in {RECV_TIMEOUT_S:g} s; " in cause
    stops = [line for line in job.outputs["host-a"].splitlines() if " stops because stage " in line]
    assert len(stops) == 1, f"of two stages one is the cause, and the other says so: {job.outputs['host-a']}"
    assert not list(job.folder.glob("result.*"))


def test_down_and_back_within_the_timeout(finished: dict[str, Finished], undisturbed: dict[str, Any]) -> None:
    job = finished["down and back"]
    assert_undisturbed(job, undisturbed)
    assert job.counts[0]["cut"] >= PACKETS_LOST


def test_loss_and_delay_all_the_time(finished: dict[str, Finished], undisturbed: dict[str, Any]) -> None:
    job = finished["5% loss, 100 ms"]
    assert_undisturbed(job, undisturbed)
    assert all(count["lost"] > 0 for count in job.counts)
