"""The split against a search through all splits."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations, pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stalewise.plan.split import best_cuts


def stage_costs(
    forward: Sequence[float], backward: Sequence[float], recompute: Sequence[bool], cuts: tuple[int, ...]
) -> list[float]:
    bounds = (0, *cuts, len(forward))
    return [
        sum(forward[start:end]) * (2 if flag else 1) + sum(backward[start:end])
        for (start, end), flag in zip(pairwise(bounds), recompute, strict=True)
    ]


def brute_force(forward: Sequence[float], backward: Sequence[float], recompute: Sequence[bool]) -> tuple[int, ...]:
    """The best of all cuts, by the documented order."""

    def rank(cuts: tuple[int, ...]) -> tuple[float, float, tuple[int, ...]]:
        costs = stage_costs(forward, backward, recompute, cuts)
        return max(costs), sum(cost**2 for cost in costs), cuts

    return min(combinations(range(1, len(forward)), len(recompute) - 1), key=rank)


@st.composite
def problems(draw: st.DrawFn, cost: st.SearchStrategy[float]) -> tuple[list[float], list[float], list[bool]]:
    num_layers = draw(st.integers(1, 9))
    num_stages = draw(st.integers(1, min(4, num_layers)))
    times = st.lists(cost, min_size=num_layers, max_size=num_layers)
    return draw(times), draw(times), draw(st.lists(st.booleans(), min_size=num_stages, max_size=num_stages))


@settings(max_examples=300, deadline=None)
@given(problems(st.integers(0, 6)))
def test_small_costs_with_many_ties_give_the_cuts_of_the_search(
    problem: tuple[list[int], list[int], list[bool]],
) -> None:
    assert best_cuts(*problem) == brute_force(*problem)


@settings(max_examples=100, deadline=None)
@given(problems(st.integers(0, 1_000_000)), st.integers(-60, 60))
def test_any_unit_gives_the_cuts_of_the_search(problem: tuple[list[int], list[int], list[bool]], exponent: int) -> None:
    forward, backward, recompute = problem
    scaled = [[cost * 2.0**exponent for cost in costs] for costs in (forward, backward)]
    assert best_cuts(*scaled, recompute) == brute_force(*problem)


@settings(max_examples=100, deadline=None)
@given(problems(st.floats(1e-7, 10.0)))
def test_measured_times_give_the_slowest_stage_of_the_search(
    problem: tuple[list[float], list[float], list[bool]],
) -> None:
    found = max(stage_costs(*problem, best_cuts(*problem)))
    assert found == pytest.approx(max(stage_costs(*problem, brute_force(*problem))), rel=1e-8)


@pytest.mark.parametrize("cost", [0.1, 0.3, 1e-3, 1 / 3, 7e-6])
def test_equal_layers_are_seen_as_equal_though_their_sums_differ_in_floating_point(cost: float) -> None:
    # 3, 3, 2 and 2 layers in any order have the same maximum and squares; the first stages get the fewest
    assert best_cuts([cost] * 10, [2 * cost] * 10, [True] * 4) == (2, 4, 7)


def test_the_second_slowest_stage_counts_among_equally_slow_splits() -> None:
    # layer 0 alone is the slowest stage whatever follows; 3+3 beats 1+5 and 2+4
    assert best_cuts([9, 1, 1, 1, 1, 1, 1], [0] * 7, [False] * 3) == (1, 4)


def test_the_last_stage_gets_more_layers_where_it_does_not_recompute() -> None:
    forward, backward = [1.0] * 23, [2.0] * 23
    assert best_cuts(forward, backward, [True, True, True, False]) == (5, 10, 15)
    assert best_cuts(forward, backward, [True] * 4) == (5, 11, 17)


def test_layers_without_cost_still_fill_every_stage() -> None:
    assert best_cuts([0.0] * 4, [0.0] * 4, [False] * 3) == (1, 2)


def test_no_split_of_350_layers_into_32_stages_is_faster() -> None:
    """A greedy filling succeeds whenever some split is fast enough; just below the optimum it fails."""
    random = np.random.default_rng(0)
    forward, backward = random.uniform(0.1, 1.0, 350), random.uniform(0.1, 3.0, 350)
    recompute = [True] * 31 + [False]
    cuts = best_cuts(list(forward), list(backward), recompute)
    assert len(cuts) == 31
    assert all(after > before for before, after in pairwise((0, *cuts, 350)))
    slowest = max(stage_costs(list(forward), list(backward), recompute, cuts))

    def fits(limit: float) -> bool:
        layer = 0
        for flag in recompute:
            costs = np.cumsum((forward * (2 if flag else 1) + backward)[layer:])
            layer += int(np.searchsorted(costs, limit, side="right"))
        return layer == 350

    assert fits(slowest * (1 + 1e-9))
    assert not fits(slowest * (1 - 1e-6))
