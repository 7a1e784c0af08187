"""A pipeline of 32 stages, a layer or two each, on one process or on 32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.functional import mse_loss

import stalewise

STAGES = 32
BATCHES = 12
SAVED_AFTER = 5


def pipeline(**options: Any) -> stalewise.Pipeline:
    """A chain of 32 blocks with residuals, so that something reaches the first one; Dropout and momentum."""
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(STAGES)]
    return stalewise.Pipeline(
        [Residual(block) for block in blocks],
        method=stalewise.DSP.minimal(num_stages=STAGES),
        loss_fn=mse_loss,
        optimizer=lambda params: torch.optim.SGD(params, lr=0.05, momentum=0.9),
        partition=range(1, STAGES),
        seed=4,
        **options,
    )


class Residual(nn.Module):
    """x + drop(block(x)) / 4."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block
        self.drop = nn.Dropout(0.2)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs + self.drop(self.block(inputs)) / 4


def train(pipe: stalewise.Pipeline, folder: Path | None = None) -> dict[str, Any]:
    """Train to the end of a drain; with a folder, save on the way."""
    generator = torch.Generator().manual_seed(1)
    batches = [(torch.randn(3, 6, generator=generator), torch.randn(3, 6, generator=generator)) for _ in range(BATCHES)]
    losses = []
    for loss in pipe.train(batches if pipe.rank == 0 else None):
        losses.append(loss)
        if folder is not None and len(losses) == SAVED_AFTER:
            pipe.save(folder / "checkpoints")
    pipe.wait_saved()
    return {"losses": losses, "state": pipe.state_dict(), "optimizer": pipe.optimizer_state_dict()}


def worker(folder: str) -> None:
    """Leave what each rank sees."""
    torch.set_num_threads(1)
    pipe = pipeline()
    torch.save(train(pipe, Path(folder)), Path(folder, f"rank{pipe.rank}"))
