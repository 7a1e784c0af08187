"""Programs: golden grids, and the three parts of a stage's life."""

from __future__ import annotations

from textwrap import dedent

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stalewise.errors import ProgramError
from stalewise.methods import BP, DSP
from stalewise.methods.method import forward_only
from stalewise.protocol.actions import Action, Kind
from stalewise.protocol.program import Program, Slot, StageProgram
from stalewise.protocol.staleness import Staleness

STALENESS = st.lists(st.integers(0, 10), max_size=3).map(lambda m: (*sorted(m, reverse=True), 0))


def assert_grid(grid: str, expected: str) -> None:
    assert grid == dedent(expected).strip("\n")


# --- golden grids ---------------------------------------------------------------------------------------------


def test_grid_of_minimal_dsp() -> None:
    assert_grid(
        DSP.minimal(3).program().grid(7),
        """
        step    | 0       | 1       | 2          | 3          | 4          | 5          | 6
        stage 0 | F0      | F1      | F2         | F3         | F4 R0 B0 U | F5 R1 B1 U | F6 R2 B2 U
        stage 1 | F0      | F1      | F2 R0 B0 U | F3 R1 B1 U | F4 R2 B2 U | F5 R3 B3 U | F6 R4 B4 U
        stage 2 | F0 B0 U | F1 B1 U | F2 B2 U    | F3 B3 U    | F4 B4 U    | F5 B5 U    | F6 B6 U
        """,
    )


def test_grid_of_dsp_without_slack() -> None:
    assert_grid(
        DSP(staleness=(2, 1, 0)).program().grid(5),
        """
        step    | 0       | 1          | 2          | 3          | 4
        stage 0 | F0      | F1         | F2 R0 B0 U | F3 R1 B1 U | F4 R2 B2 U
        stage 1 | F0      | F1 R0 B0 U | F2 R1 B1 U | F3 R2 B2 U | F4 R3 B3 U
        stage 2 | F0 B0 U | F1 B1 U    | F2 B2 U    | F3 B3 U    | F4 B4 U
        """,
    )


def test_grid_of_a_drain() -> None:
    assert_grid(
        DSP(staleness=(2, 1, 0)).program().grid(6, num_batches=3),
        """
        step    | 0       | 1          | 2          | 3       | 4       | 5
        stage 0 | F0      | F1         | F2 R0 B0 U | R1 B1 U | R2 B2 U | -
        stage 1 | F0      | F1 R0 B0 U | F2 R1 B1 U | R2 B2 U | -       | -
        stage 2 | F0 B0 U | F1 B1 U    | F2 B2 U    | -       | -       | -
        """,
    )


def test_grid_of_a_drain_before_the_pipeline_is_full() -> None:
    assert_grid(
        DSP(staleness=(4, 0)).program().grid(7, num_batches=2),
        """
        step    | 0       | 1       | 2 | 3 | 4       | 5       | 6
        stage 0 | F0      | F1      | - | - | R0 B0 U | R1 B1 U | -
        stage 1 | F0 B0 U | F1 B1 U | - | - | -       | -       | -
        """,
    )


def test_grid_of_dsp_with_links() -> None:
    assert_grid(
        DSP(staleness=(1, 1, 0)).program().grid(2, links=True),
        """
        step    | 0                       | 1
        stage 0 | LOAD0 F0 SEND_A0        | LOAD1 F1 SEND_A1 R0 RECV_G0 B0 U
        stage 1 | RECV_A0 F0 SEND_A0      | RECV_A1 F1 SEND_A1 R0 RECV_G0 B0 SEND_G0 U
        stage 2 | RECV_A0 F0 B0 SEND_G0 U | RECV_A1 F1 B1 SEND_G1 U
        """,
    )


def test_grid_of_backpropagation_with_links() -> None:
    assert_grid(
        BP(stages=3).program().grid(2, links=True),
        """
        step    | 0                                       | 1
        stage 0 | LOAD0 F0 SEND_A0 RECV_G0 B0 U           | LOAD1 F1 SEND_A1 RECV_G1 B1 U
        stage 1 | RECV_A0 F0 SEND_A0 RECV_G0 B0 SEND_G0 U | RECV_A1 F1 SEND_A1 RECV_G1 B1 SEND_G1 U
        stage 2 | RECV_A0 F0 B0 SEND_G0 U                 | RECV_A1 F1 B1 SEND_G1 U
        """,
    )


def test_grid_of_an_evaluation() -> None:
    assert_grid(
        forward_only(3).grid(2, links=True),
        """
        step    | 0                  | 1
        stage 0 | LOAD0 F0 SEND_A0   | LOAD1 F1 SEND_A1
        stage 1 | RECV_A0 F0 SEND_A0 | RECV_A1 F1 SEND_A1
        stage 2 | RECV_A0 F0         | RECV_A1 F1
        """,
    )


# --- prologue, period, epilogue -------------------------------------------------------------------------------


def shifted(actions: list[Action], by: int) -> list[Action]:
    return [
        Action(action.kind, None if action.batch is None else action.batch + by, action.micro_batch)
        for action in actions
    ]


