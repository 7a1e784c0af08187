"""Runs of some sessions that are saved amid one of them and go on in another pipeline, for one process or several."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from dist_methods import VARIANTS, net
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import OneCycleLR

import stalewise
from stalewise.methods import Method, build_method

CUTS = (2, 5)
SESSIONS = ((9, False), (6, True), (5, False), (4, True))
"""(batches, drain) of each call of `train`."""


def batches(session: int) -> list[tuple[Tensor, Tensor]]:
    """Of one session; the last batch is smaller."""
    generator = torch.Generator().manual_seed(session)
    sizes = [6] * (SESSIONS[session][0] - 1) + [4]
    return [
        (torch.randn(size, 3, 8, 8, generator=generator), torch.randint(10, (size,), generator=generator))
        for size in sizes
    ]


def method_of(label: str, num_stages: int = 3) -> Method:
    """Of `dist_methods.VARIANTS`."""
    name, options = VARIANTS[label]
    return build_method(name, num_stages=num_stages, **options)


def pipeline(method: Method, *, cuts: Sequence[int] = CUTS, **options: Any) -> stalewise.Pipeline:
    """BatchNorm, Dropout, layers in place, momentum, and a scheduler that the number of updates matters to."""
    accumulates = any(stage.policy.accumulate > 1 for stage in method.program().stages)
    settings: dict[str, Any] = {
        "optimizer": lambda params: torch.optim.SGD(params, lr=0.02, momentum=0.9, weight_decay=1e-3),
        "lr_scheduler": lambda optimizer: OneCycleLR(optimizer, max_lr=0.05, total_steps=100),
        "gradient_difference_every": None if accumulates else 5,
        "seed": 3,
        **options,
    }
    return stalewise.Pipeline(net(), method=method, loss_fn=cross_entropy, partition=cuts, **settings)


@dataclass(frozen=True)
class Outcome:
    """Everything that a run leaves behind."""

    losses: list[float]
    state: dict[str, Tensor]
    optimizer: dict[str, Any]
    rate: float | None
    differences: list[Any]
    sent: list[int]


def train(
    pipe: stalewise.Pipeline, *, losses: Sequence[float] = (), stop: int | None = None, folder: Path | None = None
) -> Outcome:
    """Train all sessions; with a folder, save after `stop` losses, or go on from there.

    Args:
        pipe: to train.
        losses: that came before, where the run is resumed.
        stop: losses after which it is saved.
        folder: of checkpoints.
    """
    seen = list(losses)
    point = None
    if folder is not None and stop is None:
        point = pipe.resume(folder, positioned=True)
        assert point is not None
        seen += point.losses
    if stop == 0:
        assert folder is not None
        pipe.save(folder, extra=[0, False])
    first, inside = (0, False) if point is None else point.extra
    for session in range(first, len(SESSIONS)):
        given: Any = batches(session)
        if point is not None and session == first and inside:
            given = given[point.session_batches :] if point.session_batches is not None else []
        for loss in pipe.train(given if pipe.rank == 0 else None, drain=SESSIONS[session][1]):
            seen.append(loss)
            if len(seen) == stop:
                assert folder is not None
                pipe.save(folder, extra=[session, True])
    pipe.wait_saved()
    return Outcome(
        seen,
        pipe.state_dict(),
        pipe.optimizer_state_dict(),
        pipe.learning_rate,
        pipe.gradient_differences,
        pipe.bytes_sent(),
    )
