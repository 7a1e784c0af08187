"""How fast stale training approaches critical points, observed: a power of the number of updates, with its interval.

Over N updates the theorems bound the mean of |grad f(x_t)|^2, weighted with the learning rates:

    constant      alpha = c / sqrt(N), at most the bound           a run per N       N^(-1/2)
    diminishing   alpha_t = alpha_0 (1 + 16 t / N_min)^(-3/4)      one run           N^(-1/4)

The exponent is the slope of a straight line through the logarithms. Copies of the problem are split into groups, each
group gives an exponent of its own, and the interval is Student's for their mean.

Source: docs/theory.md, sections 4, 5 and 7.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from stalewise.errors import ConfigError
from stalewise.protocol.numbers import check_count
from stalewise.protocol.staleness import whole_numbers
from stalewise.theory.bounds import mean_squared_gradient_bound, proven_condition
from stalewise.theory.chain import SineChain

__all__ = ["PREDICTED", "ObservedRate", "StepSizes", "observe_rate"]

StepSizes = Literal["constant", "diminishing"]

PREDICTED: dict[StepSizes, float] = {"constant": -0.5, "diminishing": -0.25}
"""The exponents of the theorems."""

_DECAY = 0.75
_GROUPS = 16
_T_QUANTILE = 2.131
"""Of Student's distribution with 15 degrees of freedom, for 95% in the middle."""


@dataclass(frozen=True, kw_only=True)
class ObservedRate:
    """What was seen of one optimizer at one staleness.

    Args:
        exponent: of the mean squared gradient as a power of the number of updates.
        low: of the 95% interval of the exponent.
        high: of the same.
        means: mean squared gradient per number of updates.
        promises: what the theorem bounds each of them by.
        noiseless: share of each that a run without noise has; small where noise dominates.
    """

    exponent: float
    low: float
    high: float
    means: tuple[float, ...]
    promises: tuple[float, ...]
    noiseless: tuple[float, ...]


def observe_rate(
    problem: SineChain,
    staleness: Sequence[int],
    *,
    steps: StepSizes,
    updates: Sequence[int] = (1024, 2048, 4096, 8192),
    copies: int = 1024,
    seed: int = 0,
    momentum: float | None = None,
    s: float = 0.0,
) -> ObservedRate:
    """Train for several numbers of updates and fit the exponent; blocks until done.

    Args:
        problem: what is trained.
        staleness: m_k per stage, in batches.
        steps: "constant" or "diminishing", see the module.
        updates: growing numbers N.
        copies: of the problem, a multiple of 16.
        seed: of the noise; run i has seed + i.
        momentum: beta of the unified form; None: plain SGD.
        s: of the unified form.

    Raises:
        ConfigError: where there are fewer than two N, or copies cannot be split.
    """
    for count in whole_numbers("updates", updates):
        check_count("updates", count)
    check_count("copies", copies)
    check_count("seed", seed, 0)
    if len(updates) < 2 or list(updates) != sorted(set(updates)) or updates[0] < 1:
        raise ConfigError(f"updates is {tuple(updates)}; a slope takes at least two growing numbers of updates.")
    if copies < _GROUPS or copies % _GROUPS:
        raise ConfigError(f"copies is {copies}; it must be a multiple of {_GROUPS}, which make a group each.")
    bound = proven_condition(
        staleness, lipschitz=problem.lipschitz, error_bound=problem.error_bound, momentum=momentum, s=s
    ).learning_rate
    # At the smallest N the rate is 1 / sqrt(N) or the bound; the same c / sqrt(N) for all others keeps to the theorem.
    first = min(1 / math.sqrt(updates[0]), bound)
    means: list[Tensor] = []
    promises = []
    if steps == "diminishing":
        longest = [first * (1 + 16 * update / updates[0]) ** -_DECAY for update in range(updates[-1])]
        squares = problem.squared_gradients(staleness, longest, copies=copies, seed=seed, momentum=momentum, s=s)
    for index, count in enumerate(updates):
        if steps == "constant":
            rates = [first * math.sqrt(updates[0] / count)] * count
            squares = problem.squared_gradients(
                staleness, rates, copies=copies, seed=seed + index, momentum=momentum, s=s
            )
        else:
            rates = longest[:count]
        weights = torch.tensor(rates, dtype=torch.float64)
        means.append(weights @ squares[:count] / weights.sum())
        promises.append(
            mean_squared_gradient_bound(
                staleness,
                lipschitz=problem.lipschitz,
                error_bound=problem.error_bound,
                variance=problem.variance,
                gap=problem.gap,
                rates=rates,
                momentum=momentum,
                s=s,
            )
        )
    groups = torch.stack([mean[:copies].view(_GROUPS, -1).mean(1) for mean in means])
    slopes = np.polyfit(np.log(updates), groups.log().numpy(), 1)[0].tolist()
    exponent = statistics.fmean(slopes)
    half = _T_QUANTILE * statistics.stdev(slopes) / math.sqrt(_GROUPS)
    together = [float(mean[:copies].mean()) for mean in means]
    return ObservedRate(
        exponent=exponent,
        low=exponent - half,
        high=exponent + half,
        means=tuple(together),
        promises=tuple(promises),
        noiseless=tuple(float(mean[-1]) / total for mean, total in zip(means, together, strict=True)),
    )
