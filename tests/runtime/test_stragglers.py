"""Slow steps on real processes change no number: bitwise what one process gives without any."""

from __future__ import annotations

from pathlib import Path

import dist_stragglers
import pytest
import torch
from dist_equal import assert_equal

import stalewise

pytestmark = pytest.mark.dist


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What three processes left."""
    folder = tmp_path_factory.mktemp("stragglers")
    stalewise.launch(dist_stragglers.worker, num_workers=3, args=[str(folder)])
    return folder


def test_a_run_under_injection_is_bitwise_one_without(folder: Path) -> None:
    expected = dist_stragglers.train_each(engine="sequential")
    for rank in range(3):
        assert_equal(torch.load(folder / f"rank{rank}.pt"), expected, f"rank {rank}")


def test_a_slow_stage_is_named_while_it_runs(folder: Path) -> None:
    found = torch.load(folder / "bottleneck.pt")
    assert found is not None
    assert (found["kind"], found["stage"]) == ("compute", 1)
    # Other work on the machine may interrupt what was seen from the first updates on.
    assert found["since_update"] < 75
    assert found["waits"][0] > 0.5
