"""An exception in any worker ends the job soon, and its traceback is shown once."""

from __future__ import annotations

import socket

import pytest
from dist_cases import EXITS, IN_THE_PIPELINE, OUTSIDE, SIGNALS
from dist_faults import FAULT_BATCH
from dist_jobs import Ended

pytestmark = [pytest.mark.dist, pytest.mark.slow]

LIMIT_S = 10.0


def name_of(job: Ended, stage: int) -> str:
    """How messages name a stage."""
    pid = (job.folder / f"rank.{stage}").read_text()
    return f"stage {stage} (rank {stage}, host {socket.gethostname()}, pid {pid})"


def assert_reported(job: Ended, stage: int, where: str) -> None:
    """The job ended in time, whole, with one traceback, headed by who, where and when."""
    assert job.error == "WorkerError"
    assert job.cause_type == "Boom"
    assert job.seconds_until_gone < LIMIT_S
    assert job.left == ()
    lines = job.message.splitlines()
    assert lines[0] == f"{name_of(job, stage)} failed{where}:"
    assert lines[1] == "Traceback (most recent call last):"
    assert f"dist_faults.Boom: on rank {stage}" in job.message
    everything = job.message + job.output
    assert everything.count(", in explode\n") == 1, everything
    assert job.output == "", "the parent shows it; the workers show nothing"


def test_a_job_without_a_fault(ended: dict[str, Ended]) -> None:
    """The jobs below do end well but for their fault."""
    job = ended["nothing happens"]
    assert (job.error, job.exit_code, job.left, job.output) == (None, 0, (), "")


@pytest.mark.parametrize(("place", "stage"), IN_THE_PIPELINE)
def test_in_the_pipeline(place: str, stage: int, ended: dict[str, Ended]) -> None:
    job = ended[f"{place} {stage}"]
    assert_reported(job, stage, f", batch {FAULT_BATCH}, {IN_THE_PIPELINE[place, stage]}")
    assert job.message.count("Traceback (most recent call last)") == (2 if place == "loader process" else 1)


@pytest.mark.parametrize(("place", "stage"), OUTSIDE)
def test_outside_of_the_pipeline(place: str, stage: int, ended: dict[str, Ended]) -> None:
    """Before all ranks have met; in the loop over losses, where the others would go on for ever; between two calls."""
    job = ended[f"{place} {stage}"]
    assert_reported(job, stage, "")
    assert job.message.endswith(f"dist_faults.Boom: on rank {stage}")


def test_processes_of_the_data_loader_end_too(ended: dict[str, Ended]) -> None:
    for place in ("loader process", "loop over a loader"):
        job = ended[f"{place} 0"]
        assert len(list(job.folder.glob("loader.*"))) == 2
        assert job.left == ()


@pytest.mark.parametrize("name", EXITS)
def test_exit(name: str, ended: dict[str, Ended]) -> None:
    """sys.exit in a worker: with 0 it is the end of that worker's work and no failure."""
    job = ended[name]
    stage = EXITS[name][1]
    assert job.left == ()
    assert "Traceback" not in job.output
    if name == "exit with code 0":
        assert (job.error, job.exit_code, job.output) == (None, 0, "")
        return
    assert job.error == "WorkerError"
    assert job.seconds_until_gone < LIMIT_S
    if name == "exit amid the work":
        header, text = job.message.split("\n")
        assert job.cause_type == "PeerLost"
        assert any(header.startswith(name_of(job, neighbour)) for neighbour in (0, 2))
        gone = f"PeerLost: {name_of(job, stage)} is gone: ", f"PeerLost: could not send to {name_of(job, stage)}: "
        assert text.startswith(gone)
    elif name == "exit with code 3":
        assert job.message.startswith(f"{name_of(job, stage)} exited with code 3 and gave no reason.")
        assert job.message.endswith(" Look at its output above.")
    else:
        assert job.message.startswith(f"{name_of(job, stage)} failed:\n")
        assert job.message.endswith("SystemExit: enough")


def test_a_session_that_ranks_want_to_end_differently(ended: dict[str, Ended]) -> None:
    job = ended["another drain"]
    assert (job.error, job.cause_type) == ("WorkerError", "ConfigError")
    assert job.message.startswith(f"{name_of(job, 1)} failed, end of a session:\n")
    assert job.message.endswith(
        "ConfigError: rank 0 trains with drain=True, rank 1 with drain=False; give the same on all ranks."
    )
    assert job.left == ()


@pytest.mark.parametrize("name", ["leave at once", "leave early"])
def test_ranks_may_leave(name: str, ended: dict[str, Ended]) -> None:
    """Once its loop is over, or amid it: no rank ends its connections while another still needs them."""
    job = ended[name]
    assert (job.error, job.exit_code, job.output, job.left) == (None, 0, "", ())


def test_every_stage_fails_somewhere() -> None:
    """The tables do not lose a stage."""
    assert {stage for _, stage in IN_THE_PIPELINE} == {stage for _, stage in OUTSIDE} == set(range(3))
    assert {SIGNALS[name][1] for name in SIGNALS if name.startswith("kill stage")} == set(range(3))
