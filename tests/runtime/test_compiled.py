"""Layers that inductor compiles: as in eager mode up to rounding, and bitwise the same in one process and in two."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import dist_compiled
import pytest
import torch
from dist_equal import assert_equal

import stalewise

pytestmark = [
    pytest.mark.dist,
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="inductor needs a C++ compiler"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


def test_processes_give_the_numbers_of_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dropout shows that forward and recompute draw the same masks: with other ones the losses would be far off."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    torch._dynamo.reset()
    alone = {activations: dist_compiled.train(activations) for activations in ("recompute", "stored")}
    torch._dynamo.reset()
    stalewise.launch(dist_compiled.worker, num_workers=2, args=[str(tmp_path)])
    for rank in range(2):
        assert_equal(torch.load(tmp_path / f"rank{rank}.pt"), alone, f"rank {rank}")
    for activations, seen in alone.items():
        eager = dist_compiled.train(activations, compile=False)
        assert seen["losses"] == pytest.approx(eager["losses"], rel=1e-4)
        torch.testing.assert_close(seen["state"], eager["state"], rtol=1e-3, atol=1e-4)