@given(STALENESS, st.integers(0, 8))
@settings(deadline=None, derandomize=True)
def test_in_the_steady_state_each_step_is_the_one_before_shifted_by_one(
    staleness: tuple[int, ...], periods: int
) -> None:
    for stage, lag in zip(DSP(staleness=staleness).program().stages, staleness, strict=True):
        assert stage.max_lag == lag
        step = lag + periods
        here, after = list(stage.step(step)), list(stage.step(step + 1))
        assert after == shifted(here, 1)
        assert len(here) == len(stage.slots)
        assert Action(Kind.FORWARD, step) in here
        assert Action(Kind.BACKWARD, step - lag) in here
        assert here[-1] == Action(Kind.UPDATE)


@given(STALENESS, st.integers(0, 14))
@settings(deadline=None, derandomize=True)
def test_prologue_and_epilogue_are_the_period_with_silent_slots(staleness: tuple[int, ...], num_batches: int) -> None:
    for stage, lag in zip(DSP(staleness=staleness).program().stages, staleness, strict=True):
        for step in range(num_batches + lag + 3):
            actions = list(stage.step(step, num_batches))
            forwards, backwards = step < num_batches, lag <= step < lag + num_batches
            kinds = [action.kind for action in actions]
            assert (Kind.FORWARD in kinds, Kind.BACKWARD in kinds) == (forwards, backwards)
            assert kinds == [slot.kind for slot in stage.slots if (backwards if slot.lag else forwards)]


@given(STALENESS, st.integers(0, 14))
@settings(deadline=None, derandomize=True)
def test_all_actions_are_the_steps_one_after_another_and_hold_each_batch_once(
    staleness: tuple[int, ...], num_batches: int
) -> None:
    for stage in DSP(staleness=staleness).program().stages:
        actions = list(stage.actions(num_batches))
        steps = [action for step in range(num_batches + 20) for action in stage.step(step, num_batches)]
        assert actions == steps
        for slot in stage.slots:
            batches = [action.batch for action in actions if action.kind is slot.kind]
            expected = [None] * num_batches if slot.kind is Kind.UPDATE else list(range(num_batches))
            assert batches == expected


def test_without_an_end_no_slot_falls_silent_again() -> None:
    stage = DSP(staleness=(3, 0)).program().stages[0]
    assert [str(action) for action in stage.step(1_000_000)] == [
        "LOAD1000000",
        "F1000000",
        "SEND_A1000000",
        "R999997",
        "RECV_G999997",
        "B999997",
        "U",
    ]


def test_micro_batches_of_a_slot_reach_its_actions() -> None:
    stage = StageProgram((Slot(Kind.LOAD), Slot(Kind.FORWARD, 0, 0), Slot(Kind.FORWARD, 0, 1), Slot(Kind.UPDATE)))
    assert [str(action) for action in stage.step(2)] == ["LOAD2", "F2.0", "F2.1", "U"]


# --- accumulation ---------------------------------------------------------------------------------------------


def test_grid_of_accumulation_whose_drain_flushes_the_remainder() -> None:
    """Groups of 2: batches 0 1, 2 3, 4. A stage without lag learns one step later that batch 4 was the last."""
    assert_grid(
        DSP(staleness=(2, 0), accumulate=2).program().grid(8, num_batches=5),
        """
        step    | 0     | 1       | 2        | 3          | 4        | 5       | 6       | 7
        stage 0 | F0    | F1      | F2 R0 B0 | F3 R1 B1 U | F4 R2 B2 | R3 B3 U | R4 B4 U | -
        stage 1 | F0 B0 | F1 B1 U | F2 B2    | F3 B3 U    | F4 B4    | U       | -       | -
        """,
    )


@given(STALENESS, st.integers(1, 5), st.lists(st.integers(0, 12), min_size=1, max_size=4))
@settings(deadline=None, derandomize=True)
def test_groups_are_counted_over_drains_and_no_gradient_is_left(
    staleness: tuple[int, ...], accumulate: int, cycles: list[int]
) -> None:
    """An update after every batch whose global index ends a group, and after the last batch of a cycle."""
    for stage in DSP(staleness=staleness, accumulate=accumulate).program().stages:
        first = 0
        for count in cycles:
            backwarded, updates = 0, []
            for step in range(count + stage.drain_steps if count else 0):
                for action in stage.step(step, None if step < count else count, first_batch=first):
                    backwarded += action.kind is Kind.BACKWARD
                    if action.kind is Kind.UPDATE:
                        updates.append(first + backwarded)
            assert backwarded == count
            ends = [n for n in range(first + 1, first + count + 1) if n % accumulate == 0]
            first += count
            assert updates == ends + [first] * (count > 0 and first % accumulate > 0)


# --- what a program knows of itself ---------------------------------------------------------------------------


def test_num_stages_max_lag_and_recomputes() -> None:
    program = DSP(staleness=(4, 1, 0)).program()
    assert (program.num_stages, program.max_lag) == (3, 4)
    assert [stage.max_lag for stage in program.stages] == [4, 1, 0]
    assert [stage.recomputes for stage in program.stages] == [True, True, False]
    assert StageProgram(()).max_lag == 0


def test_programs_are_values() -> None:
    assert DSP(staleness=(2, 0)).program() == DSP(staleness=(2, 0)).program()
    assert DSP(staleness=(2, 0)).program() != DSP(staleness=(1, 0)).program()


def test_a_program_has_one_stage_per_entry_of_its_staleness() -> None:
    with pytest.raises(ProgramError, match=r"has 3 stages and staleness \(2,0\) names 2; give one entry per stage"):
        Program(stages=DSP.minimal(3).program().stages, staleness=Staleness((2, 0)))
