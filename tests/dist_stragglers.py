"""What the processes of the tests of slow steps run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import dist_net
import torch

import stalewise
from stalewise.methods import build_method

SPELLS = (
    stalewise.Straggler(probability=0.3, factor=3, duration=2, seed=1),
    stalewise.Straggler(stages=(1,), factor=2, how="sleep", seed=2),
    stalewise.Straggler(probability=0.05, pause_s=0.01, seed=3),
)
METHODS = ("bp", "1f1b", "dsp", "dsp-stored")


def train_each(**options: Any) -> dict[str, Any]:
    """Losses and weights of a run of each method, over a pause and a drain."""
    torch.set_num_threads(1)
    results = {}
    for name in METHODS:
        pipeline = dist_net.pipeline(3, method=build_method(name, num_stages=3), **options)
        data = dist_net.batches(30, 8)
        losses = [*pipeline.train(data[:20], drain=False), *pipeline.train(data[20:])]
        results[name] = {"losses": losses, "state": pipeline.state_dict(), "optimizer": pipeline.optimizer_state_dict()}
    return results


def worker(folder: str) -> None:
    """Every rank leaves what it saw under injection."""
    torch.save(train_each(stragglers=SPELLS), Path(folder) / f"rank{torch.distributed.get_rank()}.pt")
