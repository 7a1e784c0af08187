"""Elastic runs keep what every run keeps, are calm when it is calm, and beat fixed settings when it is not."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stalewise.errors import ConfigError
from stalewise.methods import DSP
from stalewise.protocol.actions import Kind
from stalewise.protocol.elastic import Elastic
from stalewise.protocol.staleness import Staleness
from stalewise.protocol.stragglers import Straggler, Stragglers
from stalewise.protocol.trace import Trace
from stalewise.timing import StepCosts, simulate
from stalewise.timing.elastic import ElasticRun, run_elastic
from stalewise.timing.slow_steps import replica_of

UNIT = 1000
THREE = {Kind.FORWARD: [UNIT] * 3, Kind.RECOMPUTE: [UNIT] * 3, Kind.BACKWARD: [2 * UNIT] * 3}


def ends(trace: Trace, kind: Kind) -> dict[int, int]:
    return {span.batch: span.end_ns for span in trace if span.kind is kind}


def begins(trace: Trace, kind: Kind) -> dict[int, int]:
    return {span.batch: span.start_ns for span in trace if span.kind is kind}


def assert_it_is_a_run(run: ElasticRun, rule: Elastic, num_batches: int, latency: int) -> None:
    """Every batch once and in order; nothing before its message; nothing at the same time; staleness in its bounds."""
    order = list(range(num_batches))
    for stage, trace in enumerate(run.traces):
        kinds = [Kind.FORWARD, Kind.BACKWARD, Kind.UPDATE]
        kinds += [Kind.RECOMPUTE] * (rule.recompute and stage < rule.num_stages - 1)
        for kind in kinds:
            assert [span.batch for span in trace if span.kind is kind] == order
        compute = [span for span in trace if span.kind in kinds and span.kind is not Kind.UPDATE]
        assert all(a.end_ns <= b.start_ns for a, b in zip(compute, compute[1:], strict=False))
        forwarded = backwarded = 0
        for span in compute:
            if span.kind is Kind.FORWARD:
                forwarded += 1
            elif span.kind is Kind.BACKWARD:
                assert run.staleness[stage, backwarded] == forwarded - 1 - backwarded
                backwarded += 1
        assert run.staleness[stage].max() <= rule.bound[stage]
        assert run.update_ns[stage].tolist() == [span.end_ns for span in trace if span.kind is Kind.UPDATE]
        if stage:
            above = run.traces[stage - 1]
            sent, taken = ends(above, Kind.FORWARD), begins(trace, Kind.FORWARD)
            assert all(taken[batch] >= sent[batch] + latency for batch in order)
            given_back, used = ends(trace, Kind.UPDATE), begins(above, Kind.BACKWARD)
            assert all(used[batch] >= given_back[batch] + latency for batch in order)


@given(
    slack=st.lists(st.integers(0, 4), min_size=0, max_size=4),
    num_batches=st.integers(1, 30),
    latency=st.sampled_from([0, 300, 5000]),
    recompute=st.booleans(),
    memory=st.integers(1, 8),
    seed=st.integers(0, 10_000),
)
@settings(max_examples=80)
def test_any_run_ends_and_is_in_order(
    slack: list[int], num_batches: int, latency: int, recompute: bool, memory: int, seed: int
) -> None:
    stages = len(slack) + 1
    bound = Staleness([sum(slack[stage:]) for stage in range(stages)])
    rule = Elastic(bound=bound, recompute=recompute, memory=memory)
    random = np.random.default_rng(seed)
    kinds = (Kind.FORWARD, Kind.RECOMPUTE, Kind.BACKWARD, Kind.UPDATE)
    times = {kind: random.integers(0, 2000, stages).tolist() for kind in kinds}
    factors = random.uniform(0.2, 5, (stages, num_batches))
    rules = Stragglers((Straggler(probability=0.2, factor=3.0, pause_s=1e-6, seed=seed),))
    run = run_elastic(rule, times, num_batches=num_batches, latency_ns=latency, stragglers=rules, factors=factors)
    assert_it_is_a_run(run, rule, num_batches, latency)
    again = run_elastic(rule, times, num_batches=num_batches, latency_ns=latency, stragglers=rules, factors=factors)
    assert [list(trace) for trace in again.traces] == [list(trace) for trace in run.traces]


@pytest.mark.parametrize("stages", [1, 2, 3, 6])
def test_calm_is_the_shallowest_setting_at_full_rate(stages: int) -> None:
    """Within 2% of minimal DSP, at a mean staleness of at most 1.25 (K-1-k)."""
    times = {Kind.FORWARD: [UNIT] * stages, Kind.RECOMPUTE: [UNIT] * stages, Kind.BACKWARD: [2 * UNIT] * stages}
    bound = DSP(staleness=[5 * (stages - 1 - stage) for stage in range(stages)]).staleness
    run = run_elastic(Elastic(bound=bound), times, num_batches=300)
    program = DSP.minimal(stages).program()
    minimal = simulate(program, StepCosts.of_kinds(program, times), num_batches=300)
    assert run.step_ns <= 1.02 * minimal.calm_step_ns
    for stage in range(stages):
        assert run.mean_staleness[stage] <= 1.25 * (stages - 1 - stage)


def test_depth_comes_with_a_spell_and_goes_after_it() -> None:
    spell = Stragglers((Straggler(stages=(1,), first=100, last=105, factor=4.0),))
    rule = Elastic(bound=Staleness((10, 5, 0)), memory=16)
    stale = run_elastic(rule, THREE, num_batches=300, stragglers=spell).staleness[0]
    assert stale[20:90].max() == 2
    assert stale[100:130].max() >= 5
    assert stale[180:280].max() == 2


@pytest.mark.parametrize(
    "rules",
    [
        Stragglers((Straggler(probability=0.02, factor=3.0, duration=3),)),
        Stragglers((Straggler(probability=1 / 3, factor=2.0),)),
    ],
)
def test_it_lies_above_the_line_of_fixed_settings(rules: Stragglers) -> None:
    """At its own mean staleness it is faster than fixed settings are, between (2,1,0) and (10,5,0)."""
    replicas, batches = 6, 700
    line = []
    for staleness in ((2, 1, 0), (4, 2, 0), (6, 3, 0), (10, 5, 0)):
        program = DSP(staleness=staleness).program()
        costs = StepCosts.of_kinds(program, THREE)
        found = simulate(program, costs, num_batches=batches, stragglers=rules, replicas=replicas)
        line.append((sum(staleness) / 3, 1 / found.timetable.step_ns))
    above = []
    for replica in range(replicas):
        rule = Elastic(bound=Staleness((4, 2, 0)))
        run = run_elastic(rule, THREE, num_batches=batches, stragglers=replica_of(rules, replica))
        at = np.interp(run.mean_staleness.mean(), [x for x, _ in line], [speed[replica] for _, speed in line])
        above.append(1 / run.step_ns / at - 1)
    assert np.mean(above) > 0.002, above


def test_what_does_not_fit_is_refused() -> None:
    rule = Elastic(bound=Staleness((2, 1, 0)))
    with pytest.raises(ConfigError, match="nothing to time"):
        run_elastic(rule, THREE, num_batches=0)
    with pytest.raises(ConfigError, match="one for each of 3 stages"):
        run_elastic(rule, {Kind.FORWARD: [1]}, num_batches=1)
