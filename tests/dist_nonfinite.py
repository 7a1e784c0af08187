"""Runs with batches whose loss is not finite, for one process or several."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import stalewise
from stalewise.methods import METHOD_NAMES, build_method

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in METHOD_NAMES if name != "dni"},
    "dsp accumulate": ("dsp", {"accumulate": 3}),
    "dsp current": ("dsp-stored", {"weights": "current"}),
    "gpipe stored": ("gpipe", {"activations": "stored", "micro_batches": 3}),
}
BAD = (0, 5, 6, 7, 19)
"""Among them the first, the last, and all three of a group that accumulates."""


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(4, 8),
        nn.BatchNorm1d(8),
        nn.ReLU(inplace=True),
        nn.Linear(8, 8),
        nn.BatchNorm1d(8),
        nn.Dropout(0.2),
        nn.Linear(8, 3),
    )


def data(bad: tuple[int, ...] = BAD) -> list[tuple[Tensor, Tensor]]:
    """20 batches of 8; one sample of each bad one is NaN or infinite, not the first one."""
    generator = torch.Generator().manual_seed(1)
    batches = [(torch.randn(8, 4, generator=generator), torch.randint(3, (8,), generator=generator)) for _ in range(20)]
    for batch in bad:
        batches[batch][0][5, 2] = float("nan" if batch % 2 else "inf")
    return batches


def pipeline(variant: str, policy: Any, **options: Any) -> stalewise.Pipeline:
    name, of_method = VARIANTS.get(variant, (variant, {}))
    return stalewise.Pipeline(
        net(),
        method=build_method(name, num_stages=3, **of_method),
        loss_fn=nn.functional.cross_entropy,
        optimizer=lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, weight_decay=0.01),
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 4, gamma=0.9),
        partition=(2, 4),
        seed=1,
        nonfinite_loss=policy,
        **options,
    )


def skip_all(batches: list[tuple[Tensor, Tensor]]) -> dict[str, dict[str, Any]]:
    torch.set_num_threads(1)
    results = {}
    for variant in VARIANTS:
        ran = pipeline(variant, "skip")
        losses = [*ran.train(batches[:9], drain=False), *ran.train(batches[9:])]
        results[variant] = {"losses": losses, "state": ran.state_dict(), "optimizer": ran.optimizer_state_dict()}
    return results


def skip_worker(folder: str) -> None:
    results = skip_all(data())
    torch.save(results, Path(folder) / f"rank{torch.distributed.get_rank()}.pt")


def stop_worker(folder: str, variant: str) -> None:
    """Each rank leaves the losses that it saw, as they come: the launcher ends one that is second to fail."""
    torch.set_num_threads(1)
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else None
    ran = pipeline(variant, "stop", nonfinite_folder=Path(folder) / "bad")
    with open(Path(folder) / f"losses{ran.rank if rank is None else rank}.txt", "w", buffering=1) as file:
        for loss in ran.train(data((5,))):
            file.write(f"{loss!r}\n")
