"""The maximum cycle mean is the pace of long runs, and that of all simple cycles where these can be listed."""

from __future__ import annotations

from fractions import Fraction
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from timing.test_recurrence import random_costs, random_links
from timing.walk import methods

from stalewise.methods import BP, DSP, FeaturesReplay, GPipe, Method, OneFOneB, PipeDream
from stalewise.protocol.actions import Kind
from stalewise.timing import LinkCost, Links, StepCosts, TimedProgram
from stalewise.timing.cycle import maximum_cycle_ratio

F, R, B = 1_000, 1_000, 2_000


def timed(method: Method, links: Links | None = None) -> TimedProgram:
    program = method.program()
    return TimedProgram(
        program, StepCosts.of_kinds(program, {Kind.FORWARD: F, Kind.RECOMPUTE: R, Kind.BACKWARD: B}), links
    )


@given(method=methods(), seed=st.integers(0, 10_000))
@settings(max_examples=120)
def test_long_runs_keep_its_pace(method: Method, seed: int) -> None:
    """Ends are bounded away from n times the mean, so over many steps nothing else can fit."""
    program = method.program()
    once = TimedProgram(program, random_costs(program, 1, seed), random_links(method.num_stages, seed))
    cycle = once.cycle()
    # All groups of accumulated batches are as long as this many steps.
    group = 6
    far, near = 160 * group, 40 * group
    ends = once.run(far + 1).step_ends[-1, :, 0]
    grown = int(ends[far] - ends[near])
    # One period of everything bounds how far a step can be from its place in the long run.
    apart = sum(int(table.sum()) for table in once.costs.tables) + 29 * 2 * method.num_stages
    assert abs(grown - cycle.step_ns * (far - near)) <= 2 * apart
    # It comes back to exactly the same distance: the fraction is exact. Where another cycle is nearly as slow, late.
    for last in (far, 10 * far):
        ends = once.run(last + 1).step_ends[-1, :, 0]
        gaps = range(cycle.step_ns.denominator * group, last // 2, cycle.step_ns.denominator * group)
        if any(int(ends[last] - ends[last - gap]) == cycle.step_ns * gap for gap in gaps):
            return
    pytest.fail(f"{cycle.step_ns} is never met exactly")


@given(st.integers(1, 5), st.integers(0, 10**6))
@settings(max_examples=150)
def test_no_simple_cycle_has_more(nodes: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    sources = random.integers(-1, nodes, (2, nodes))
    times, steps = random.integers(0, 50, (2, nodes)), random.integers(1, 4, (2, nodes))
    best = Fraction(0)
    for length in range(1, nodes + 1):
        for chain in permutations(range(nodes), length):
            for choice in range(2**length):
                arcs = [choice >> place & 1 for place in range(length)]
                if all(
                    sources[arc, node] == chain[place - 1]
                    for place, (node, arc) in enumerate(zip(chain, arcs, strict=True))
                ):
                    time = sum(int(times[arc, node]) for node, arc in zip(chain, arcs, strict=True))
                    count = sum(int(steps[arc, node]) for node, arc in zip(chain, arcs, strict=True))
                    best = max(best, Fraction(time, count))
    ratio, found = maximum_cycle_ratio(sources, times, steps, at_least=Fraction(0))
    assert ratio == best
    assert bool(found) == (best > 0)
    huge, _ = maximum_cycle_ratio(sources, times * 10**16, steps, at_least=Fraction(0))
    assert huge == best * 10**16


@pytest.mark.parametrize("stages", [1, 2, 3, 8])
def test_known_paces(stages: int) -> None:
    """A BP pipeline does 3K in series; decoupled ones do what one stage does; GPipe has its bubble."""
    assert timed(BP(stages)).cycle().step_ns == 3_000 * stages
    assert timed(PipeDream(stages)).cycle().step_ns == 3_000
    assert timed(DSP.minimal(stages)).cycle().step_ns == (4_000 if stages > 1 else 3_000)
    flush = 3_000 * (4 + stages - 1) // 4
    assert timed(GPipe(stages, micro_batches=4, activations="stored")).cycle().step_ns == flush
    assert timed(OneFOneB(stages, micro_batches=4)).cycle().step_ns == flush
    assert timed(DSP(staleness=(0,) * stages, accumulate=3)).cycle().step_ns == 3_000 * stages


def test_forward_locking_shows() -> None:
    """FR's first stage starts a batch when the last has forwarded the one before: K forwards in series."""
    assert timed(FeaturesReplay(8)).cycle().step_ns > timed(DSP(staleness=range(7, -1, -1))).cycle().step_ns


@pytest.mark.parametrize("slack", [1, 2, 3, 5])
def test_slack_bears_the_delay_that_it_should(slack: int) -> None:
    """Up to (4 d - 3) / 2 forward-times one way."""
    method = DSP(staleness=(2 * slack, slack, 0))
    most = (4 * slack - 3) * F // 2
    at = timed(method, Links.equal(3, LinkCost(latency_ns=most)))
    assert at.cycle().step_ns == 4 * F
    assert at.describe(at.cycle()) == "stage 0: its own work fills every step"
    beyond = timed(method, Links.equal(3, LinkCost(latency_ns=most + 1)))
    assert beyond.cycle().step_ns > 4 * F
    assert "wait for each other" in beyond.describe(beyond.cycle())
    assert len(set(beyond.cycle().processors)) > 1


def test_updates_that_come_once_in_a_group_count_once() -> None:
    program = DSP(staleness=(2, 0), activations="stored", accumulate=4).program()
    costs = StepCosts.of_kinds(program, {Kind.FORWARD: 10, Kind.BACKWARD: 20, Kind.UPDATE: 10})
    assert TimedProgram(program, costs).cycle().step_ns == Fraction(130, 4)
