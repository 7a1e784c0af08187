"""On a GPU: forwards in a lane of their own change no number."""

from __future__ import annotations

from pathlib import Path

import dist_overlap
import pytest
import torch
from dist_equal import assert_equal

import stalewise

pytestmark = [
    pytest.mark.dist,
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_overlap_changes_no_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    stalewise.launch(dist_overlap.worker, num_workers=3, args=[str(tmp_path)])
    first = torch.load(tmp_path / "rank0.pt")
    for rank in range(3):
        seen = torch.load(tmp_path / f"rank{rank}.pt")
        for name in dist_overlap.METHODS:
            overlapped, plain = seen[name]
            assert_equal(overlapped, plain, f"{name} in rank {rank}")
            assert_equal(plain, first[name][1], f"{name} in rank {rank}")
    assert_equal(first["sequential"]["losses"], first["dsp"][1]["losses"])
