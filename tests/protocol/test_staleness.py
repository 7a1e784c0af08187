"""Staleness keeps the rules of docs/notation.md, and its errors repair themselves."""

from __future__ import annotations

import copy
import pickle
import re
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stalewise.errors import ConfigError
from stalewise.protocol.staleness import LinkState, Staleness

VALUES = st.lists(st.integers(0, 12), min_size=1, max_size=6).map(tuple)
VALID = st.lists(st.integers(0, 12), max_size=5).map(lambda m: (*sorted(m, reverse=True), 0))


def is_valid(values: tuple[int, ...]) -> bool:
    return values[-1] == 0 and all(here >= after for here, after in pairwise(values))


@given(VALUES)
@settings(deadline=None, derandomize=True)
def test_exactly_the_valid_vectors_are_accepted_and_the_suggestion_is_one_of_them(values: tuple[int, ...]) -> None:
    if is_valid(values):
        assert Staleness(values).values == values
        return
    with pytest.raises(ConfigError) as caught:
        Staleness(values)
    message = str(caught.value)
    assert message.startswith(f"staleness {values} ")
    suggested = re.search(r"Did you mean (\(.*\))\?$", message)
    assert suggested is not None
    suggestion = tuple(int(entry) for entry in re.findall(r"\d+", suggested[1]))
    assert Staleness(suggestion).values == suggestion
    assert len(suggestion) == len(values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            (2, 4, 0),
            "staleness (2, 4, 0) grows from stage 0 to stage 1; it must not grow with depth. Did you mean (4, 2, 0)?",
        ),
        (
            (4, 1, 2),
            "staleness (4, 1, 2) grows from stage 1 to stage 2; it must not grow with depth. Did you mean (4, 2, 0)?",
        ),
        (
            (4, 2, 1),
            (
                "staleness (4, 2, 1) ends with 1; the last stage has the loss at hand, so its staleness is 0. "
                "Did you mean (4, 2, 0)?"
            ),
        ),
        (
            (3,),
            (
                "staleness (3,) ends with 3; the last stage has the loss at hand, so its staleness is 0. "
                "Did you mean (0,)?"
            ),
        ),
        ((2, -1, 0), "staleness[1] is -1; it counts batches, so it must be an integer >= 0."),
        ((2, 1.0, 0), "staleness[1] is 1.0; it counts batches, so it must be an integer >= 0."),
        ((True, 0), "staleness[0] is True; it counts batches, so it must be an integer >= 0."),
        (("4", 0), "staleness[0] is '4'; it counts batches, so it must be an integer >= 0."),
        ((None,), "staleness[0] is None; it counts batches, so it must be an integer >= 0."),
        ((), "staleness is empty; give one integer per stage, such as (4, 2, 0)."),
        (4, "staleness is 4; it must be one integer per stage, such as (4, 2, 0)."),
    ],
)
def test_the_error_says_what_is_wrong_where_and_what_to_do(values: object, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Staleness(values)  # type: ignore[arg-type]
    assert str(caught.value) == message


@given(VALID)
@settings(deadline=None, derandomize=True)
def test_slack_is_the_difference_to_the_next_stage_and_its_last_entry_is_0(values: tuple[int, ...]) -> None:
    staleness = Staleness(values)
    assert len(staleness.slack) == len(values)
    assert staleness.slack[-1] == 0
    assert all(slack >= 0 for slack in staleness.slack)
    assert [sum(staleness.slack[stage:]) for stage in range(len(values))] == list(values)


@pytest.mark.parametrize(
    ("values", "links"),
    [
        ((0,), ()),
        ((0, 0), (LinkState.LOCKED,)),
        ((2, 2, 0), (LinkState.LOCKED, LinkState.DECOUPLED)),
        ((2, 1, 0), (LinkState.OVERLAPPED, LinkState.OVERLAPPED)),
        ((4, 2, 0), (LinkState.DECOUPLED, LinkState.DECOUPLED)),
        ((10, 1, 0), (LinkState.DECOUPLED, LinkState.OVERLAPPED)),
    ],
)
def test_links(values: tuple[int, ...], links: tuple[LinkState, ...]) -> None:
    assert Staleness(values).links == links


def test_it_is_a_sequence_that_compares_like_its_tuple() -> None:
    staleness = Staleness([4, 2, 0])
    assert staleness == (4, 2, 0)
    assert staleness == (4, 2, 0)
    assert staleness == Staleness((4, 2, 0))
    assert staleness != (4, 2)
    assert staleness != (4, 3, 0)
    assert staleness != 4
    assert (staleness[0], staleness[-1], staleness[:2], len(staleness)) == (4, 0, (4, 2), 3)
    assert (*staleness,) == (4, 2, 0)
    assert hash(staleness) == hash((4, 2, 0))
    assert str(staleness) == "(4,2,0)"
    assert repr(staleness) == "Staleness(values=(4, 2, 0))"


@pytest.mark.parametrize(
    "other",
    [(2, 1, 0), range(2, -1, -1), b"\x02\x01\x00", Staleness((2, 1, 0))],
    ids=["tuple", "range", "bytes", "staleness"],
)
def test_what_compares_equal_hashes_equal(other: object) -> None:
    staleness = Staleness((2, 1, 0))
    assert staleness != other or hash(staleness) == hash(other)


def test_it_is_a_frozen_value() -> None:
    staleness = Staleness((4, 2, 0))
    with pytest.raises(AttributeError):
        staleness.values = (0,)  # type: ignore[misc]
    assert copy.deepcopy(staleness) == staleness
    assert pickle.loads(pickle.dumps(staleness)) == staleness
