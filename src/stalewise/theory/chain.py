"""A smooth non-convex problem in stages whose constants are known.

    h_0 = 0,  stage k: h -> sin(h + w_k),  loss 1/2 (h - y)^2,  y = target + noise or target - noise, evenly

In one dimension; many copies of it, each with noise of its own, are trained at once. With B = 1 + |target|:

    A1   |grad^2 f| <= |grad h_K|^2 + |h_K - target| |grad^2 h_K| <= K + B K (K+1) / 2 = L
         (every stage adds at most 1 to |grad h|^2, and at most |grad h|^2 + 1 to |grad^2 h|)
    A2   the noise enters as noise * grad h~_K with K entries of at most 1: sigma^2 = K noise^2
    A3   the Jacobians cos(h + w) change by at most sqrt(K) <= L times the distance of the weights, as does h_K
    A4   |h_K - y| <= B + noise = M, and no cosine enlarges it

Source: own, docs/theory.md, section 7.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from stalewise.errors import ConfigError
from stalewise.methods import DSP
from stalewise.pipeline import Pipeline
from stalewise.protocol.numbers import check_count, check_real
from stalewise.theory.momentum import UnifiedMomentum

__all__ = ["SineChain"]


@dataclass(frozen=True, kw_only=True)
class SineChain:
    """The problem.

    Args:
        num_stages: K.
        target: mean of y, in -1 .. 1, so that the least loss is that of the noise.
        noise: distance of y from its mean.

    Raises:
        ConfigError: where a number is out of its range.
    """

    num_stages: int
    target: float = 0.05
    noise: float = 0.25

    def __post_init__(self) -> None:
        check_count("num_stages", self.num_stages)
        check_real("target", self.target)
        check_real("noise", self.noise)
        if abs(self.target) > 1 or not 0 <= self.noise < math.inf:
            raise ConfigError(
                f"{self} is not defined: it has at least 1 stage, a target in -1 .. 1 and noise of at least 0."
            )

    @property
    def lipschitz(self) -> float:
        """L."""
        return self.num_stages + (1 + abs(self.target)) * self.num_stages * (self.num_stages + 1) / 2

    @property
    def error_bound(self) -> float:
        """M."""
        return 1 + abs(self.target) + self.noise

    @property
    def variance(self) -> float:
        """sigma^2."""
        return self.num_stages * self.noise**2

    @property
    def gap(self) -> float:
        """f(x[0]) minus the least value of f; all weights start at 0."""
        return self.target**2 / 2

    def squared_gradients(
        self,
        staleness: Sequence[int],
        rates: Sequence[float],
        *,
        copies: int,
        seed: int,
        momentum: float | None = None,
        s: float = 0.0,
    ) -> Tensor:
        """Train with DSP in the sequential engine and look at the true gradient before every update; blocks.

        Args:
            staleness: m_k per stage, in batches.
            rates: alpha_t of every update.
            copies: how many problems are trained at once.
            seed: of the noise.
            momentum: beta of the unified form; None: plain SGD.
            s: of the unified form.

        Returns:
            |grad f(x[t])|^2, double [updates, copies + 1]; the last copy trains without noise.
        """
        visited = torch.zeros(len(rates) + 1, self.num_stages, copies + 1, dtype=torch.float64)
        layers = [_Sine(copies + 1) for _ in range(self.num_stages)]
        stage_of = {id(layer.weight): stage for stage, layer in enumerate(layers)}

        def optimizer(params: Any) -> Optimizer:
            (weight,) = params
            made: Optimizer
            if momentum is None:
                made = torch.optim.SGD([weight], lr=1.0)
            else:
                made = UnifiedMomentum([weight], lr=1.0, momentum=momentum, s=s)
            stage, updates = stage_of[id(weight)], iter(range(1, len(rates) + 1))

            def note(*_: object) -> None:
                visited[next(updates), stage] = weight.detach()

            made.register_step_post_hook(note)
            return made

        pipeline = Pipeline(
            layers,
            method=DSP(staleness=staleness),
            loss_fn=lambda hidden, y: (hidden - y).square().sum() / 2,
            optimizer=optimizer,
            lr_scheduler=lambda made: LambdaLR(made, _rate_of(rates)),
            partition=range(1, self.num_stages),
            engine="sequential",
            device="cpu",
            seed=seed,
        )
        for _ in pipeline.train(self._batches(len(rates), copies, seed)):
            pass
        return self.true_squared_gradient(visited[:-1])

    def true_squared_gradient(self, weights: Tensor) -> Tensor:
        """|grad f|^2 at weights [.., K, copies]; [.., copies]."""
        leaves = [weights.select(-2, stage).clone().requires_grad_() for stage in range(self.num_stages)]
        hidden = torch.zeros_like(leaves[0])
        for weight in leaves:
            hidden = torch.sin(hidden + weight)
        parts = torch.autograd.grad((hidden - self.target).square().sum() / 2, leaves)
        return torch.stack([part.square() for part in parts]).sum(0)

    def _batches(self, count: int, copies: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        nothing = torch.zeros(copies + 1, dtype=torch.float64)
        for _ in range(count):
            signs = 2.0 * torch.randint(2, (copies,), generator=generator, dtype=torch.float64) - 1
            yield nothing, self.target + self.noise * torch.cat([signs, nothing[:1]])


class _Sine(nn.Module):
    """h -> sin(h + w)."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size, dtype=torch.float64))

    def forward(self, hidden: Tensor) -> Tensor:
        return torch.sin(hidden + self.weight)


def _rate_of(rates: Sequence[float]) -> Callable[[int], float]:
    # A scheduler also asks for the rate after the last update.
    return lambda update: rates[min(update, len(rates) - 1)]
