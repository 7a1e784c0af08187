"""The quadratic whose stability limit is known, as a model in stages that the engine trains.

    h_0 = 0,  stage k: h -> h + w_k,  loss 1/2 sum_i a_i h_i^2

Every coordinate i is a problem of its own with the eigenvalue a_i; all stages get the same gradient a_i h_i, as late as
their staleness says.

Source: own derivation, docs/theory.md, section 6.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from stalewise.methods import DSP
from stalewise.pipeline import Pipeline
from stalewise.theory.momentum import UnifiedMomentum

__all__ = ["train_quadratic"]


class _Shift(nn.Module):
    """h -> h + w, with w of a known start; where nothing is trained, h -> h."""

    def __init__(self, start: Tensor, *, trained: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(start.clone(), requires_grad=trained)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.weight


def train_quadratic(
    staleness: Sequence[int],
    eigenvalues: Sequence[float],
    *,
    lr: float,
    num_updates: int,
    momentum: float = 0.0,
    s: float = 0.0,
    trained: Sequence[int] | None = None,
) -> list[float]:
    """Train the quadratic with DSP in the sequential engine, in double precision; blocks until done.

    Args:
        staleness: m_k per stage, in batches.
        eigenvalues: a_i, one per coordinate.
        lr: alpha.
        num_updates: of every stage.
        momentum: beta of the unified form.
        s: of the unified form.
        trained: indices of the stages that have weights to train; None: all.

    Returns:
        The loss of every batch.
    """
    method = DSP(staleness=staleness)
    trains = range(method.num_stages) if trained is None else trained
    curvature = torch.tensor(eigenvalues, dtype=torch.float64)
    zero = torch.zeros_like(curvature)
    # Every trained stage starts away from the optimum, and not all at the same place.
    layers = [
        _Shift(torch.full_like(curvature, 1 / (1 + index)) if index in trains else zero, trained=index in trains)
        for index in range(method.num_stages)
    ]
    pipeline = Pipeline(
        layers,
        method=method,
        loss_fn=lambda hidden, target: (target * hidden.square()).sum() / 2,
        optimizer=lambda params: UnifiedMomentum(params, lr=lr, momentum=momentum, s=s),
        partition=range(1, method.num_stages),
        engine="sequential",
        device="cpu",
        seed=0,
    )
    return list(pipeline.train(itertools.repeat((zero, curvature), num_updates)))
