"""The best contiguous split of layers over stages, by dynamic programming.

    i, j     layer indices; a span i:j is the layers i .. j-1 on one stage
    o        a way in which a stage can run a span, such as with and without recompute
    c_ko     cost of a span on stage k in way o; never where it is not allowed

    worst_k[i] = min over j > i, o of max(c_ko(i:j), worst_{k+1}[j])          worst_K[L] = 0
    score_k[i] = min over j > i, o of s_ko(i:j) + score_{k+1}[j]              score_K[L] = 0
                 where c_ko(i:j) <= worst_0[0]

The first recurrence gives the slowest stage that cannot be avoided. Many splits reach it, so the second one picks
among them the one with the least total score: by default the sum of squared costs. The best j is looked up from the
front, and the smallest one wins, so of equal splits the one with the fewest layers in the first stages is returned:
these stages keep the inputs of the most batches. Of equal ways the first wins.

Costs are counted in whole units of about a 2^52nd of their total. Sums of equal costs are then equal in whatever
order they are taken, which they are not in floating point, and equal splits are seen to be equal.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["NEVER", "Split", "best_cuts", "best_split", "span_sums"]

_TOTAL_BITS = 52
"""The total cost is below 2^52 units, give or take the rounding of each cost."""
_SQUARE_BITS = 30
"""What is squared has its total below 2^30, so that a sum of squares is below 2^60."""
_TOLERANCE_BITS = 30
"""A stage that exceeds the slowest one by less than a 2^30th of it is as good."""

NEVER = 1 << 61
"""The cost or score of a span that is empty, too slow or not allowed. Two of them, added, still fit 64 bits."""

Spans = NDArray[np.int64]
"""[i, j]: a number for every span i:j; shape [L + 1, L + 1]."""


@dataclass(frozen=True)
class Split:
    """What `best_split` found.

    Args:
        cuts: K - 1 increasing layer indices; entry k is the first layer of stage k + 1.
        ways: for each of the K stages, the index of the way in which it runs.
        worst: cost of the slowest stage.
    """

    cuts: tuple[int, ...]
    ways: tuple[int, ...]
    worst: int


def best_split(
    costs: Sequence[Sequence[Spans]], scores: Callable[[int, int], list[list[Spans]]] | None = None
) -> Split | None:
    """The split with the cheapest most expensive stage, then with the least score, then with the first cuts.

    Takes O(K L^2) time and memory for L layers and K stages. Exact to one part in 10^9: a stage that exceeds the
    slowest one by less than that counts as equal to it.

    Args:
        costs: of each stage, for each of its ways, the cost of every span, whole numbers from 0 to `NEVER`, in all
            below 2^53.
        scores: (the slowest stage that cannot be avoided, the limit that includes the tolerance) -> of the same form
            as `costs`, `NEVER` where a span must not be chosen. None: squared costs.

    Returns:
        None where no split is allowed.
    """
    num_layers = len(costs[0][0]) - 1
    worst = np.full(num_layers + 1, NEVER)
    worst[-1] = 0
    for ways in reversed(costs):
        worst = np.min([np.maximum(spans, worst).min(axis=1) for spans in ways], axis=0)
    slowest = int(worst[0])
    if slowest >= NEVER:
        return None
    limit = slowest + (slowest >> _TOLERANCE_BITS)
    chosen_by = _squares(costs, limit) if scores is None else scores(slowest, limit)

    score = np.full(num_layers + 1, NEVER)
    score[-1] = 0
    ends: list[NDArray[np.intp]] = []
    chosen: list[NDArray[np.intp]] = []
    for ways in reversed(chosen_by):
        totals = np.stack([spans + score for spans in ways])
        way = totals.argmin(axis=0)
        total = totals.min(axis=0)
        end = total.argmin(axis=1)
        ends.append(end)
        chosen.append(way[np.arange(num_layers + 1), end])
        score = np.minimum(total.min(axis=1), NEVER)

    bounds, taken = [0], []
    for end, way in zip(reversed(ends), reversed(chosen), strict=True):
        taken.append(int(way[bounds[-1]]))
        bounds.append(int(end[bounds[-1]]))
    assert bounds[-1] == num_layers, "the last stage ends with the last layer"
    return Split(tuple(bounds[1:-1]), tuple(taken), slowest)


def best_cuts(forward: Sequence[float], backward: Sequence[float], recompute: Sequence[bool]) -> tuple[int, ...]:
    """Cuts that minimise the slowest stage, then the sum of squared stage costs, then the cuts themselves.

    Args:
        forward: cost of each layer's forward, finite and >= 0, in any unit.
        backward: cost of each layer's backward, in the same unit, as many.
        recompute: whether the forwards of a stage count twice; between one and L flags, one per stage.

    Returns:
        K - 1 increasing layer indices; entry k is the first layer of stage k + 1.
    """
    once, back = np.asarray(forward, np.float64), np.asarray(backward, np.float64)
    total = float((2 * once + back).sum())
    spans = {flag: span_sums((2 if flag else 1) * once + back, total) for flag in set(recompute)}
    split = best_split([[spans[flag]] for flag in recompute])
    assert split is not None, "there are at least as many layers as stages"
    return split.cuts


def span_sums(costs: NDArray[np.float64], total: float) -> Spans:
    """The cost of every span in whole units; `NEVER` for empty ones.

    Args:
        costs: of each layer, >= 0.
        total: what 2^52 units stand for, up to a factor of two; the same for all that are compared.
    """
    before = np.concatenate(([0], np.cumsum(in_units(costs, total))))
    ends = np.arange(len(before))
    return np.where(ends > ends[:, None], before - before[:, None], NEVER)


def in_units(costs: NDArray[np.float64], total: float) -> NDArray[np.int64]:
    """Costs in whole units; see `span_sums`."""
    _, exponent = math.frexp(total)
    return np.rint(np.ldexp(costs, _TOTAL_BITS - exponent)).astype(np.int64)


def _squares(costs: Sequence[Sequence[Spans]], limit: int) -> list[list[Spans]]:
    shift = _TOTAL_BITS - _SQUARE_BITS
    return [[np.where(spans <= limit, (spans >> shift) ** 2, NEVER) for spans in ways] for ways in costs]
