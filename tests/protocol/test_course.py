"""Orders of elastic stages: letters, actions, and what a replay refuses."""

from __future__ import annotations

import pytest
from elastic_play import play
from hypothesis import given, settings
from hypothesis import strategies as st

from stalewise.errors import ConfigError, ProgramError
from stalewise.methods import BP, DSP
from stalewise.protocol.actions import Kind
from stalewise.protocol.course import Course, courses_of, order_actions, realised_staleness, streams_of
from stalewise.protocol.validate import check, run_streams

ELASTIC = DSP(staleness=(4, 2, 0), elastic=True)


def test_letters_are_actions() -> None:
    steps = ELASTIC.program().stages[1]
    text = " ".join(map(str, order_actions(steps, "FRFBRB")))
    assert text == ("RECV_A0 F0 SEND_A0 R0 RECV_A1 F1 SEND_A1 RECV_G0 B0 SEND_G0 U R1 RECV_G1 B1 SEND_G1 U")
    with pytest.raises(ProgramError, match="'X' is not a letter"):
        list(order_actions(steps, "FX"))


def test_realised_staleness_counts_forwards_between() -> None:
    assert realised_staleness("FFRFBRBRB") == [2, 1, 0]


def test_the_fixed_order_is_one_that_an_elastic_program_allows() -> None:
    check(ELASTIC.program())


@pytest.mark.parametrize(
    ("orders", "rule"),
    [
        (("FFFRBRBRB", "FRBFRBFRB", "FBFBFB"), None),
        (("FRBFRBFRB", "FRBFRBFRB", "FBFBFB"), None),
        (("FFFFFFRBRBRBRBRBRB", "FRBFRBFRBFRBFRBFRB", "FBFBFBFBFBFB"), "V5"),
        (("FFFRBRB", "FRBFRBFRB", "FBFBFB"), "V3"),
        (("FFFBRBRB", "FRBFRBFRB", "FBFBFB"), "V4"),
        (("FRBFRBFRB", "FFRBRBFRB", "FBFBFB"), "V9"),
    ],
)
def test_the_validator_takes_what_the_bounds_allow(orders: tuple[str, ...], rule: str | None) -> None:
    """Six batches in flight are more than m_0 + 1 = 5; a stage cannot wait for what needs its own backward."""
    program = ELASTIC.program()
    streams = streams_of(program, tuple((letters,) for letters in orders), 0)
    found = run_streams(program, streams, orders[0].count("F"))
    assert (found == []) if rule is None else any(text.startswith(rule) for text in found)


@given(st.integers(2, 5), st.data())
@settings(deadline=None, derandomize=True, max_examples=80)
def test_whatever_arrives_when_the_bounds_hold_and_all_is_done(num_stages: int, data: st.DataObject) -> None:
    """Stages take turns at random and messages take any time; what was chosen is valid, and replays to the same."""
    bound = [(num_stages - 1 - stage) * data.draw(st.just(1)) for stage in range(num_stages)]
    bound = [depth + data.draw(st.integers(0, 3)) * (stage < num_stages - 1) for stage, depth in enumerate(bound)]
    bound = sorted(bound, reverse=True)
    method = DSP(staleness=bound, elastic=True)
    count = data.draw(st.integers(1, 12))
    orders = play(method, count, data, None)
    program = method.program()
    assert run_streams(program, streams_of(program, orders, 0), count) == []
    for stage, depth in enumerate(bound):
        assert max(realised_staleness(orders[stage][0])) <= depth
    assert play(method, count, data, orders) == orders


def test_a_replay_with_other_batches_is_told() -> None:
    course = Course(ELASTIC.program(), 0, ["FRB"])
    course.did(Kind.FORWARD, 0)
    assert course.choose(activation_ready=True, gradients_waiting=0) is Kind.RECOMPUTE
    with pytest.raises(ProgramError, match="was to do 'R' as number 1"):
        course.did(Kind.FORWARD, 0)
    course = Course(ELASTIC.program(), 0, ["F"])
    course.did(Kind.FORWARD, 0)
    assert course.choose(activation_ready=False, gradients_waiting=0) is None
    with pytest.raises(ProgramError, match="was to do 'nothing' as number 1"):
        course.did(Kind.FORWARD, 0)


def test_the_time_between_two_sessions_makes_no_stage_run_ahead() -> None:
    for told in (True, False):
        course, clock = Course(ELASTIC.program(), 0), 0
        for batch in range(16):
            if batch == 8:
                clock += 10_000
                if told:
                    course.begin_session()
            for kind in (Kind.FORWARD, Kind.RECOMPUTE, Kind.BACKWARD):
                clock += 10
                course.did(kind, clock)
        ahead = 0
        while course.choose(activation_ready=True, gradients_waiting=0) is Kind.FORWARD:
            course.did(Kind.FORWARD, clock)
            ahead += 1
        assert ahead == (3 if told else 5)


def test_only_elastic_programs_replay() -> None:
    assert courses_of(BP(3).program(), None) == []
    with pytest.raises(ProgramError, match="not elastic"):
        courses_of(BP(3).program(), (("F",),) * 3)
    with pytest.raises(ProgramError, match="of 2 stages"):
        courses_of(ELASTIC.program(), (("F",),) * 2)


def test_elastic_dsp() -> None:
    assert "elastic=True" in repr(ELASTIC)
    assert ELASTIC.with_activations("stored").elastic
    assert DSP.minimal(3, elastic=True) == ELASTIC
    assert DSP(staleness=(4, 2, 0)).elastic_rule is None
    with pytest.raises(ConfigError, match=r"Use \(2, 1, 0\) or more"):
        DSP(staleness=(2, 0, 0), elastic=True)
    with pytest.raises(ConfigError, match="accumulate=1"):
        DSP(staleness=(4, 2, 0), elastic=True, accumulate=2)
    with pytest.raises(ConfigError, match="True or False"):
        DSP(staleness=(4, 2, 0), elastic="yes")  # type: ignore[arg-type]
