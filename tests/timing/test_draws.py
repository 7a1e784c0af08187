"""Random costs: their keys, their spells, and the slow-downs that they are known to cause."""

from __future__ import annotations

import numpy as np
import pytest

from stalewise.errors import ConfigError
from stalewise.methods import BP, DSP
from stalewise.protocol.actions import Kind
from stalewise.timing import StepCosts, TimedProgram
from stalewise.timing.draws import by_update, draw_rows, slow_updates

NS = 1_000_000


def test_draws_belong_to_stage_and_update() -> None:
    few = slow_updates(2, 50, replicas=3, seed=5, probability=0.3)
    more = slow_updates(4, 80, replicas=3, seed=5, probability=0.3)
    np.testing.assert_array_equal(few, more[:2, :50])
    assert (few[0] != few[1]).any()
    assert (few != slow_updates(2, 50, replicas=3, seed=6, probability=0.3)).any()
    only = slow_updates(4, 80, replicas=3, seed=5, probability=0.3, stages=(1, 3))
    np.testing.assert_array_equal(only[[1, 3]], more[[1, 3]])
    assert not only[[0, 2]].any()
    assert 0.25 < slow_updates(1, 4000, replicas=4, seed=0, probability=0.3).mean() < 0.35


def test_spells_last_and_join() -> None:
    begins = slow_updates(1, 400, replicas=2, seed=1, probability=0.1)
    spells = slow_updates(1, 400, replicas=2, seed=1, probability=0.1, duration=3)
    for update in range(400):
        np.testing.assert_array_equal(spells[0, update], begins[0, max(0, update - 2) : update + 1].any(axis=0))


def test_the_steps_of_the_warm_up_belong_to_the_first_update() -> None:
    rows = np.arange(6)[None, :, None].repeat(2, axis=0)
    steps = by_update(DSP(staleness=(3, 0)).program(), rows, 9)
    assert steps[0, :, 0].tolist() == [0, 0, 0, 0, 1, 2, 3, 4, 5]
    assert steps[1, :, 0].tolist() == [0, 1, 2, 3, 4, 5, 5, 5, 5]


def test_rows_are_all_drawn() -> None:
    rows = draw_rows(2, 500, 7, replicas=2, seed=0)
    assert rows.shape == (2, 500, 2)
    assert sorted(set(rows[0].ravel().tolist())) == list(range(7))


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
    calm = float(TimedProgram(program, costs).cycle().step_ns)
    timed = TimedProgram(program, costs.slowed(factor))
    slow = slow_updates(3, 1500, replicas=24, seed=0, probability=1 / 3)
    step_ns = timed.run(1500, rows=by_update(program, slow.astype(np.int64), timed.num_steps(1500))).step_ns
    assert 100 * (step_ns.mean() / calm - 1) == pytest.approx(percent, abs=1.0)


def test_serial_backpropagation_slows_by_the_floor() -> None:
    program = BP(3).program()
    costs = StepCosts.of_kinds(program, {Kind.FORWARD: NS, Kind.BACKWARD: 2 * NS}).slowed(2.0)
    timed = TimedProgram(program, costs)
    slow = slow_updates(3, 1000, replicas=8, seed=0, probability=1 / 3)
    timetable = timed.run(1000, rows=by_update(program, slow.astype(np.int64), timed.num_steps(1000)))
    begin, end = timetable.window
    mean = slow[:, begin + 1 : end + 1].mean(axis=(0, 1))
    # The window begins and ends within a batch: the backwards of the first one's upper stages lie in it.
    np.testing.assert_allclose(timetable.step_ns, 9 * NS * (1 + mean), rtol=2e-3)


def test_what_cannot_be_drawn_is_refused() -> None:
    with pytest.raises(ConfigError, match="between 0 and 1"):
        slow_updates(1, 5, replicas=1, seed=0, probability=1.5)
    with pytest.raises(ConfigError, match="at least 1"):
        slow_updates(1, 5, replicas=1, seed=0, probability=0.5, duration=0)
    with pytest.raises(ConfigError, match="one row"):
        StepCosts((np.ones((2, 3), np.int64),)).slowed(2.0)
