"""The model under the slow steps of a run: exact where that is simple, and the specification's table."""

from __future__ import annotations

import pytest

from stalewise.methods import BP, DSP
from stalewise.protocol.actions import Action, Kind
from stalewise.protocol.stragglers import Straggler, Stragglers
from stalewise.protocol.trace import Trace
from stalewise.timing.costs import StepCosts
from stalewise.timing.slow_steps import mean_slowing, mean_times, predicted_slow_down, slow_steps, step_factors

UNIT = 1_000_000
TIMES = {Kind.FORWARD: [UNIT] * 3, Kind.RECOMPUTE: [UNIT] * 3, Kind.BACKWARD: [2 * UNIT] * 3}
THIRD = Straggler(probability=1 / 3, factor=2)


def test_rows_are_the_draws() -> None:
    program = DSP.minimal(3).program()
    rules = Stragglers.of(
        [Straggler(probability=0.5, factor=3, seed=1), Straggler(stages=(1,), pause_s=0.001, first=4)]
    )
    calm = StepCosts.of_kinds(program, {Kind.FORWARD: 10, Kind.BACKWARD: 20, Kind.SEND_ACTIVATION: 7})
    costs, rows = slow_steps(calm, program, rules, 2, 30)
    for stage in range(3):
        kinds = [slot.kind for slot in program.stages[stage].slots]
        for update in range(2, 30):
            row = dict(zip(kinds, costs.tables[stage][rows[stage, update - 2, 0]], strict=True))
            factor = 3 if rules.rules[0].is_slow(stage, update) else 1
            pause = 1_000_000 if stage == 1 and update >= 4 else 0
            assert (row[Kind.FORWARD], row[Kind.BACKWARD]) == (10 * factor + pause, 20 * factor)
            assert row.get(Kind.SEND_ACTIVATION, 7) == 7, "the link is as quick as ever"


def test_backpropagation_on_a_slow_device() -> None:
    """Stages take turns, so one that takes twice as long costs a third; a pipeline pays it in full."""
    slow = Stragglers.of(Straggler(stages=(1,), factor=2))
    assert predicted_slow_down(BP(3).program(), TIMES, slow, 100) == pytest.approx(1 / 3)
    stored = DSP(staleness=(4, 2, 0), activations="stored").program()
    assert predicted_slow_down(stored, TIMES, slow, 400) == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize(
    ("staleness", "percent"), [((2, 1, 0), 51), ((4, 2, 0), 41), ((6, 3, 0), 38), ((10, 5, 0), 36)]
)
def test_the_table_of_the_specification(staleness: tuple[int, ...], percent: float) -> None:
    """One sample of 1000 steps against the mean of long simulations, action by action."""
    found = predicted_slow_down(DSP(staleness=staleness).program(), TIMES, Stragglers.of(THIRD), 1000)
    assert 100 * found == pytest.approx(percent, abs=5)


def test_the_floor_is_the_mean() -> None:
    assert mean_slowing(Stragglers.of(THIRD), 3, 0, 3000) == pytest.approx(1 / 3, abs=0.02)
    assert mean_slowing(Stragglers.of(Straggler(stages=(0,), factor=2, first=10)), 2, 0, 20) == 0.25


def test_mean_times_and_jitter_of_some_updates() -> None:
    trace = Trace(0)
    now = 0
    for update in range(4):
        for kind, time_ns in ((Kind.RECEIVE_GRADIENT, 1000), (Kind.BACKWARD, 10 + update), (Kind.UPDATE, 5)):
            trace.add(Action(kind, None if kind is Kind.UPDATE else update), update, now, now + time_ns)
            now += time_ns
    assert mean_times([list(trace)], [(1, 2), (3, 4)]) == {Kind.BACKWARD: [12], Kind.UPDATE: [5]}
    assert step_factors([list(trace)], [(1, 2), (3, 4)]) == [[16 / 17, 18 / 17]]
