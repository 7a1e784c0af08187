"""Actions print and parse."""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from stalewise.errors import ProgramError
from stalewise.protocol.actions import COMPUTE, Action, Kind

INDEX = st.integers(0, 10**9)
ACTIONS = st.just(Action(Kind.UPDATE)) | st.builds(
    Action, st.sampled_from([kind for kind in Kind if kind is not Kind.UPDATE]), INDEX, st.none() | INDEX
)


@given(ACTIONS)
@settings(deadline=None, derandomize=True)
def test_parse_is_the_inverse_of_str(action: Action) -> None:
    assert Action.parse(str(action)) == action


@pytest.mark.parametrize(
    ("action", "text"),
    [
        (Action(Kind.LOAD, 7), "LOAD7"),
        (Action(Kind.RECEIVE_ACTIVATION, 7), "RECV_A7"),
        (Action(Kind.FORWARD, 0), "F0"),
        (Action(Kind.SEND_ACTIVATION, 12), "SEND_A12"),
        (Action(Kind.RECOMPUTE, 3), "R3"),
        (Action(Kind.RECEIVE_GRADIENT, 3), "RECV_G3"),
        (Action(Kind.BACKWARD, 3, 0), "B3.0"),
        (Action(Kind.SEND_GRADIENT, 3, 1), "SEND_G3.1"),
        (Action(Kind.UPDATE), "U"),
        (Action(Kind.SYNTHESIZE, 7), "S7"),
        (Action(Kind.TRAIN_SYNTHESIZER, 7), "T7"),
        (Action(Kind.SEND_TOKEN, 7), "SEND_T7"),
        (Action(Kind.RECEIVE_TOKEN, 7), "RECV_T7"),
        (Action(Kind.SEND_LOSS, 7), "SEND_L7"),
        (Action(Kind.RECEIVE_LOSS, 7), "RECV_L7"),
    ],
)
def test_every_kind_has_its_text(action: Action, text: str) -> None:
    assert str(action) == text
    assert Action.parse(text) == action


@pytest.mark.parametrize(
    "text",
    ["", "F", "7", "U3", "U.1", "f7", "F-1", "F7.", "F.1", "F7.1.2", "F 7", "X7", "RECV7", "SEND_B1", "F7 B3", "F7,"],
)
def test_what_is_no_action_is_refused_with_the_kinds_that_exist(text: str) -> None:
    with pytest.raises(ProgramError) as caught:
        Action.parse(text)
    assert repr(text) in str(caught.value)
    assert all(kind.value in str(caught.value) for kind in Kind)
    assert "such as F7 or SEND_G3.1, or U alone" in str(caught.value)


@given(st.text("FBRULOADSENCV_GT0123456789.٣ ", max_size=9))
@example("F07")
@example("F٣")
@example("B1.00")
@example("F" + "9" * 5000)
@settings(deadline=None, derandomize=True, max_examples=300)
def test_a_text_is_refused_or_is_what_its_action_prints(text: str) -> None:
    try:
        action = Action.parse(text)
    except ProgramError:
        return
    assert str(action) == text.strip()


def test_kinds_print_differently() -> None:
    assert len({kind.value for kind in Kind}) == len(Kind) == 15


def test_compute_kinds_are_those_that_keep_a_device_busy() -> None:
    assert {kind.value for kind in COMPUTE} == {"F", "R", "B", "U", "S", "T"}


def test_actions_are_values() -> None:
    assert Action(Kind.FORWARD, 1) == Action(Kind.FORWARD, 1, None)
    assert len({Action(Kind.FORWARD, 1), Action(Kind.FORWARD, 1), Action(Kind.FORWARD, 1, 0)}) == 2
    with pytest.raises(AttributeError):
        Action(Kind.FORWARD, 1).batch = 2  # type: ignore[misc]
