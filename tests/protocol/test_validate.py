"""The validator: accepts what methods make, and sees every way to spoil it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import pairwise

import pytest
from engine_streams import Stream, order_violations, stream, streams_of
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from stalewise.errors import ProgramError
from stalewise.methods import BP, DSP, METHOD_NAMES, Method, build_method
from stalewise.methods.method import forward_only, stale_slots
from stalewise.protocol.actions import Action, Kind
from stalewise.protocol.program import Program, StageProgram
from stalewise.protocol.staleness import Staleness
from stalewise.protocol.validate import check, run_streams, violations

VALUES = st.lists(st.integers(0, 8), max_size=3).map(lambda m: (*sorted(m, reverse=True), 0))
METHODS = VALUES.map(lambda values: DSP(staleness=values)) | st.integers(1, 4).map(BP)
VARIANTS = st.builds(
    DSP,
    staleness=VALUES,
    activations=st.sampled_from(["recompute", "stored"]),
    accumulate=st.integers(1, 4),
)
OTHERS = [build_method(name, num_stages=stages) for name in METHOD_NAMES for stages in (1, 2, 4)]
SPOILED_OTHERS = [
    build_method(name, num_stages=3, micro_batches=2 if name in ("gpipe", "1f1b") else None)
    for name in METHOD_NAMES
    if name not in ("dsp", "bp")
]

SPOILED = [
    BP(3),
    DSP(staleness=(0,)),
    DSP(staleness=(1, 0)),
    DSP(staleness=(2, 2, 0)),
    DSP.minimal(3),
    DSP(staleness=(3, 1, 0), activations="stored"),
    DSP(staleness=(2, 0), accumulate=3),
]
BATCHES = 7


def rules(found: list[str]) -> set[str]:
    """The rules named by violations; every violation names one and a stage."""
    names = [re.match(r"(V\d+): .*stage \d", violation) for violation in found]
    assert all(names), found
    return {name[1] for name in names if name is not None}


def spoil(method: Method, stage: int, old: str, new: str, num_batches: int = BATCHES) -> list[str]:
    """Violations once `old` (words that stand together) is replaced in the stream of one stage."""
    program = method.program()
    streams = streams_of(program, num_batches)
    text = " ".join(map(str, streams[stage]))
    padded = f" {text} "
    assert padded.count(f" {old} ") == 1, text
    streams[stage] = stream(padded.replace(f" {old} ", f" {new} "))
    return run_streams(program, streams, num_batches)


# --- what is valid --------------------------------------------------------------------------------------------


@given(METHODS | VARIANTS | st.sampled_from(OTHERS), st.none() | st.integers(0, 20))
@settings(deadline=None, derandomize=True, max_examples=150)
def test_programs_of_methods_are_valid_for_any_number_of_batches(method: Method, num_batches: int | None) -> None:
    assert violations(method.program(), num_batches=num_batches) == []
    check(method.program())


def test_the_dry_run_is_long_enough_to_see_three_periods() -> None:
    """A fault that only shows in the third step after warm-up is seen without naming a number of batches."""
    found = violations(Program(stages=DSP(staleness=(3, 0)).program().stages, staleness=Staleness((2, 0))))
    backwarded = {int(number) for number in re.findall(r"V5: stage 0, B(\d+)", "\n".join(found))}
    assert {0, 1, 2, 3, 4, 5} <= backwarded


def test_check_raises_the_first_violation() -> None:
    program = Program(stages=DSP(staleness=(1, 0)).program().stages, staleness=Staleness((0, 0)))
    with pytest.raises(ProgramError) as caught:
        check(program)
    assert str(caught.value) == violations(program)[0]


# --- each rule ------------------------------------------------------------------------------------------------

MINIMAL = DSP.minimal(3)
V1 = [
    (MINIMAL, 1, "RECV_A3", "LOAD3"),
    (MINIMAL, 0, "LOAD3", "RECV_A3"),
    (MINIMAL, 2, "B2", "SEND_A2 B2"),
    (MINIMAL, 2, "B2", "RECV_G2 B2"),
    (MINIMAL, 0, "B2", "B2 SEND_G2"),
]


@pytest.mark.parametrize(("method", "stage", "old", "new"), V1)
def test_v1_actions_fit_the_place_of_the_stage(method: Method, stage: int, old: str, new: str) -> None:
    assert "V1" in rules(spoil(method, stage, old, new))


@pytest.mark.parametrize(
    ("method", "stage", "old", "new"),
    [
        (MINIMAL, 0, "LOAD3 F3 SEND_A3", "LOAD2 F2 SEND_A2"),
        (DSP(staleness=(1, 0)), 0, "LOAD0 F0 SEND_A0 LOAD1 F1", "LOAD0 LOAD1 F1 F0 SEND_A0"),
        (DSP(staleness=(0,)), 0, "F3", "F3 F3"),
        (DSP(staleness=(0,)), 0, "LOAD0 F0 B0 U", ""),
    ],
)
def test_v2_every_batch_is_forwarded_once_in_order(method: Method, stage: int, old: str, new: str) -> None:
    assert "V2" in rules(spoil(method, stage, old, new))


@pytest.mark.parametrize(
    ("method", "stage", "old", "new"),
    [
        (DSP(staleness=(0,)), 0, "B3", "B3 B3"),
        (DSP(staleness=(0,)), 0, "B3 U", ""),
        (MINIMAL, 0, "B3 U", "B2 U"),
        (BP(1), 0, "B5 U LOAD6 F6 B6", "LOAD6 F6 B6 U B5"),
    ],
)
def test_v3_every_batch_is_backwarded_once_in_order(method: Method, stage: int, old: str, new: str) -> None:
    assert "V3" in rules(spoil(method, stage, old, new))


@pytest.mark.parametrize(
    ("method", "stage", "old", "new"),
    [
        (MINIMAL, 1, "R2", ""),
        (MINIMAL, 1, "R2 RECV_G2 B2", "RECV_G2 B2 R2"),
        (MINIMAL, 1, "RECV_G2 B2", "B2 RECV_G2"),
        (MINIMAL, 0, "LOAD2 F2", "F2 LOAD2"),
        (MINIMAL, 0, "F2 SEND_A2", "SEND_A2 F2"),
        (MINIMAL, 1, "B2 SEND_G2", "SEND_G2 B2"),
        (DSP(staleness=(1, 0)), 0, "R2 RECV_G2 B2 U", "R4 RECV_G2 B2 U"),
    ],
)
def test_v4_an_action_finds_what_it_needs(method: Method, stage: int, old: str, new: str) -> None:
    assert "V4" in rules(spoil(method, stage, old, new))


def test_v5_the_newest_forward_is_as_far_ahead_as_declared() -> None:
    assert rules(spoil(BP(1), 0, "B3 U LOAD4 F4", "LOAD4 F4 B3 U")) >= {"V5"}
    shorter = spoil(DSP(staleness=(1, 0)), 0, "LOAD4 F4 SEND_A4 R3 RECV_G3 B3 U", "R3 RECV_G3 B3 U LOAD4 F4 SEND_A4")
    assert rules(shorter) == {"V5"}
    assert "V5: stage 0, B3: batch 3 is the newest forward; staleness 1 wants 4." in shorter


@pytest.mark.parametrize("claimed", [(1, 0), (3, 0), (0, 0)])
def test_v5_a_program_realises_the_staleness_that_it_claims(claimed: tuple[int, ...]) -> None:
    stages = DSP(staleness=(2, 0)).program().stages
    assert "V5" in rules(violations(Program(stages=stages, staleness=Staleness(claimed))))


@pytest.mark.parametrize(
    ("stage", "old", "new"),
    [
        (0, "SEND_A1 LOAD2 F2 SEND_A2", "LOAD2 F2 SEND_A2 SEND_A1"),
        (1, "SEND_G1 U RECV_A4 F4 SEND_A4 R2 RECV_G2 B2 SEND_G2", "U RECV_A4 F4 SEND_A4 R2 RECV_G2 B2 SEND_G2 SEND_G1"),
    ],
)
def test_v6_messages_are_received_in_the_order_in_which_they_were_sent(stage: int, old: str, new: str) -> None:
    assert rules(spoil(MINIMAL, stage, old, new)) == {"V6"}


def test_v7_and_v8_who_holds_more_than_its_staleness_allows_is_seen() -> None:
    """The actions of DSP(6,3,0) that claim (4,2,0): seven stored inputs, and too many batches on the link."""
    found = run_streams(MINIMAL.program(), streams_of(DSP(staleness=(6, 3, 0)).program(), 12), 12)
    assert {"V7", "V8"} <= rules(found)
    assert "V7: stage 0, F5: 6 inputs are stored; at most m_0 + 1 = 5 may be." in found
    in_warm_up = "V8: stage 0, SEND_A5: link 0 -> 1 holds 6 batches; at most 5 may be in it."
    assert in_warm_up in found


def test_v8_after_the_warm_up_a_link_holds_at_most_its_slack_and_one() -> None:
    """Actions of (6,2,0) that claim (6,4,0): stage 0 runs 4 batches ahead over a link of slack 2."""
    found = run_streams(DSP(staleness=(6, 4, 0)).program(), streams_of(DSP(staleness=(6, 2, 0)).program(), 16), 16)
    assert any(re.match(r"V8: stage 0, SEND_A\d+: link 0 -> 1 holds \d batches; at most 3 may be", v) for v in found)


@pytest.mark.parametrize(
    ("stages", "claimed"),
    [
        ((0, 1), (0, 0)),
        ((1, 2, 0), (1, 1, 0)),
    ],
)
def test_v9_a_stage_that_waits_for_one_that_waits_for_it_is_a_deadlock(
    stages: tuple[int, ...], claimed: tuple[int, ...]
) -> None:
    """Staleness that grows with depth: the gradient of batch n needs an activation that comes after it."""
    count = len(stages)
    built = tuple(StageProgram(stale_slots(k, count, lag=lag, recompute=lag > 0)) for k, lag in enumerate(stages))
    found = violations(Program(stages=built, staleness=Staleness(claimed)))
    deadlocks = [violation for violation in found if violation.startswith("V9")]
    assert deadlocks
    assert "stage 0 waits at RECV_G0" in deadlocks[0]
    assert "stage 1 waits at RECV_A1" in deadlocks[0] or "stage 1 waits at RECV_A2" in deadlocks[0]


def test_v9_a_message_that_nobody_sends_is_a_deadlock() -> None:
    assert "V9" in rules(spoil(MINIMAL, 0, "SEND_A6", ""))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("B6 U", "B6"),  # a gradient that no update used
        ("B6 U", "B6 U U"),  # an update without a gradient
        ("B6 U", "B6 U LOAD7"),  # an input
    ],
)
def test_v10_nothing_is_left_at_the_end(old: str, new: str) -> None:
    assert rules(spoil(BP(1), 0, old, new)) == {"V10"}


@pytest.mark.parametrize(
    ("method", "stage", "old", "new"),
    [
        (BP(1), 0, "B3 U", "B3"),
        (DSP(staleness=(1, 0)), 0, "B3 U", "B3"),
        (MINIMAL, 1, "B3 SEND_G3 U", "B3 SEND_G3"),
        (MINIMAL, 1, "B3 SEND_G3 U", "B3 SEND_G3 U U"),
    ],
)
def test_v10_every_backward_is_followed_by_its_own_update(method: Method, stage: int, old: str, new: str) -> None:
    """An update that a later one makes good again is missing all the same: weights stood still for a batch."""
    assert "V10" in rules(spoil(method, stage, old, new))


def test_v10_an_evaluation_leaves_its_inputs() -> None:
    assert "V10" in rules(violations(forward_only(2)))


# --- every single fault ---------------------------------------------------------------------------------------


def accumulate_of(method: Method) -> int:
    return method.program().stages[0].policy.accumulate


def each_action(method: Method) -> Iterator[tuple[int, int]]:
    for stage, actions in enumerate(streams_of(method.program(), BATCHES)):
        yield from ((stage, position) for position in range(len(actions)))


def undetected(method: Method, faults: Iterator[tuple[str, int, Stream]]) -> list[str]:
    """Faults, as text, that the validator does not see. A fault is its name, a stage, and its new stream."""
    program = method.program()
    valid = streams_of(program, BATCHES)
    missed = []
    for name, stage, spoiled in faults:
        streams = [spoiled if k == stage else list(actions) for k, actions in enumerate(valid)]
        if not run_streams(program, streams, BATCHES):
            missed.append(f"stage {stage}: {name}")
    return missed


@pytest.mark.parametrize("method", SPOILED + SPOILED_OTHERS, ids=repr)
def test_every_single_deletion_is_seen(method: Method) -> None:
    def deletions() -> Iterator[tuple[str, int, Stream]]:
        streams = streams_of(method.program(), BATCHES)
        for stage, i in each_action(method):
            actions = streams[stage]
            yield f"without {actions[i]} at {i}", stage, actions[:i] + actions[i + 1 :]

    assert undetected(method, deletions()) == []


@pytest.mark.parametrize("method", SPOILED + SPOILED_OTHERS, ids=repr)
def test_every_single_duplication_is_seen(method: Method) -> None:
    def duplications() -> Iterator[tuple[str, int, Stream]]:
        streams = streams_of(method.program(), BATCHES)
        for stage, i in each_action(method):
            actions = streams[stage]
            yield f"{actions[i]} twice at {i}", stage, [*actions[: i + 1], *actions[i:]]

    assert undetected(method, duplications()) == []


@pytest.mark.parametrize("method", SPOILED, ids=repr)
def test_every_swap_of_neighbours_that_changes_the_numbers_is_seen(method: Method) -> None:
    def swaps() -> Iterator[tuple[str, int, Stream]]:
        streams = streams_of(method.program(), BATCHES)
        for stage, i in each_action(method):
            actions = list(streams[stage])
            if i + 1 < len(actions):
                actions[i], actions[i + 1] = actions[i + 1], actions[i]
                wrong = list(order_violations(actions, method.staleness[stage], BATCHES, accumulate_of(method)))
                if wrong:
                    yield f"{actions[i]} before {actions[i + 1]}: {wrong[0]}", stage, actions

    assert undetected(method, swaps()) == []


@pytest.mark.parametrize("method", SPOILED, ids=repr)
def test_every_update_at_another_place_that_changes_the_numbers_is_seen(method: Method) -> None:
    """An update that comes a few actions early or late gives a forward or a recompute the weights of another step."""

    def moves() -> Iterator[tuple[str, int, Stream]]:
        streams = streams_of(method.program(), BATCHES)
        for stage, i in each_action(method):
            if streams[stage][i].kind is not Kind.UPDATE:
                continue
            for j in range(max(0, i - 5), min(len(streams[stage]), i + 6)):
                actions = list(streams[stage])
                actions.insert(j, actions.pop(i))
                wrong = list(order_violations(actions, method.staleness[stage], BATCHES, accumulate_of(method)))
                if wrong:
                    yield f"U at {i} moved to {j}: {wrong[0]}", stage, actions

    assert undetected(method, moves()) == []


def test_the_order_of_the_oracle_is_the_one_that_methods_keep() -> None:
    for method in (*SPOILED, DSP(staleness=(5, 3, 3, 0))):
        for actions, staleness in zip(streams_of(method.program(), 9), method.staleness, strict=True):
            assert list(order_violations(actions, staleness, 9, accumulate_of(method))) == []


@given(METHODS | VARIANTS, st.integers(1, 9), st.data())
@settings(deadline=None, derandomize=True, max_examples=200)
def test_any_move_that_changes_the_numbers_is_seen(method: Method, num_batches: int, data: st.DataObject) -> None:
    program = method.program()
    streams = streams_of(program, num_batches)
    stage = data.draw(st.integers(0, method.num_stages - 1), label="stage")
    actions = streams[stage]
    places = st.integers(0, len(actions) - 1)
    match data.draw(st.sampled_from(["delete", "duplicate", "swap", "move"]), label="fault"):
        case "delete":
            del actions[data.draw(places)]
        case "duplicate":
            actions.insert(data.draw(places), actions[data.draw(places)])
        case "swap":
            i, j = data.draw(places), data.draw(places)
            actions[i], actions[j] = actions[j], actions[i]
            assume(any(order_violations(actions, method.staleness[stage], num_batches, accumulate_of(method))))
        case "move":
            action: Action = actions.pop(data.draw(places))
            actions.insert(data.draw(places), action)
            assume(any(order_violations(actions, method.staleness[stage], num_batches, accumulate_of(method))))
    assert run_streams(program, streams, num_batches) != []


@given(METHODS | VARIANTS, st.integers(1, 9), st.data())
@settings(deadline=None, derandomize=True)
def test_moves_that_change_nothing_are_accepted(method: Method, num_batches: int, data: st.DataObject) -> None:
    """A recompute may overlap its forward, a send may follow the update: neighbours that need nothing of each other.

    Left out: a receive before a send, which may deadlock.
    """
    program = method.program()
    streams = streams_of(program, num_batches)
    stage = data.draw(st.integers(0, method.num_stages - 1))
    orders = []
    for i, (first, second) in enumerate(pairwise(streams[stage])):
        swapped = [*streams[stage][:i], second, first, *streams[stage][i + 2 :]]
        blocks = first.kind.value.startswith("SEND") and second.kind.value.startswith("RECV")
        if not blocks and not any(
            order_violations(swapped, method.staleness[stage], num_batches, accumulate_of(method))
        ):
            orders.append(swapped)
    assume(orders)
    streams[stage] = data.draw(st.sampled_from(orders))
    assert run_streams(program, streams, num_batches) == []
