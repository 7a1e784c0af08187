"""The distributed engine gives bit by bit what the sequential engine gives, whatever the timing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import dist_net
import pytest
from dist_equal import assert_equal
from dist_jobs import run_job
from dist_workers import load

pytestmark = [pytest.mark.dist, pytest.mark.slow]

JobFolder = Callable[[int], Path]


@pytest.mark.parametrize("num_stages", [2, 3, 4])
def test_long_run_under_random_delays(num_stages: int, job_folder: JobFolder) -> None:
    """216 updates: weights, buffers, optimizer state, losses and scores, over epochs that end in all ways."""
    outcomes = load(job_folder(num_stages), "outcome", num_stages)
    pipe = dist_net.pipeline(num_stages, engine="sequential")
    expected = asdict(dist_net.train_long(pipe))
    assert len(expected["losses"]) == 216
    assert len(expected["optimizer"]["state"]) == len(list(dist_net.network().parameters()))
    for rank, outcome in enumerate(outcomes):
        rates, expected_rates = outcome.pop("rates"), expected["rates"]
        assert rates[1] == expected_rates[1], "after a drain all stages made the same updates"
        if rank == 0:
            assert rates[0] == expected_rates[0]
        assert_equal(outcome, _without(expected, "rates"), f"rank {rank}")


def test_long_run_between_hosts(tmp_path: Path) -> None:
    """What crosses hosts is received ahead, in parts; the numbers are the same, however a session ends."""
    job = run_job("dist_workers:long_run_between_hosts", 3, [3], tmp_path)
    assert (job.error, job.exit_code) == (None, 0), job.message
    expected = asdict(dist_net.train_long(dist_net.pipeline(3, engine="sequential")))
    for rank, outcome in enumerate(load(tmp_path, "outcome", 3)):
        assert_equal(_without(outcome, "rates"), _without(expected, "rates"), f"rank {rank}")


def test_pipelines_beside_each_other(job_folder: JobFolder) -> None:
    """Several pipelines in one job, two of them alive at once, and the sequential engine within the job."""
    expected = dist_net.pipeline(2, engine="sequential")
    losses = list(expected.train(dist_net.batches(12, 8)))
    for rank, seen in enumerate(load(job_folder(2), "pipelines", 2)):
        assert_equal(seen["sequential"], losses, f"sequential engine in rank {rank}")
        assert_equal(seen["state"], expected.state_dict(), f"sequential engine in rank {rank}")
        for index, run in enumerate(seen["runs"]):
            assert_equal(run, losses, f"pipeline {index} in rank {rank}")
        for index, state in enumerate(seen["states"]):
            assert_equal(state, expected.state_dict(), f"pipeline {index} in rank {rank}")


def test_cuts_that_rank_0_measures(job_folder: JobFolder) -> None:
    """They are the same on all ranks, the measuring leaves no trace, and the batch it was done with is trained."""
    seen = load(job_folder(2), "profile", 2)
    expected = dist_net.pipeline(2, engine="sequential", partition=seen[0]["cuts"])
    losses = list(expected.train(dist_net.batches(12, 8)))
    for one in seen:
        assert_equal(one, {"cuts": expected.cuts, "losses": losses, "state": expected.state_dict()})


def test_only_the_reading_rank_leaves_its_loop(job_folder: JobFolder) -> None:
    """Then the others end their loop after the same batches, and the next call goes on as in one process."""
    pipe = dist_net.pipeline(2, engine="sequential")
    own: list[float] = []
    for loss in pipe.train(dist_net.batches(20, 9)):
        own.append(loss)
        if len(own) == 5:
            break
    after = list(pipe.train(dist_net.batches(3, 10)))
    entered = 5 + pipe.method.staleness[0]
    reading, other = load(job_folder(2), "rank 0 leaves", 2)
    assert_equal(reading["losses"], own + after)
    assert len(other["losses"]) == entered + len(after)
    assert_equal(other["losses"][:5] + other["losses"][entered:], own + after)
    for seen in (reading, other):
        assert_equal(seen["state"], pipe.state_dict())


def test_pipelines_that_are_dropped_are_freed(job_folder: JobFolder) -> None:
    """Weights and threads: a job may build many pipelines, such as in a search."""
    for seen in load(job_folder(2), "freed", 2):
        assert seen == {"module is freed": True, "threads that still send": 0}


@pytest.mark.parametrize(
    ("difference", "error", "message"),
    [
        ("cuts", "ConfigError", "rank 1 and rank 0 were given another partition: ['1'] against ['2']"),
        ("cuts and profile", "ConfigError", "rank 1 and rank 0 were given another partition: 'profile' against"),
        ("method", "ConfigError", "rank 1 and rank 0 were given another method: 'BP("),
        ("staleness", "ConfigError", "rank 1 and rank 0 were given another method"),
        ("seed", "ConfigError", "rank 1 and rank 0 were given another seed: 2 against 1"),
        ("clip_grad_norm", "ConfigError", "rank 1 and rank 0 were given another clip_grad_norm: 2.0 against None"),
        ("shape of a layer", "ConfigError", "another model: '1:Linear:weight(7, 6),bias(7,)' against '1:Linear"),
        ("number of layers", "ConfigError", "another model: None against '2.0:Linear"),
        ("stages and ranks", "ConfigError", "the method has 3 stages and the job 2 ranks"),
        ("bad cuts on all", "PlanError", "cuts[0] is 7"),
    ],
)
def test_ranks_that_disagree_all_refuse(difference: str, error: str, message: str, job_folder: JobFolder) -> None:
    for rank, seen in enumerate(load(job_folder(2), "differences", 2)):
        kind, text = seen[difference]
        assert kind == error, f"rank {rank}"
        assert message in text, f"rank {rank}"


def _without(values: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key != name}
