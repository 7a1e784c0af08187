"""Processes that are killed, stopped or interrupted."""

from __future__ import annotations

import re
import signal
import socket

import pytest
from dist_faults import FAULT_BATCH
from dist_jobs import Ended

pytestmark = [pytest.mark.dist, pytest.mark.slow]

LIMIT_S = 10.0


def name_of(job: Ended, stage: int) -> str:
    """How messages name a stage."""
    pid = (job.folder / f"rank.{stage}").read_text()
    return f"stage {stage} (rank {stage}, host {socket.gethostname()}, pid {pid})"


@pytest.mark.parametrize("stage", range(3))
def test_a_worker_is_killed(stage: int, ended: dict[str, Ended]) -> None:
    job = ended[f"kill stage {stage}"]
    assert (job.error, job.cause_type) == ("WorkerError", "Killed")
    killed = f"{name_of(job, stage)} was killed by SIGKILL."
    assert job.message == f"{killed} It was in forward of batch {FAULT_BATCH}. The system may have run out of memory."
    assert job.seconds_until_gone < LIMIT_S
    assert job.left == ()
    assert "Traceback" not in job.output


def test_a_worker_is_killed_in_the_loader(ended: dict[str, Ended]) -> None:
    job = ended["kill in the loader"]
    was_in = f"It was in load of batch {FAULT_BATCH}."
    assert job.message == f"{name_of(job, 0)} was killed by SIGKILL. {was_in} The system may have run out of memory."


def test_a_worker_is_killed_between_two_steps(ended: dict[str, Ended]) -> None:
    """In the user's loop over the losses; the last action was a later batch's, or the update of this one's."""
    job = ended["kill between two steps"]
    start = f"{name_of(job, 1)} was killed by SIGKILL. It was in code that no pipeline calls, after batch "
    assert job.message.startswith(start)
    assert FAULT_BATCH <= int(job.message.removeprefix(start).partition(".")[0]) <= FAULT_BATCH + 2


def test_a_worker_is_told_to_end(ended: dict[str, Ended]) -> None:
    """By somebody else than its parent, as by an administrator."""
    job = ended["terminate stage 1"]
    assert (job.error, job.cause_type) == ("WorkerError", "Killed")
    assert job.message.startswith(f"{name_of(job, 1)} was killed by SIGTERM.")
    assert job.seconds_until_gone < LIMIT_S
    assert (job.output, job.left) == ("", ())


@pytest.mark.parametrize("stopped", range(3))
def test_a_worker_is_stopped(stopped: int, ended: dict[str, Ended]) -> None:
    """Nothing dies, but a neighbour's timeout says whom it waited for, and for what.

    That neighbour is the first whose time is over: next to the stopped one, or behind one that waits itself.
    """
    job = ended[f"stop stage {stopped}"]
    assert (job.error, job.cause_type) == ("WorkerError", "ReceiveTimeout")
    header, text = job.message.split("\n")
    reporting = next(stage for stage in range(3) if header.startswith(name_of(job, stage)))
    silent = reporting + (1 if stopped > reporting else -1)
    kind = "gradient" if silent > reporting else "activation"
    batch = int(header.rpartition("batch ")[2].partition(",")[0])
    assert FAULT_BATCH - 4 <= batch <= FAULT_BATCH
    assert header == f"{name_of(job, reporting)} failed, batch {batch}, receive {kind}:"
    assert text.startswith(f"ReceiveTimeout: got no {kind} of batch {batch} from {name_of(job, silent)} in 2.5 s; ")
    assert text.endswith(
        f" Look at the log of rank {silent} first; raise recv_timeout_s only if a step really takes that long."
    )
    explained = re.search(r"; (?:the last was \d+|nothing came before)\. (It .*) Look at", text)
    assert explained is not None, text
    if silent != stopped:
        assert f"in the end for {name_of(job, stopped)}, which " in explained[1]
    assert job.seconds_until_gone < LIMIT_S
    assert job.left == ()


def test_control_c(ended: dict[str, Ended]) -> None:
    """SIGINT to the process group of the parent: one clean end, with the data loader's processes."""
    job = ended["interrupt"]
    assert job.error == "KeyboardInterrupt"
    assert job.output == ""
    assert job.seconds_until_gone < LIMIT_S
    assert job.left == ()
    assert len(list(job.folder.glob("loader.*"))) == 2


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("kill parent", signal.SIGKILL),
        ("terminate parent", signal.SIGTERM),
        ("kill parent before the workers meet", signal.SIGKILL),
    ],
)
def test_the_parent_dies(name: str, number: signal.Signals, ended: dict[str, Ended]) -> None:
    """Its workers, and what they started, end themselves."""
    job = ended[name]
    assert job.exit_code == -number
    assert job.seconds_until_gone < LIMIT_S
    assert job.left == ()
