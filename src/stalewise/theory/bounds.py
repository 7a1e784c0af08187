"""Learning rates at which stale training provably converges, as functions of L, M, K and the staleness.

    L    Lipschitz constant of the gradient and of the partial models' Jacobians
    M    bound of the error gradients
    K    number of stages               D   the largest staleness, m_0
    u    L * alpha, where alpha is the learning rate

Every bound is the positive root of a quadratic, A u^2 + B u = 1. `quoted_condition` is the paper's, as far as it is
known [R]; `proven_condition` is what the proof in docs/theory.md needs, and never stricter.

    SGD           quoted  A = c0 D^2 / 2              B = D^2 + 2
                  proven  A = c1 D^2                  B = 1
    unified form  quoted  A = c0 D^2 (c2 + s^2)       B = (3 + beta^2 c2 + 2 (1-beta)^2 D^2 (c2 + s^2)) / (1-beta)
                  proven  A = 2 c1 D^2 (c2 + s^2)     B = (2 + beta^2 c2) / (1-beta)

    c0 = M^2 K (K+1)^2
    c1 = M^2 (K^2 + 2^2 + 3^2 + .. + K^2)             at most c0 / 2 for every K
    c2 = ((1-beta) s - 1)^2 / (1-beta)^2

Source: Xu et al., arXiv:1909.02625 [R for the quoted conditions]; docs/theory.md.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from stalewise.errors import ConfigError
from stalewise.protocol.numbers import check_real
from stalewise.protocol.staleness import Staleness

__all__ = ["Condition", "checked_momentum", "mean_squared_gradient_bound", "proven_condition", "quoted_condition"]


@dataclass(frozen=True, kw_only=True)
class Condition:
    """A u^2 + B u <= 1 with u = L * alpha.

    Args:
        quadratic: A.
        linear: B.
        lipschitz: L.
    """

    quadratic: float
    linear: float
    lipschitz: float

    @property
    def learning_rate(self) -> float:
        """The largest alpha that meets the condition."""
        # The usual formula subtracts nearly equal numbers where A is small.
        root = 2 / (self.linear + math.sqrt(self.linear**2 + 4 * self.quadratic))
        return root / self.lipschitz


def quoted_condition(
    staleness: Sequence[int], *, lipschitz: float, error_bound: float, momentum: float | None = None, s: float = 0.0
) -> Condition:
    """The paper's condition, as it is quoted in docs/theory.md.

    Args:
        staleness: m_k per stage, in batches.
        lipschitz: L.
        error_bound: M.
        momentum: beta of the unified form, in 0 .. 1 (below 1); None for plain SGD.
        s: of the unified form: 0 is heavy ball, 1 is Nesterov. Of no effect without momentum.

    Raises:
        ConfigError: where a number is out of its range.
    """
    stages, deepest = _checked(staleness, lipschitz, error_bound)
    c0 = error_bound**2 * stages * (stages + 1) ** 2
    if momentum is None:
        return Condition(quadratic=c0 * deepest**2 / 2, linear=deepest**2 + 2, lipschitz=lipschitz)
    c2 = _c2(momentum, s)
    rest = 1 - momentum
    c4 = 3 + momentum**2 * c2 + 2 * rest**2 * deepest**2 * (c2 + s**2)
    return Condition(quadratic=c0 * deepest**2 * (c2 + s**2), linear=c4 / rest, lipschitz=lipschitz)


def proven_condition(
    staleness: Sequence[int], *, lipschitz: float, error_bound: float, momentum: float | None = None, s: float = 0.0
) -> Condition:
    """The condition of the theorems in docs/theory.md; arguments as for `quoted_condition`."""
    stages, deepest = _checked(staleness, lipschitz, error_bound)
    c1 = _c1(stages, error_bound)
    if momentum is None:
        return Condition(quadratic=c1 * deepest**2, linear=1.0, lipschitz=lipschitz)
    c2 = _c2(momentum, s)
    return Condition(
        quadratic=2 * c1 * deepest**2 * (c2 + s**2),
        linear=(2 + momentum**2 * c2) / (1 - momentum),
        lipschitz=lipschitz,
    )


def mean_squared_gradient_bound(
    staleness: Sequence[int],
    *,
    lipschitz: float,
    error_bound: float,
    variance: float,
    gap: float,
    rates: Sequence[float],
    momentum: float | None = None,
    s: float = 0.0,
) -> float:
    """What the theorems promise of the mean of ||grad f(x_t)||^2 over the updates, weighted with their rates.

    Args:
        staleness: m_k per stage, in batches.
        lipschitz: L.
        error_bound: M.
        variance: sigma^2, of the stale gradient of one batch around its mean.
        gap: f(x_0) minus the least value of f.
        rates: alpha_t of every update, never growing.
        momentum: beta of the unified form; None for plain SGD.
        s: of the unified form.

    Raises:
        ConfigError: where the rates grow, or the first is above the proven bound: nothing is promised then.
    """
    condition = proven_condition(staleness, lipschitz=lipschitz, error_bound=error_bound, momentum=momentum, s=s)
    if not rates or any(after > before for before, after in zip(rates, rates[1:], strict=False)):
        raise ConfigError("rates is empty or grows; the theorems need learning rates that never grow.")
    if rates[0] > condition.learning_rate:
        raise ConfigError(
            f"the first learning rate is {rates[0]:.4g}, above the bound {condition.learning_rate:.4g}; nothing is "
            "promised there. Lower it."
        )
    stages, deepest = _checked(staleness, lipschitz, error_bound)
    stale = _c1(stages, error_bound) * deepest**2 * lipschitz**2
    squares, cubes = math.fsum(rate**2 for rate in rates), math.fsum(rate**3 for rate in rates)
    if momentum is None:
        noise = lipschitz * squares + stale * cubes
        return (2 * gap + variance * noise) / math.fsum(rates)
    c2, rest = _c2(momentum, s), 1 - momentum
    noise = lipschitz * (1 + momentum**2 * c2) / rest**2 * squares + 2 * stale * (c2 + s**2) / rest * cubes
    return (2 * gap + variance * noise) * rest / math.fsum(rates)


def checked_momentum(momentum: float, s: float) -> None:
    """Refuse numbers for which the unified form is not defined.

    Raises:
        ConfigError: where beta is not in 0 .. 1 (below 1), or s is negative.
    """
    check_real("momentum", momentum)
    check_real("s", s)
    if not 0 <= momentum < 1:
        raise ConfigError(f"momentum is {momentum!r}; beta of the unified form is at least 0 and below 1.")
    if s < 0:
        raise ConfigError(f"s is {s!r}; it is a number of at least 0: 0 is heavy ball, 1 is Nesterov.")


def _checked(staleness: Sequence[int], lipschitz: float, error_bound: float) -> tuple[int, int]:
    """K and D."""
    for name, value in (("lipschitz", lipschitz), ("error_bound", error_bound)):
        check_real(name, value, "a number above 0")
        if value <= 0:
            raise ConfigError(f"{name} is {value!r}; it must be a number above 0.")
    depths = Staleness(staleness)
    return len(depths), depths[0]


def _c1(stages: int, error_bound: float) -> float:
    return error_bound**2 * (stages**2 + sum(count**2 for count in range(2, stages + 1)))


def _c2(momentum: float, s: float) -> float:
    checked_momentum(momentum, s)
    return ((1 - momentum) * s - 1) ** 2 / (1 - momentum) ** 2
