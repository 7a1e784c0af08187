"""32 stages as 32 processes of one machine are bitwise one process, and so is what goes on from their checkpoint.

The processes are forked from one that has imported torch, so they share most of their memory: about 2 GiB in all.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from dist_equal import assert_equal
from dist_jobs import run_job
from dist_many import SAVED_AFTER, STAGES, pipeline, train


@pytest.mark.dist
@pytest.mark.slow
def test_as_many_processes_as_stages(tmp_path: Path) -> None:
    ended = run_job("dist_many:worker", STAGES, [], tmp_path, timeout_s=200.0)
    assert (ended.error, ended.exit_code) == (None, 0), ended.message
    alone = train(pipeline())
    assert min(alone["losses"]) < alone["losses"][0]
    for rank in range(STAGES):
        assert_equal(torch.load(tmp_path / f"rank{rank}"), alone, f"rank {rank}")
    resumed = pipeline()
    point = resumed.resume(tmp_path / "checkpoints", positioned=True)
    assert point is not None
    assert point.exact
    assert alone["losses"][:SAVED_AFTER] + list(resumed.drain()) == alone["losses"]
    assert_equal(resumed.state_dict(), alone["state"])
    assert_equal(resumed.optimizer_state_dict(), alone["optimizer"])
