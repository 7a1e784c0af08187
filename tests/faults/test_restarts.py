"""A job that failed starts again from its newest checkpoint and ends as if nothing had happened, bit by bit."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import dist_restarts
import pytest
import torch
from dist_equal import assert_equal
from dist_jobs import Ended, run_job, run_jobs

from stalewise.checkpoint.folder import complete_checkpoints, verify

pytestmark = [pytest.mark.dist, pytest.mark.slow]

FAULTS = {
    "killed on stage 0": ("dsp", "killed in a step", 0, 11),
    "killed on stage 1": ("dsp-stored", "killed in a step", 1, 17),
    "killed on stage 2": ("dsp current", "killed in a step", 2, 8),
    "killed before the first checkpoint": ("dsp", "killed in a step", 2, 2),
    "killed while saving on stage 0": ("pipedream", "killed while saving", 0, 4),
    "killed while saving on stage 2": ("dni", "killed while saving", 2, 3),
    "killed before the rename": ("dsp", "killed before the rename", 0, 3),
    "killed after the rename": ("dsp-stored", "killed after the rename", 0, 3),
    "killed while deleting": ("fr", "killed while deleting", 0, 1),
    "full disk": ("dsp", "full disk", 1, 3),
    "files that may not grow": ("dsp", "files that may not grow", 0, 4),
}


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Ended]:
    jobs = {name: ("dist_restarts:train", 3, values) for name, values in FAULTS.items()}
    return run_jobs(jobs, tmp_path_factory.mktemp("restarts"), at_once=3, max_restarts=1)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What one process leaves of each method."""
    results = {}
    for label in {values[0] for values in FAULTS.values()}:
        folder = tmp_path_factory.mktemp("alone")
        dist_restarts.train(str(folder), label)
        results[label] = torch.load(folder / "result-alone")
    return results


@pytest.mark.parametrize("name", FAULTS)
def test_a_job_that_failed_ends_as_if_it_had_not(
    name: str, ended: dict[str, Ended], undisturbed: dict[str, Any]
) -> None:
    job = ended[name]
    assert (job.error, job.exit_code) == (None, 0), job.message + job.output
    assert len(list(job.folder.glob("fault.*"))) == 1
    assert job.output.count("stalewise: starting again, 1 of 1") == 1
    expected = undisturbed[FAULTS[name][0]]
    for rank in range(3):
        assert_equal(torch.load(job.folder / f"result-{rank}"), expected)
    assert job.left == ()
    left = [path.name for path in (job.folder / "checkpoints").iterdir() if path.name.startswith((".partial", ".del"))]
    assert left == []
    newest, before = complete_checkpoints(job.folder / "checkpoints")
    assert verify(newest).num_batches >= verify(before).num_batches


def test_a_full_disk_is_said_and_leaves_the_checkpoints_before(tmp_path: Path) -> None:
    job = run_job("dist_restarts:train", 3, ["dsp", "full disk", 1, 3], tmp_path)
    assert (job.error, job.cause_type) == ("WorkerError", "SaveError")
    assert "No space left on device. The ones before it are as they were" in job.message
    assert "stage 1" in job.message
    assert job.left == ()
    assert [verify(path).num_batches > 0 for path in complete_checkpoints(tmp_path / "checkpoints")] == [True, True]


SCRIPT = """
import sys
sys.path.insert(0, {tests!r})
import dist_restarts
dist_restarts.train(sys.argv[1], "dsp", "killed in a step", 1, 11)
"""


def test_torchrun_restarts_too(tmp_path: Path, undisturbed: dict[str, Any]) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT.format(tests=str(Path(__file__).parents[1])))
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3", "--max-restarts", "1"]
    subprocess.run(
        [sys.executable, *command, str(script), str(tmp_path)],
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=400,
    )
    assert len(list(tmp_path.glob("fault.*"))) == 1
    for rank in range(3):
        assert_equal(torch.load(tmp_path / f"result-{rank}"), undisturbed["dsp"])
