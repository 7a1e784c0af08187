"""Who comes to the ports of a running job with garbage, or as a rank of another one, neither stops nor changes it."""

from __future__ import annotations

import json
from typing import Any

import dist_hostile
import pytest
import torch
from dist_equal import assert_equal
from dist_jobs import Ended, run_job

pytestmark = [pytest.mark.dist, pytest.mark.slow]

LOOPBACK = ("0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000")
"""As the kernel prints 127.0.0.1, the same mapped into IPv6, and ::1."""

ENDS = {
    "the same rank again": "ConfigError: stage 1 (rank 1, ",
    "a rank of a smaller job": "ConfigError: stage 1 (rank 1, ",
    "a rank of a larger job": "runs with world_size 8, stage 0 (rank 0, ",
}


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Ended:
    return run_job("dist_hostile:train", 3, [], tmp_path_factory.mktemp("hostile"))


@pytest.fixture(scope="module")
def attack(job: Ended) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((job.folder / "attack.json").read_text())
    return found


def test_the_job_goes_on_as_if_nobody_had_come(job: Ended) -> None:
    assert (job.error, job.exit_code) == (None, 0), job.message + job.output
    assert job.left == ()
    expected = dist_hostile.alone()
    for rank in range(3):
        result = torch.load(job.folder / f"result.{rank}.pt")
        for what in ("losses", "state", "optimizer"):
            assert_equal(result[what], expected[what], f"{what} of rank {rank}")


def test_nothing_is_executed(job: Ended) -> None:
    assert not (job.folder / "bad").exists()


def test_a_launched_job_listens_on_the_loopback_interface_alone(attack: dict[str, Any]) -> None:
    assert len(attack["listening"]) > 3, "the store's port, and one or more of each rank"
    assert {address for address, _ in attack["listening"]} <= set(LOOPBACK)


@pytest.mark.parametrize("name", ENDS)
def test_another_jobs_rank_ends_with_a_clear_error(name: str, attack: dict[str, Any]) -> None:
    ended = attack["ranks"][name]
    assert ended["code"] == 1
    assert ENDS[name] in ended["output"]
    if "smaller" in name or "same" in name:
        assert "in its place, in the store of the job at 127.0.0.1:" in ended["output"]
        assert "two jobs need two ports (MASTER_PORT)" in ended["output"]
