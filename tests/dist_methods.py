"""A run of every method, for one process or several: what the processes of a launch and their test both call."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

import stalewise
from stalewise.methods import METHOD_NAMES, build_method

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in METHOD_NAMES},
    "dsp accumulate": ("dsp", {"accumulate": 4}),
    "dsp current": ("dsp-stored", {"weights": "current"}),
    "gpipe stored": ("gpipe", {"activations": "stored", "micro_batches": 3}),
    "dni slow": ("dni", {"target_delay": 3}),
    "dsp autocast": ("dsp", {}),
    "dsp-stored autocast": ("dsp-stored", {}),
    "dsp mixed autocast": ("dsp", {"activations": ["stored", "recompute", "recompute"]}),
    "gpipe autocast": ("gpipe", {"micro_batches": 3}),
    "dni autocast": ("dni", {}),
}
"""Method and options by label; those that end in "autocast" run under it."""


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.Dropout(0.1),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.Flatten(),
        nn.Linear(8 * 64, 10),
    )


def train_all(every: int | None = 5) -> dict[str, dict[str, Any]]:
    """Losses, weights, optimizer state and gradient differences of a run of each variant, over a pause and a drain."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(5)
    data = [
        (torch.randn(8, 3, 8, 8, generator=generator), torch.randint(10, (8,), generator=generator)) for _ in range(20)
    ]
    results = {}
    for label, (name, options) in VARIANTS.items():
        pipeline = stalewise.Pipeline(
            net(),
            method=build_method(name, num_stages=3, **options),
            loss_fn=nn.functional.cross_entropy,
            optimizer=lambda params: torch.optim.SGD(params, lr=0.02, momentum=0.9),
            partition=(2, 5),
            seed=3,
            gradient_difference_every=None if "accumulate" in options else every,
            autocast="bfloat16" if label.endswith("autocast") else None,
        )
        losses = [list(pipeline.train(data, drain=False)), list(pipeline.train(data[:7])), list(pipeline.train(data))]
        results[label] = {
            "losses": losses,
            "state": pipeline.state_dict(),
            "optimizer": pipeline.optimizer_state_dict()["state"],
            "differences": pipeline.gradient_differences,
        }
    return results


def worker(folder: str) -> None:
    """Every rank leaves what it saw."""
    results = train_all()
    torch.save(results, Path(folder) / f"rank{torch.distributed.get_rank()}.pt")
