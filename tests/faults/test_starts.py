"""Ranks that do not start, or that are not what the others are."""

from __future__ import annotations

import socket

import pytest
from dist_jobs import Ended

pytestmark = [pytest.mark.dist, pytest.mark.slow]

LIMIT_S = 10.0


def test_a_rank_that_never_starts_is_named(ended: dict[str, Ended]) -> None:
    job = ended["one never starts"]
    assert (job.error, job.cause_type) == ("WorkerError", "ReceiveTimeout")
    assert (
        "\nReceiveTimeout: rank 1 did not start in 6 s; ranks 0, 2 of 3 did. Look at the log of rank 1" in job.message
    )
    assert job.seconds_until_gone < LIMIT_S
    assert (job.output, job.left) == ("", ())


def test_another_release_is_refused(ended: dict[str, Ended]) -> None:
    job = ended["one is another version"]
    pid = (job.folder / "rank.2").read_text()
    assert (job.error, job.cause_type) == ("WorkerError", "ConfigError")
    assert f"stage 2 (rank 2, host {socket.gethostname()}, pid {pid}) runs with releases stalewise 0.0.1" in job.message
    assert job.seconds_until_gone < LIMIT_S
    assert (job.output, job.left) == ("", ())
