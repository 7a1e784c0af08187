"""The depth that measured jitter needs."""

from __future__ import annotations

import functools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stalewise.errors import ConfigError, PlanError
from stalewise.methods import BP, DSP, build_method
from stalewise.methods.registry import describe_method, method_options
from stalewise.plan.auto_depth import jitter_of_passes, plan_with_depth
from stalewise.plan.depth import Depth, Jitter, choose_depth
from stalewise.plan.partition import LayerCost
from stalewise.protocol.actions import Kind
from stalewise.timing import LinkCost, Links

MS = 10**6


def times(num_stages: int) -> dict[Kind, list[int]]:
    """Equal stages; the last one has no recompute."""
    backward = [2 * MS] * (num_stages - 1) + [3 * MS]
    return {Kind.FORWARD: [MS] * num_stages, Kind.RECOMPUTE: [MS] * num_stages, Kind.BACKWARD: backward}


def chosen(jitter: Jitter, links: Links | None = None, within: float = 0.02) -> Depth:
    return choose_depth(
        lambda staleness: DSP(staleness=staleness).program(),
        times(len(jitter.factors)),
        jitter,
        links=links,
        within=within,
    )


def noisy(num_stages: int, deviation: float) -> Jitter:
    factors = np.exp(deviation * np.random.default_rng(0).standard_normal((num_stages, 40)))
    return Jitter(factors=tuple(map(tuple, factors.tolist())))


@pytest.mark.parametrize("num_stages", [1, 2, 3, 5])
def test_steady_steps_need_no_more_than_a_full_pipeline(num_stages: int) -> None:
    depth = chosen(Jitter(factors=((1.0,),) * num_stages))
    assert depth.staleness == tuple(range(num_stages - 1, -1, -1))
    assert depth.ratio == pytest.approx(1, abs=1e-3)
    assert depth.reached
    assert "chosen" in depth.why()


def test_more_jitter_needs_more_depth_and_what_is_less_is_too_slow() -> None:
    sums = []
    for deviation in (0.02, 0.2, 0.4):
        depth = chosen(noisy(3, deviation))
        assert depth.reached
        sums.append(sum(depth.staleness))
        # Whatever has a batch less on a link, and was looked at, loses more than is allowed.
        for staleness, ratio in depth.tried:
            if all(a <= b for a, b in zip(staleness, depth.staleness, strict=True)) and staleness != depth.staleness:
                assert ratio < 1 - depth.within
    assert sums == sorted(sums)
    assert sums[0] == 3 < sums[1] < sums[2]


def test_the_link_that_needs_slack_gets_it() -> None:
    factors = [[1.0] * 40, [1.0] * 40, [1.0] * 40, [1.0] * 40]
    slow = LinkCost(latency_ns=9 * MS)
    none = LinkCost()
    depth = chosen(
        Jitter(factors=tuple(map(tuple, factors))),
        Links(activations=(none, slow, none), gradients=(none, slow, none)),
    )
    first, second, third, last = depth.staleness
    assert (first - second, third - last) == (1, 1), "links without a delay keep the least"
    assert second - third > 1
    assert depth.reached


def test_slow_steps_that_stay_together_need_more_than_those_that_do_not() -> None:
    spells = np.ones((3, 120))
    for stage in range(3):
        spells[stage, 13 + 37 * stage : 23 + 37 * stage] = 3.0
    together = chosen(Jitter(factors=tuple(map(tuple, spells.tolist())), in_order=True), within=0.05)
    apart = chosen(Jitter(factors=tuple(map(tuple, spells.tolist()))), within=0.05)
    assert sum(together.staleness) > sum(apart.staleness)


def test_where_nothing_is_enough_the_best_is_taken_and_told() -> None:
    always = LinkCost(latency_ns=1000 * MS)
    depth = chosen(Jitter(factors=((1.0,), (1.0,))), Links(activations=(always,), gradients=(always,)))
    assert not depth.reached
    assert depth.ratio == max(ratio for _, ratio in depth.tried)
    assert "only" in depth.why()


