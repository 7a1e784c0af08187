"""Which steps are slow is a function of (seed, stage, update) and of nothing else."""

from __future__ import annotations

import json
from dataclasses import asdict
from hashlib import blake2b
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stalewise.errors import ConfigError
from stalewise.protocol.stragglers import Straggler, Stragglers


def draw(seed: int, stage: int, update: int) -> float:
    """The documented number, in [0, 1)."""
    digest = blake2b(f"{seed}/{stage}/{update}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") / 2**64


@given(
    st.integers(0, 3),
    st.integers(0, 3),
    st.sampled_from([0.0, 0.05, 1 / 3, 1.0]),
    st.integers(1, 4),
    st.integers(0, 5),
    st.none() | st.integers(5, 20),
)
@settings(deadline=None, derandomize=True, max_examples=60)
def test_slow_steps_are_the_documented_spells(
    seed: int, stage: int, probability: float, duration: int, first: int, last: int | None
) -> None:
    straggler = Straggler(probability=probability, factor=2, duration=duration, seed=seed, first=first, last=last)
    slow = [False] * 40
    for begin in range(40):
        if begin >= first and (last is None or begin <= last) and draw(seed, stage, begin) < probability:
            slow[begin : begin + duration] = [True] * min(duration, 40 - begin)
    assert [straggler.is_slow(stage, update) for update in range(40)] == slow


def test_a_third_of_the_steps_is_slow_and_stages_differ() -> None:
    straggler = Straggler(probability=1 / 3, factor=1.5)
    slow = [[straggler.is_slow(stage, update) for update in range(3000)] for stage in range(3)]
    assert all(900 < sum(of_stage) < 1100 for of_stage in slow)
    together = sum(map(all, zip(*slow, strict=True)))
    assert 60 < together < 165, "stages draw for themselves"


def test_only_the_named_stages_are_slow() -> None:
    straggler = Straggler(stages=(2, 0), factor=2)
    assert [straggler.is_slow(stage, 7) for stage in range(4)] == [True, False, True, False]


def test_stragglers_that_meet() -> None:
    """Factors multiply, pauses add up, and computing and sleeping are kept apart."""
    stragglers = Stragglers.of(
        [
            Straggler(factor=2),
            Straggler(factor=3, pause_s=0.5),
            Straggler(factor=1.5, how="sleep", pause_s=0.25, first=1),
        ]
    )
    first, second = stragglers.slowing(0, 0), stragglers.slowing(0, 1)
    assert first is not None
    assert second is not None
    assert (first.busy, first.sleep, first.pause_s, first.factor) == (5, 0, 0.5, 6)
    assert (second.busy, second.sleep, second.pause_s, second.factor) == (5, 0.5, 0.75, 6.5)
    assert list(stragglers.factors(0, 3)) == [6, 6.5, 6.5]


def test_no_straggler_slows_nothing() -> None:
    assert not Stragglers.of(None)
    assert Stragglers.of(Straggler(factor=2, last=3)).slowing(0, 4) is None


def test_json_and_back() -> None:
    straggler = Straggler(stages=(1,), probability=0.2, factor=2, duration=3, how="sleep", seed=4, last=9)
    assert Straggler.from_json(json.loads(json.dumps(asdict(straggler)))) == straggler


@pytest.mark.parametrize("given_value", ["factor=2", [3], 4])
def test_something_else_than_stragglers_is_refused(given_value: Any) -> None:
    with pytest.raises(ConfigError, match="it must be a Straggler"):
        Stragglers.of(given_value)


def test_stages_that_do_not_exist_are_refused() -> None:
    with pytest.raises(ConfigError, match="on stage 3, and there are 3"):
        Stragglers.of(Straggler(stages=(1, 3), factor=2)).check_stages(3)
