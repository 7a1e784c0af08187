"""Random costs: slow steps are those of the engines, and cause the slow-downs that they are known to cause."""

from __future__ import annotations

import numpy as np
import pytest

from stalewise.errors import ConfigError
from stalewise.methods import BP, DSP, GPipe
from stalewise.protocol.actions import COMPUTE, Kind
from stalewise.protocol.stragglers import Straggler, Stragglers
from stalewise.timing import StepCosts, simulate
from stalewise.timing.draws import by_update, draw_rows, jittered, varied
from stalewise.timing.outcome import half_interval
from stalewise.timing.slow_steps import replica_of, slow_steps

NS = 1_000_000
THIRD = 1 / 3


def test_the_steps_of_the_warm_up_belong_to_the_first_update() -> None:
    rows = np.arange(6)[None, :, None].repeat(2, axis=0)
    steps = by_update(DSP(staleness=(3, 0)).program(), rows, 9)
    assert steps[0, :, 0].tolist() == [0, 0, 0, 0, 1, 2, 3, 4, 5]
    assert steps[1, :, 0].tolist() == [0, 1, 2, 3, 4, 5, 5, 5, 5]


def test_slow_steps_multiply_rows_that_were_drawn_before() -> None:
    """In every replica, with its own draws; waits, loads and sends are as quick as ever."""
    program = GPipe(2).program()
    random = np.random.default_rng(0)
    costs = StepCosts(tuple(random.integers(1, 99, (4, len(stage.slots))) for stage in program.stages))
    before = draw_rows(2, 30, 4, replicas=3, seed=0)
    assert sorted(set(before.ravel().tolist())) == [0, 1, 2, 3]
    rules = Stragglers((Straggler(stages=(1,), probability=0.5, factor=3.0),))
    table, blocks = slow_steps(costs, program, rules, 0, 30, replicas=3)
    rows = 4 * by_update(program, blocks, 30) + before
    assert len({tuple(blocks[1, :, replica]) for replica in range(3)}) == 3
    computes = [np.array([slot.kind in COMPUTE for slot in stage.slots]) for stage in program.stages]
    for replica in range(3):
        drawn = replica_of(rules, replica)
        for stage, step in np.ndindex(2, 30):
            factor = 1 if drawn.slowing(stage, step) is None else 3
            np.testing.assert_array_equal(
                table.tables[stage][rows[stage, step, replica]],
                costs.tables[stage][before[stage, step, replica]] * np.where(computes[stage], factor, 1),
            )
    assert replica_of(rules, 0) == rules


@pytest.mark.parametrize(
    ("staleness", "factor", "percent"),
    [
        ((2, 1, 0), 2.0, 51.9),
        ((4, 2, 0), 2.0, 41.8),
        ((6, 3, 0), 2.0, 38.8),
        ((10, 5, 0), 2.0, 36.7),
        ((2, 1, 0), 1.5, 23.9),
        ((10, 5, 0), 1.2, 6.8),
        ((4, 2, 0), 2.5, 65.6),
    ],
)
def test_known_slow_downs(staleness: tuple[int, ...], factor: float, percent: float) -> None:
    """Each stage slowed in each step with probability 1/3, over a floor of 33.3 for a factor of 2."""
    program = DSP(staleness=staleness).program()
    costs = StepCosts.of_kinds(program, {Kind.FORWARD: NS, Kind.RECOMPUTE: NS, Kind.BACKWARD: 2 * NS})
    stragglers = Stragglers((Straggler(probability=THIRD, factor=factor),))
    outcome = simulate(program, costs, num_batches=1500, stragglers=stragglers, replicas=16)
    assert outcome.calm_step_ns == 4 * NS
    assert 100 * outcome.slow_down == pytest.approx(percent, abs=1.0)


def test_serial_backpropagation_slows_by_the_floor() -> None:
    program = BP(3).program()
    costs = StepCosts.of_kinds(program, {Kind.FORWARD: NS, Kind.BACKWARD: 2 * NS})
    stragglers = Stragglers((Straggler(probability=THIRD, factor=2.0),))
    timetable = simulate(program, costs, num_batches=1000, stragglers=stragglers, replicas=4).timetable
    begin, end = timetable.window
    for replica in range(4):
        drawn = replica_of(stragglers, replica)
        slow = [drawn.slowing(stage, step) is not None for stage in range(3) for step in range(begin + 1, end + 1)]
        # The window begins and ends within a batch: the backwards of the first one's upper stages lie in it.
        assert timetable.step_ns[replica] == pytest.approx(9 * NS * (1 + np.mean(slow)), rel=2e-3)
    np.testing.assert_allclose(timetable.utilisation.sum(axis=0), 1.0, rtol=2e-3)


