"""Elastic runs on real processes, whose order depends on timing: what they left, and a replay of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import dist_net
import torch

import stalewise
from stalewise.runtime.job import current_job

INJECTIONS: dict[str, tuple[stalewise.Straggler, ...]] = {
    "calm": (),
    "spells": (stalewise.Straggler(probability=0.1, pause_s=0.004, duration=3, seed=1),),
    "any step": (stalewise.Straggler(probability=1 / 3, factor=3, how="sleep", seed=2),),
    "slow stage 2": (stalewise.Straggler(stages=(2,), pause_s=0.003), stalewise.Straggler(factor=2, probability=0.3)),
}
BOUND = (7, 4, 0)
UPDATES = 108


def pipeline(activations: str = "recompute", **options: Any) -> stalewise.Pipeline:
    """BatchNorm, dropout, AdamW, clipping, a schedule; see `dist_net`."""
    method = stalewise.DSP(staleness=BOUND, elastic=True, activations=activations)  # type: ignore[arg-type]
    return dist_net.pipeline(3, method=method, **options)


def train(pipe: stalewise.Pipeline) -> dict[str, Any]:
    """Over a pause, an early leave and drains; what a run leaves behind."""
    read = pipe.rank == 0
    losses = [*pipe.train(dist_net.batches(40, 1, last=3) if read else None, drain=False)]
    losses += pipe.train(dist_net.batches(25, 2) if read else None)
    for loss in pipe.train(dist_net.batches(30, 3) if read else None):
        losses.append(loss)
        if len(losses) == 80:
            break
    losses += pipe.train(dist_net.batches(108 - 80 - BOUND[0], 4) if read else None)
    return {
        "losses": losses,
        "state": pipe.state_dict(),
        "optimizer": pipe.optimizer_state_dict(),
        "orders": pipe.orders(),
    }


def worker(folder: str) -> None:
    """Each injection, recorded; then the first record with delays repeated under no injection, and under another."""
    torch.set_num_threads(1)
    rank = current_job().rank
    for name, stragglers in INJECTIONS.items():
        torch.save(train(pipeline(stragglers=stragglers)), Path(folder) / f"{name}.{rank}.pt")
    stored = train(pipeline("stored", stragglers=INJECTIONS["spells"]))
    torch.save(stored, Path(folder) / f"stored.{rank}.pt")
    orders = torch.load(Path(folder) / f"spells.{rank}.pt")["orders"]
    again = train(pipeline(replay=orders, stragglers=INJECTIONS["slow stage 2"]))
    torch.save(again, Path(folder) / f"again.{rank}.pt")
