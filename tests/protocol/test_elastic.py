"""The rule of elastic stages, decision by decision."""

from __future__ import annotations

import pytest

from stalewise.errors import ConfigError
from stalewise.protocol.actions import Kind
from stalewise.protocol.elastic import Elastic, ElasticStage, SlowSteps
from stalewise.protocol.staleness import Staleness

F, R, B = Kind.FORWARD, Kind.RECOMPUTE, Kind.BACKWARD
RULE = Elastic(bound=Staleness((6, 3, 0)), memory=4)


def slow_down(stage: ElasticStage) -> None:
    """Let its updates say that something is slow; it is so until the long one is the fifth last."""
    for time in (0, 10, 20, 30, 40, 60):
        stage.slow_steps.updated(time)
    assert stage.slow_steps.slow


def test_a_calm_stage_alternates_like_the_shallowest_setting() -> None:
    stage = ElasticStage(RULE, 0)
    done = []
    for now in range(40):
        kind = stage.next_action(activation_ready=True)
        if kind is None:
            stage.gradient_came()
            continue
        stage.did(kind, now)
        done.append(kind)
        assert stage.in_flight <= 3
    # Three batches in flight are a staleness of 2 at the backward: K-1-k; recomputed while the gradient is on its way.
    assert done[:4] == [F, F, F, R]
    assert done[4:10] == [B, F, R, B, F, R]


def test_a_starving_next_stage_comes_before_backwards() -> None:
    stage = ElasticStage(RULE, 0)
    slow_down(stage)
    for now in range(3):
        assert stage.next_action(True) is F
        stage.did(F, now)
    stage.gradient_came()
    # Two batches are below, one for each stage there: the next one is about to have nothing.
    assert stage.next_action(True) is F
    stage.did(F, 4)
    assert stage.next_action(True) is R
    stage.did(R, 5)
    assert stage.next_action(True) is B
    stage.did(B, 6)
    assert stage.in_flight == 3


def test_forwards_stop_at_the_bound_and_at_the_least() -> None:
    stage = ElasticStage(RULE, 1)
    slow_down(stage)
    for now in range(4):
        assert stage.next_action(True) is F
        stage.did(F, now)
    assert stage.next_action(True) is R
    stage.did(R, 4)
    assert stage.next_action(True) is None, "staleness 3 is reached"
    for time in (70, 80, 90, 100):
        stage.slow_steps.updated(time)
    assert not stage.slow_steps.slow
    # Calm again: backward without forwarding until only the least is in flight.
    for now in range(3):
        stage.gradient_came()
        for kind in (R, B) if now else (B,):
            assert stage.next_action(True) is kind
            stage.did(kind, 110 + 10 * now)
    assert stage.in_flight == 1
    assert stage.next_action(True) is F


def test_the_last_stage_backwards_what_it_forwarded() -> None:
    stage = ElasticStage(RULE, 2)
    assert stage.next_action(False) is None
    for now in range(3):
        assert stage.next_action(True) is F
        stage.did(F, now)
        assert stage.next_action(True) is B
        stage.did(B, now)


def test_stored_graphs_are_not_recomputed() -> None:
    stage = ElasticStage(Elastic(bound=Staleness((1, 0)), recompute=False), 0)
    stage.did(F, 0)
    stage.did(F, 1)
    assert stage.next_action(True) is None
    stage.gradient_came()
    assert stage.next_action(True) is B


def ends(steps: SlowSteps, durations: list[int]) -> list[bool]:
    """After each of some updates, whether something is slow."""
    time, found = 0, []
    steps.updated(time)
    for took in durations:
        steps.updated(time := time + took)
        found.append(steps.slow)
    return found


def test_slow_is_what_costs_more_than_the_share_in_the_mean() -> None:
    steps = SlowSteps(share=0.1, memory=20)
    # One step of 20 that is twice as long costs 5%, and three such cost 15%, until the first of them is forgotten.
    found = ends(steps, [100] * 20 + [200] + [100] * 30 + [200, 100, 200, 200] + [100] * 20)
    assert not any(found[:52])
    first = found.index(True)
    assert first == 54
    assert all(found[54:70])
    assert not any(found[72:])


def test_jitter_is_not_slow_and_a_new_pace_becomes_usual() -> None:
    steps = SlowSteps(share=0.05, memory=64)
    assert not any(ends(steps, [97, 100, 103, 100, 99, 102, 98, 101] * 20))
    steps = SlowSteps(share=0.05, memory=64)
    found = ends(steps, [100] * 80 + [200] * 80)
    assert found[85]
    assert not found[-1], "always slow is the new usual"


def test_a_pause_is_no_slow_step() -> None:
    steps = SlowSteps(share=0.05, memory=16)
    assert not any(ends(steps, [10] * 12))
    steps.pause()
    steps.updated(10_000)
    assert not steps.slow
    steps.updated(10_030)
    assert steps.slow, "what was usual before the pause is still known"


def test_the_least_staleness_can_be_given() -> None:
    rule = Elastic(bound=Staleness((6, 3, 0)), least=Staleness((4, 2, 0)))
    assert [rule.least_of(stage) for stage in range(3)] == [4, 2, 0]
    assert [RULE.least_of(stage) for stage in range(3)] == [2, 1, 0]
    assert Elastic(bound=Staleness((1, 1, 0))).least_of(0) == 1
    with pytest.raises(ConfigError, match="at most that of the bound"):
        Elastic(bound=Staleness((2, 1, 0)), least=Staleness((4, 2, 0)))
    with pytest.raises(ConfigError, match="above 0"):
        Elastic(bound=Staleness((2, 1, 0)), slow_share=0.0)
