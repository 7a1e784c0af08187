"""How long a rank waits."""

from __future__ import annotations

import pytest

from stalewise.runtime import patience
from stalewise.runtime.patience import Patience


def after(steps: int, seconds: float) -> Patience:
    made = Patience()
    made.begin_session()
    for _ in range(steps):
        made.saw_step(seconds)
    return made


@pytest.mark.parametrize(
    ("steps", "seconds", "expected"),
    [(0, 0.0, 600.0), (patience.STEPS - 1, 0.1, 600.0), (patience.STEPS, 0.1, 120.0), (patience.STEPS, 10.0, 200.0)],
)
def test_it_adapts_to_the_slowest_step(steps: int, seconds: float, expected: float) -> None:
    assert after(steps, seconds).message_s == expected


def test_slow_steps_lengthen_the_first_wait_too() -> None:
    assert after(3, 100.0).message_s == 2000.0


def test_the_slowest_step_counts() -> None:
    made = after(30, 9.0)
    made.saw_step(0.1)
    assert made.message_s == 180.0


def test_a_session_begins_with_a_long_wait() -> None:
    made = after(30, 0.1)
    made.begin_session()
    assert made.message_s == 600.0
    made.saw_step(0.1)
    assert made.message_s == 120.0


def test_a_number_of_the_users_is_kept() -> None:
    made = Patience(1.25)
    for _ in range(30):
        made.saw_step(50.0)
    assert made.message_s == 1.25
    assert list(made.waits()) == [0.5, 0.5, 0.25]


def test_signs_of_life() -> None:
    assert (Patience().silence_s, Patience(1.0).silence_s, Patience(60.0).silence_s) == (30.0, 5.0, 90.0)