def test_intervals_are_students() -> None:
    """Quantiles of t for 1, 2, 4, 9, 30 degrees of freedom, from tables."""
    for freedom, quantile in ((1, 12.706), (2, 4.303), (4, 2.776), (9, 2.262), (30, 2.042)):
        values = np.zeros(freedom + 1)
        values[0] = np.sqrt(freedom + 1)
        # Variance 1, so the half interval is quantile / sqrt(n).
        values = values / values.std(ddof=1)
        assert half_interval(values) == pytest.approx(quantile / np.sqrt(freedom + 1), rel=2e-2)
    assert half_interval(np.ones(1)) is None


def test_resampled_steps_have_the_mean_of_their_rows() -> None:
    program = DSP(staleness=(0,)).program()
    places = [slot.kind for slot in program.stages[0].slots]
    table = np.zeros((2, len(places)), np.int64)
    table[:, places.index(Kind.FORWARD)] = 10, 30
    outcome = simulate(program, StepCosts((table,)), num_batches=4000, replicas=4)
    assert outcome.calm_step_ns == 20
    assert outcome.step_s * 1e9 == pytest.approx(20, rel=0.02)
    assert outcome.step_interval_s is not None


def test_steps_that_vary_have_the_mean_and_the_variation_that_were_asked_for() -> None:
    program = DSP(staleness=(0,)).program()
    costs = StepCosts.of_kinds(program, {Kind.FORWARD: 10**6, Kind.BACKWARD: 2 * 10**6})
    (table,) = jittered(costs, 0.3, seed=1).tables
    whole = table.sum(axis=1)
    assert whole.mean() == pytest.approx(3 * 10**6, rel=1e-4)
    assert whole.std() / whole.mean() == pytest.approx(0.3, rel=0.1)
    forward, backward = (table[:, index] for index in np.flatnonzero(costs.tables[0][0]))
    assert np.abs(backward - 2 * forward).max() <= 1, "all actions of a step take the same multiple"
    np.testing.assert_array_equal(jittered(costs, 0.0, seed=1).mean().tables[0], costs.tables[0])


def test_slack_absorbs_steps_that_vary() -> None:
    def slow_down(*staleness: int) -> float:
        program = DSP(staleness=staleness).program()
        calm = StepCosts.of_kinds(program, {Kind.FORWARD: 1000, Kind.RECOMPUTE: 1000, Kind.BACKWARD: 2000})
        return simulate(program, jittered(calm, 0.5, seed=0), num_batches=2000, replicas=4).slow_down

    assert slow_down(2, 1, 0) > 2 * slow_down(6, 3, 0) > 0


def test_what_cannot_be_drawn_is_refused() -> None:
    program = DSP(staleness=(1, 0)).program()
    rules = Stragglers((Straggler(stages=(2,), factor=2.0),))
    with pytest.raises(ConfigError, match="stage 2"):
        simulate(program, StepCosts.of_kinds(program, {}), num_batches=3, stragglers=rules)
    for wrong in (-0.1, float("nan"), "x"):
        with pytest.raises(ConfigError, match="jitter"):
            jittered(StepCosts.of_kinds(program, {}), wrong, seed=0)  # type: ignore[arg-type]


def test_measured_steps_are_rows() -> None:
    """Each stage's own; waits, loads and sends are as quick in all of them."""
    program = DSP.minimal(2).program()
    times = {Kind.FORWARD: 10, Kind.RECOMPUTE: 10, Kind.BACKWARD: 20, Kind.SEND_ACTIVATION: 7}
    calm = StepCosts.of_kinds(program, times)
    rows = varied(calm, program, [[1.0, 2.0, 0.5], [3.0]])
    assert [len(table) for table in rows.tables] == [3, 1]
    for stage, (table, (row,)) in enumerate(zip(rows.tables, calm.tables, strict=True)):
        computes = np.array([slot.kind in COMPUTE for slot in program.stages[stage].slots])
        assert row[~computes].sum() == (7 if stage == 0 else 0)
        for factor, varied_row in zip([[1.0, 2.0, 0.5], [3.0]][stage], table, strict=True):
            np.testing.assert_array_equal(varied_row, np.where(computes, factor * row, row))
