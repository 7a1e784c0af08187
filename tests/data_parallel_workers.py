"""What the ranks of data-parallel tests run; `launch` imports it by name."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from stalewise.runtime.data_parallel import DataParallel

SIZES = (64, 64, 7, 1)
"""Samples of each batch: divisible by no number of ranks from 3 on, and fewer than ranks at the end."""


def network(*, normalised: bool = False) -> nn.Sequential:
    """A small network in float64, where sums in another order agree to 1e-12."""
    torch.manual_seed(3)
    layers: list[nn.Module] = [nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 4)]
    if normalised:
        layers.insert(1, nn.BatchNorm1d(12))
    return nn.Sequential(*layers).double()


def batches(epoch: int) -> list[tuple[Tensor, Tensor]]:
    """The batches of an epoch."""
    draw = torch.Generator().manual_seed(epoch)
    return [
        (torch.randn(size, 6, generator=draw, dtype=torch.float64), torch.randint(0, 4, (size,), generator=draw))
        for size in SIZES
    ]


def optimizer(parameters: object) -> torch.optim.Optimizer:
    """Momentum and decay, so that an error of one step shows in the next."""
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=1e-3)  # type: ignore[arg-type]


def scheduler(built: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    """A rate that changes with every batch."""
    return torch.optim.lr_scheduler.CosineAnnealingLR(built, T_max=2 * len(SIZES))


def hits(output: Tensor, target: Tensor) -> Tensor:
    """Accuracy."""
    return (output.argmax(dim=1) == target).double().mean()


def train(folder: str, normalised: bool, compile: str | None) -> None:
    """Two epochs; each rank leaves what it saw."""
    torch.set_num_threads(1)
    parallel = DataParallel(
        network(normalised=normalised),
        loss_fn=nn.functional.cross_entropy,
        optimizer=optimizer,
        lr_scheduler=scheduler,
        device=torch.device("cpu"),
        clip_grad_norm=0.5,
        compile=compile,
    )
    whole = [pair for pair in batches(0) if not normalised or len(pair[1]) > 6]
    losses = [*parallel.train(whole), *parallel.train(whole)]
    score = parallel.evaluate(batches(7), hits)
    seen = {"losses": losses, "score": score, "state": parallel.state_dict(), "lr": parallel.learning_rate}
    torch.save(seen, Path(folder) / f"rank{parallel.rank}.pt")


def fail(folder: str) -> None:
    """Rank 1 fails while the others wait for its gradients."""
    parallel = DataParallel(
        network(), loss_fn=nn.functional.cross_entropy, optimizer=optimizer, device=torch.device("cpu")
    )
    for index, _ in enumerate(parallel.train(batches(0) * 3)):
        if index == 2 and parallel.rank == 1:
            raise ValueError("the third batch is bad")
