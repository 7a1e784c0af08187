"""What the processes of the memory tests run: one training with each of two methods, memory measured."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import dist_net
import torch

import stalewise
from stalewise.methods import Method, PipeDream

METHODS: dict[str, Method] = {"dsp": stalewise.DSP.minimal(num_stages=2), "pipedream": PipeDream(stages=2)}
NUM_BATCHES = 12


def measured(name: str, **options: Any) -> dict[str, Any]:
    """What a run of one method says of itself."""
    pipe = dist_net.pipeline(2, method=METHODS[name], measure_memory=True, **options)
    losses = list(pipe.train(dist_net.batches(NUM_BATCHES, 3) if pipe.rank == 0 else dist_net.Untouchable()))
    return {
        "losses": losses,
        "memory": [memory.as_dict() for memory in pipe.memory()],
        "peaks": [memory.as_dict() for memory in pipe.memory(each_category=True)],
        "resident": pipe.resident_memory(),
        "bytes_sent": pipe.bytes_sent(),
    }


def measure_all(folder: str) -> None:
    """Each method; every rank writes what it was told."""
    torch.set_num_threads(1)
    results = {name: measured(name) for name in METHODS}
    Path(folder, f"memory.{os.environ['RANK']}.json").write_text(json.dumps(results))
