"""Slow steps on real processes change no number: bitwise what one process gives without any."""

from __future__ import annotations

from pathlib import Path

import dist_stragglers
import pytest
import torch
from dist_equal import assert_equal

import stalewise

pytestmark = [pytest.mark.dist, pytest.mark.timeout(180)]


def test_a_run_under_injection_is_bitwise_one_without(tmp_path: Path) -> None:
    stalewise.launch(dist_stragglers.worker, num_workers=3, args=[str(tmp_path)])
    expected = dist_stragglers.train_each(engine="sequential")
    for rank in range(3):
        assert_equal(torch.load(tmp_path / f"rank{rank}.pt"), expected, f"rank {rank}")
