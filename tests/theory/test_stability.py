"""The exact stability limits: against their closed form, against the roots, and against the engine."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stalewise.errors import ConfigError
from stalewise.theory import closed_form_limit, spectral_radius, stability_limit, train_quadratic

MOMENTUM = st.sampled_from([0.0, 0.5, 0.9])
FORM = st.sampled_from([0.0, 1.0])


@pytest.mark.parametrize("delay", [0, 1, 2, 4, 10, 37, 100])
def test_one_stage_without_momentum_has_a_closed_form(delay: int) -> None:
    assert stability_limit((delay,)) == pytest.approx(closed_form_limit(delay), rel=1e-10)


def test_the_known_limit_of_three_stages() -> None:
    """(4,2,0): 0.3820, which is (3 - sqrt 5) / 2."""
    assert stability_limit((4, 2, 0)) == pytest.approx((3 - math.sqrt(5)) / 2, rel=1e-12)


@pytest.mark.parametrize("momentum", [0.0, 0.3, 0.9])
def test_known_limits_without_delay(momentum: float) -> None:
    """2 (1 + beta) for heavy ball, 2 (1 + beta) / (1 + 2 beta) for Nesterov."""
    assert stability_limit((0,), momentum=momentum) == pytest.approx(2 * (1 + momentum))
    nesterov = stability_limit((0,), momentum=momentum, s=1)
    assert nesterov == pytest.approx(2 * (1 + momentum) / (1 + 2 * momentum))


@settings(max_examples=100)
@given(depths=st.lists(st.integers(0, 20), min_size=1, max_size=6), momentum=st.floats(0, 0.99), s=st.floats(0, 3))
def test_all_roots_are_inside_below_the_limit_and_one_is_outside_above(
    depths: list[int], momentum: float, s: float
) -> None:
    limit = stability_limit(depths, momentum=momentum, s=s)
    below = [spectral_radius(depths, part * limit, momentum=momentum, s=s) for part in np.linspace(0.02, 0.999, 20)]
    assert max(below) < 1
    assert spectral_radius(depths, 1.001 * limit, momentum=momentum, s=s) > 1


@settings(max_examples=8)
@given(
    drops=st.lists(st.integers(0, 3), min_size=1, max_size=3),
    momentum=MOMENTUM,
    s=FORM,
    eigenvalues=st.lists(st.floats(0.1, 10), min_size=1, max_size=4),
    alone=st.booleans(),
)
def test_the_engine_converges_just_below_and_diverges_just_above(
    drops: list[int], momentum: float, s: float, eigenvalues: list[float], alone: bool
) -> None:
    """Stage 0 alone, or all stages; the largest eigenvalue decides."""
    staleness = tuple(sum(drops[index:]) for index in range(len(drops) + 1))
    trained = [0] if alone else range(len(staleness))
    delays = [staleness[index] for index in trained]
    limit = stability_limit(delays, momentum=momentum, s=s)

    def growth(part: float) -> float:
        """Of the loss, over as many updates as give a factor of 100 or 1/100 in theory, after as many at first."""
        radius = spectral_radius(delays, part * limit, momentum=momentum, s=s)
        updates = 50 + round(abs(math.log(100) / (2 * math.log(radius))))
        losses = train_quadratic(
            staleness,
            # Below the limit small eigenvalues converge, too, but take their time.
            [max(eigenvalues)] if part < 1 else eigenvalues,
            lr=part * limit / max(eigenvalues),
            num_updates=2 * updates,
            momentum=momentum,
            s=s,
            trained=trained,
        )
        window = max(4, len(losses) // 20)
        return max(losses[-window:]) / max(losses[updates - window : updates])

    assert growth(0.97) < 0.2
    assert growth(1.03) > 5


def test_the_engine_grows_as_the_largest_root_says() -> None:
    """Far out, the loss of (6,3,0) with momentum grows by the square of the spectral radius per update."""
    step = 1.1 * stability_limit((6, 3, 0), momentum=0.5)
    losses = train_quadratic((6, 3, 0), [2.0], lr=step / 2, num_updates=900, momentum=0.5)
    radius = spectral_radius((6, 3, 0), step, momentum=0.5)
    peaks = [max(losses[start : start + 100]) for start in (500, 800)]
    assert math.log(peaks[1] / peaks[0]) / 600 == pytest.approx(math.log(radius), rel=0.02)


@pytest.mark.parametrize(
    ("staleness", "options"), [((-1,), {}), ((), {}), ((300,), {}), ((1,), {"momentum": 1.0}), ((1,), {"s": -1.0})]
)
def test_numbers_out_of_range(staleness: tuple[int, ...], options: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        stability_limit(staleness, **options)
