"""What the processes of the tests of slow steps run."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import dist_net
import torch

import stalewise
from stalewise.methods import build_method
from stalewise.protocol.bottleneck import Bottleneck, BottleneckWatch
from stalewise.runtime.exchange import all_gather_json
from stalewise.runtime.job import current_job

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


def watch_a_slow_stage() -> Bottleneck | None:
    """What rank 0 is told in a run whose stage 1 pauses in every step; the last statuses are waited for."""
    pipeline = dist_net.pipeline(3, stragglers=stalewise.Straggler(stages=(1,), pause_s=0.1))
    job, watch = current_job(), BottleneckWatch(3, locked=False)
    data = dist_net.batches(90, 8)
    for _ in pipeline.train(data):
        watch.update(pipeline.statuses())
    deadline = time.monotonic() + 30
    while job.rank == 0 and time.monotonic() < deadline:
        statuses = pipeline.statuses()
        watch.update(statuses)
        if [status["updates"] for status in statuses] == [90, 90, 90]:
            break
    all_gather_json(None, job.group)
    return watch.current


def worker(folder: str) -> None:
    """Every rank leaves what it saw under injection."""
    rank = current_job().rank
    torch.save(train_each(stragglers=SPELLS), Path(folder) / f"rank{rank}.pt")
    found = watch_a_slow_stage()
    if rank == 0:
        torch.save(found and found.as_dict(), Path(folder) / "bottleneck.pt")
