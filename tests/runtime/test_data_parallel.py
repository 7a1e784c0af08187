"""The data-parallel baseline does exactly what one process does with whole batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import data_parallel_workers as workers
import pytest
import torch
from torch import nn

import stalewise

pytestmark = [pytest.mark.dist, pytest.mark.slow]


def run(folder: Path, ranks: int, *, normalised: bool = False, compile: str | None = None) -> list[dict[str, Any]]:
    stalewise.launch(workers.train, num_workers=ranks, args=[str(folder), normalised, compile])
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(ranks)]


def alone() -> dict[str, Any]:
    """The same training without anything of this library."""
    model = workers.network()
    optimizer = workers.optimizer(model.parameters())
    scheduler = workers.scheduler(optimizer)
    losses = []
    for inputs, targets in workers.batches(0) * 2:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(inputs), targets)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
    with torch.no_grad():
        test = workers.batches(7)
        score = sum(float(workers.hits(model(x), y)) * len(y) for x, y in test) / sum(len(y) for _, y in test)
    return {"losses": losses, "score": score, "state": model.state_dict(), "lr": scheduler.get_last_lr()[0]}


@pytest.mark.parametrize(("ranks", "compile"), [(1, None), (3, None), (2, "aot_eager")])
def test_ranks_train_as_one_process_would(ranks: int, compile: str | None, tmp_path: Path) -> None:
    """Batches of 64, 7 and 1 samples on 3 ranks: parts of unequal size, and parts without a sample."""
    expected = alone()
    exact = 0.0 if ranks == 1 else 1e-12
    for seen in run(tmp_path, ranks, compile=compile):
        assert seen["losses"] == pytest.approx(expected["losses"], rel=exact, abs=0)
        assert seen["score"] == pytest.approx(expected["score"], abs=1e-15)
        assert seen["lr"] == pytest.approx(expected["lr"], abs=1e-15)
        assert seen["state"].keys() == expected["state"].keys()
        for name, value in expected["state"].items():
            torch.testing.assert_close(seen["state"][name], value, rtol=exact, atol=exact)


def test_running_statistics_are_those_of_rank_0(tmp_path: Path) -> None:
    """After an evaluation all ranks hold them, so that all parts of the test set are scored alike."""
    first, *others = run(tmp_path, 2, normalised=True)
    for other in others:
        assert other["losses"] == first["losses"]
        for name, value in first["state"].items():
            assert torch.equal(other["state"][name], value), name


def test_a_rank_that_fails_ends_all(tmp_path: Path) -> None:
    with pytest.raises(stalewise.WorkerError, match="the third batch is bad"):
        stalewise.launch(workers.fail, num_workers=3, args=[str(tmp_path)])
