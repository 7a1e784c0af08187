"""A short run with layers that inductor compiles, for one process or two."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from engine_nets import classification, cnn, momentum
from torch.nn.functional import cross_entropy

import stalewise
from stalewise.methods import DSP


def train(activations: str, compile: bool = True) -> dict[str, Any]:
    """Losses and weights; two stages, each with BatchNorm, the first with Dropout."""
    torch.set_num_threads(1)
    pipe = stalewise.Pipeline(
        cnn(),
        method=DSP.minimal(2, activations=activations),
        loss_fn=cross_entropy,
        optimizer=momentum,
        partition=(4,),
        seed=4,
        compile=compile,
    )
    return {"losses": list(pipe.train(classification("cnn", 8))), "state": pipe.state_dict()}


def worker(folder: str) -> None:
    """Every rank leaves what it saw."""
    results = {activations: train(activations) for activations in ("recompute", "stored")}
    torch.save(results, Path(folder) / f"rank{torch.distributed.get_rank()}.pt")
