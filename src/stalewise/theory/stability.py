"""How large a learning rate a quadratic bears under delays: exact, by the roots of the characteristic polynomial.

Stages h -> h + w_k with the loss (a/2) h^2 of the last output: the gradient of every weight at update t is
a * sum_k w_k[t - m_k], so that all weights move together, and with u = alpha * a and modes z^t

    SGD           z - 1 + u S(z) = 0                                             S(z) = sum_k z^(-m_k)
    unified form  (z - 1)(1 - beta/z) + u (1 + s beta (1 - 1/z)) S(z) = 0

summed over the trained stages. Training converges if and only if all z are inside the unit circle. From u = 0 on, where
z = 1 moves inwards, it does so until a root reaches the circle: at the least u > 0 that solves the equation for
some z = exp(i theta). There u is

    u(z) = - (z - 1)(1 - beta/z) / ((1 + s beta (1 - 1/z)) S(z))

and has to be real: a trigonometric polynomial is zero. Divided by sin(theta) it is one in cos(theta), whose roots all
come at once from a companion matrix in the Chebyshev basis, which is well conditioned on the circle. theta = pi is
looked at by itself. One trained stage of delay T, without momentum: u = 2 sin(pi / (2 (2T + 1))).

Source: own derivation, docs/theory.md, section 6.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.polynomial import chebyshev
from numpy.typing import NDArray

from stalewise.errors import ConfigError
from stalewise.protocol.numbers import check_real
from stalewise.protocol.staleness import whole_numbers
from stalewise.theory.bounds import checked_momentum

__all__ = ["closed_form_limit", "spectral_radius", "stability_limit"]

_REAL = 1e-6
"""How far from the real numbers rounding may take a root; every root found is then judged by u itself."""


def closed_form_limit(delay: int) -> float:
    """2 sin(pi / (2 (2T + 1))): the limit of alpha * a for one trained stage of delay T, without momentum."""
    (checked,) = whole_numbers("delay", (delay,))
    return 2 * math.sin(math.pi / (2 * (2 * checked + 1)))


def spectral_radius(staleness: Sequence[int], step: float, *, momentum: float = 0.0, s: float = 0.0) -> float:
    """By how much the slowest mode is multiplied per update; below 1 training converges.

    Args:
        staleness: m_k of the trained stages, in batches, in any order.
        step: u = alpha * a, where a is the eigenvalue.
        momentum: beta of the unified form.
        s: of the unified form.
    """
    check_real("step", step)
    depths = _checked(staleness, momentum, s)
    polynomial = np.polyadd(_inertia(depths, momentum), step * _pull(depths, momentum, s))
    return float(max(abs(np.roots(polynomial))))


def stability_limit(staleness: Sequence[int], *, momentum: float = 0.0, s: float = 0.0) -> float:
    """The limit of alpha * a: below it training converges, just above it diverges.

    Args:
        staleness: m_k of the trained stages, in batches, in any order; stages without weights are left out.
        momentum: beta of the unified form, at least 0 and below 1.
        s: 0 for heavy ball, 1 for Nesterov.

    Raises:
        ConfigError: where a number is out of its range.
    """
    depths = _checked(staleness, momentum, s)
    inertia, pull = _inertia(depths, momentum), _pull(depths, momentum, s)
    # inertia(z) * conj(pull(z)) on the circle, as coefficients of z^n, n = -degree .. degree
    product = np.convolve(inertia, pull[::-1])
    middle = len(product) // 2
    sines = product[middle - 1 :: -1] - product[middle + 1 :]  # of sin(n theta), n = 1 ..
    z = np.append(np.exp(1j * np.arccos(_real_roots(_second_to_first_kind(sines)))), -1)
    with np.errstate(divide="ignore", invalid="ignore"):
        steps = -np.polyval(inertia, z) / np.polyval(pull, z)
    crossing = steps.real[np.isfinite(steps) & (steps.real > _REAL**2) & (abs(steps.imag) < 1e-4 * abs(steps.real))]
    return float(min(crossing))


def _inertia(depths: Sequence[int], momentum: float) -> NDArray[np.float64]:
    """(z - 1)(z - beta) z^D: what stays without gradients. Highest power first, as NumPy has it."""
    return np.concatenate([[1.0, -1.0 - momentum, momentum], np.zeros(max(depths))])


def _pull(depths: Sequence[int], momentum: float, s: float) -> NDArray[np.float64]:
    """((1 + s beta) z - s beta) sum_k z^(D - m_k), of the same degree as `_inertia`."""
    deepest = max(depths)
    pull = np.zeros(deepest + 3)
    for depth in depths:
        pull[depth + 1] += 1 + s * momentum
        pull[depth + 2] -= s * momentum
    return pull


def _second_to_first_kind(coefficients: NDArray[np.float64]) -> NDArray[np.float64]:
    """sum_n c_n U_n(x) in Chebyshev polynomials of the first kind: U_n = 2 (T_n + T_{n-2} + ..), T_0 once."""
    first = np.zeros(len(coefficients))
    for index in range(len(coefficients)):
        first[index] = 2 * coefficients[index::2].sum()
    first[0] /= 2
    return first


def _real_roots(series: NDArray[np.float64]) -> NDArray[np.float64]:
    """Of a Chebyshev series, in -1 .. 1."""
    # Leading coefficients of almost nothing make the companion matrix useless; Newton's steps make up for leaving them.
    roots = chebyshev.chebroots(chebyshev.chebtrim(series, _REAL**2 * max(abs(series))))
    near = roots[(abs(roots.imag) < _REAL) & (abs(roots.real) <= 1 + _REAL)].real
    derivative = chebyshev.chebder(series)
    for _ in range(3):
        slope = chebyshev.chebval(near, derivative)
        steps = np.divide(chebyshev.chebval(near, series), slope, out=np.zeros_like(near), where=slope != 0)
        near = near - np.where(abs(steps) < _REAL, steps, 0)
    return np.clip(near, -1, 1)


def _checked(staleness: Sequence[int], momentum: float, s: float) -> tuple[int, ...]:
    checked_momentum(momentum, s)
    depths = whole_numbers("staleness", staleness)
    if max(depths) > 200:
        raise ConfigError(f"staleness {depths} is deeper than 200, where rounding would decide. Give a smaller one.")
    return depths