@given(st.integers(2, 4), st.lists(st.floats(0.5, 3.0), min_size=1, max_size=6))
@settings(deadline=None, derandomize=True, max_examples=6)
def test_what_is_chosen_is_a_bound_that_elastic_stages_take(num_stages: int, factors: list[float]) -> None:
    depth = chosen(Jitter(factors=(tuple(factors),) * num_stages))
    assert DSP(staleness=depth.staleness, elastic=True).staleness == depth.staleness
    assert all(0 <= ratio <= 1 for _, ratio in depth.tried)


def test_jitter_is_of_the_layers_of_a_stage_on_its_own_rank() -> None:
    passes = [
        [[1.0, 3.0], [1.0, 1.0], [7.0, 7.0]],
        [[9.0, 9.0], [9.0, 9.0], [2.0, 6.0, 5.0]],
    ]
    assert jitter_of_passes(passes, (2,)).factors == ((2 / 3, 4 / 3), (0.4, 1.2, 1.0))
    assert jitter_of_passes(passes[:1], (2,)).factors[1] == (1.0, 1.0)
    with pytest.raises(PlanError, match="jitter of stage 1"):
        Jitter(factors=((1.0,), ()))


def layers(count: int) -> list[LayerCost]:
    return [LayerCost(forward_s=0.01, backward_s=0.02, parameters=1, name=f"{i}", type="L") for i in range(count)]


@pytest.mark.parametrize("elastic", [False, True])
@pytest.mark.parametrize("activations", ["recompute", "auto", "stored"])
def test_a_plan_chooses_the_staleness_of_a_method(activations: str, elastic: bool) -> None:
    method = DSP(staleness="auto", num_stages=3, activations=activations, elastic=elastic)  # type: ignore[arg-type]
    assert not method.knows_staleness
    plan = plan_with_depth(layers(9), method, lambda cuts: noisy(len(cuts) + 1, 0.3))
    assert plan.depth is not None
    assert plan.method.knows_staleness
    assert plan.method.is_decided
    assert tuple(plan.method.staleness) == plan.depth.staleness
    assert sum(plan.depth.staleness) > 3
    assert (plan.method.elastic_rule is not None) is elastic
    given_ = plan_with_depth(layers(9), DSP(staleness=(4, 2, 0)), functools.partial(pytest.fail, "was not to be asked"))
    assert given_.depth is None


def test_auto_is_a_value_like_others() -> None:
    method = DSP(staleness="auto", num_stages=3, elastic=True)
    assert method == build_method("dsp", num_stages=3, staleness="auto", elastic=True)
    assert method != DSP.minimal(3, elastic=True)
    assert repr(method) == "DSP(staleness='auto', num_stages=3, elastic=True)"
    assert method.with_activations("stored") == DSP(staleness="auto", num_stages=3, activations="stored", elastic=True)
    assert method.with_staleness((6, 3, 0)) == DSP(staleness=(6, 3, 0), elastic=True)
    assert DSP(staleness=(4, 2, 0), num_stages=3) == DSP(staleness=(4, 2, 0))
    assert "num_stages" not in method_options("dsp")
    described = describe_method(DSP(staleness=(4, 2, 0)))
    assert described is not None
    assert "num_stages" not in described[1]
    assert BP(3).knows_staleness
    with pytest.raises(ConfigError, match="how many stages"):
        DSP(staleness="auto")
    with pytest.raises(ConfigError, match="Leave queue out"):
        DSP(staleness="auto", num_stages=3, queue=(1, 1, 0))
    with pytest.raises(ConfigError, match="num_stages is 2"):
        DSP(staleness=(4, 2, 0), num_stages=2)
    with pytest.raises(ConfigError, match="leaves no staleness"):
        BP(3).with_staleness((0, 0, 0))
