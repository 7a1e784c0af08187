"""The best contiguous split of costs over stages, by dynamic programming.

    i, j     layer indices; a span i:j is the layers i .. j-1 on one stage
    c_k      cost of a span on stage k: its forwards and backwards, its forwards once more where k recomputes

    worst_k[i]  = min over j > i of max(c_k(i:j), worst_{k+1}[j])          worst_K[L] = 0
    square_k[i] = min over j > i of c_k(i:j)^2 + square_{k+1}[j]           square_K[L] = 0
                  where c_k(i:j) <= worst_0[0]

The first recurrence gives the slowest stage that cannot be avoided. Many splits reach it, so the second one
picks among them the one whose stages have the smallest sum of squares. The best j is looked up from the
front, and the smallest one wins, so of equal splits the one with the fewest layers in the first stages is
returned: these stages keep the inputs of the most batches.

Costs are counted in whole units of about a 2^52nd of their total. Sums of equal costs are then equal in
whatever order they are taken, which they are not in floating point, and equal splits are seen to be equal.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

__all__ = ["best_cuts"]

_TOTAL_BITS = 52
"""The total cost is below 2^52 units, give or take the rounding of each cost."""
_SQUARE_BITS = 30
"""What is squared has its total below 2^30, so that a sum of squares is below 2^60."""
_TOLERANCE_BITS = 30
"""A stage that exceeds the slowest one by less than a 2^30th of it is as good."""
_NEVER = 1 << 61
"""The score of a span that is empty or too slow. Two of them, added, still fit 64 bits."""


def best_cuts(forward: Sequence[float], backward: Sequence[float], recompute: Sequence[bool]) -> tuple[int, ...]:
    """Cuts that minimise the slowest stage, then the sum of squared stage costs, then the cuts themselves.

    Takes O(K L^2) time and O(L^2) memory for L layers and K stages. Exact to one part in 10^9: a stage that
    exceeds the slowest one by less than that counts as equal to it.

    Args:
        forward: cost of each layer's forward, finite and >= 0, in any unit.
        backward: cost of each layer's backward, in the same unit, as many.
        recompute: whether the forwards of a stage count twice; between one and L flags, one per stage.

    Returns:
        K - 1 increasing layer indices; entry k is the first layer of stage k + 1.
    """
    spans = _spans(np.asarray(forward, np.float64), np.asarray(backward, np.float64))
    worst = np.full(len(forward) + 1, _NEVER)
    worst[-1] = 0
    for flag in reversed(recompute):
        worst = np.maximum(spans[bool(flag)], worst).min(axis=1)
    limit = int(worst[0]) + (int(worst[0]) >> _TOLERANCE_BITS)

    shift = _TOTAL_BITS - _SQUARE_BITS
    squares = {flag: np.where(span <= limit, (span >> shift) ** 2, _NEVER) for flag, span in spans.items()}
    square = np.full(len(forward) + 1, _NEVER)
    square[-1] = 0
    choices: list[NDArray[np.intp]] = []
    for flag in reversed(recompute):
        scores = squares[bool(flag)] + square
        choices.append(scores.argmin(axis=1))
        square = np.minimum(scores.min(axis=1), _NEVER)

    cuts = [0]
    for choice in reversed(choices):
        cuts.append(int(choice[cuts[-1]]))
    assert cuts[-1] == len(forward), "the last stage ends with the last layer"
    return tuple(cuts[1:-1])


def _spans(forward: NDArray[np.float64], backward: NDArray[np.float64]) -> dict[bool, NDArray[np.int64]]:
    """Cost of every span in units, [i, j] for i:j, without and with recompute; `_NEVER` for empty ones."""
    _, exponent = math.frexp(float((2 * forward + backward).sum()))
    scale = _TOTAL_BITS - exponent
    once, back = (np.rint(np.ldexp(cost, scale)).astype(np.int64) for cost in (forward, backward))
    spans = {}
    for flag in (False, True):
        before = np.concatenate(([0], np.cumsum(once + back + (once if flag else 0))))
        ends = np.arange(len(before))
        spans[flag] = np.where(ends > ends[:, None], before - before[:, None], _NEVER)
    return spans
