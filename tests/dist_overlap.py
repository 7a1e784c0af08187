"""A run on a GPU that three stages share, with forwards in a lane of their own and without."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from engine_nets import classification, cnn, momentum
from torch.nn.functional import cross_entropy

import stalewise
from stalewise.methods import DSP, build_method

METHODS = {"dsp": {}, "dsp-stored": {}, "gpipe": {"micro_batches": 2}}


def train(method: stalewise.methods.Method, **options: Any) -> dict[str, Any]:
    """Losses over a pause and a drain, weights and buffers."""
    torch.use_deterministic_algorithms(True)
    pipe = stalewise.Pipeline(
        cnn(),
        method=method,
        loss_fn=cross_entropy,
        optimizer=momentum,
        partition=(2, 6),
        seed=4,
        device="cuda",
        **options,
    )
    batches = classification("cnn", 40)
    losses = [list(pipe.train(batches, drain=False)), list(pipe.train(batches))]
    return {"losses": losses, "state": pipe.state_dict()}


def worker(folder: str) -> None:
    """Every rank leaves what it saw."""
    seen: dict[str, Any] = {}
    for name, options in METHODS.items():
        method = build_method(name, num_stages=3, **options)
        seen[name] = [train(method, overlap=overlap) for overlap in (True, False)]
    seen["sequential"] = train(DSP.minimal(3), engine="sequential")
    torch.save(seen, Path(folder) / f"rank{torch.distributed.get_rank()}.pt")
