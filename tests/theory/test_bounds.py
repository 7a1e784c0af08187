"""The learning-rate bounds against their quadratics, against each other, and against what they promise."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stalewise.errors import ConfigError
from stalewise.theory import mean_squared_gradient_bound, proven_condition, quoted_condition

DEPTHS = st.lists(st.integers(0, 30), max_size=9).map(lambda rest: (*sorted(rest, reverse=True), 0))
SIZES = st.floats(0.01, 100)
FORMS = st.one_of(st.just((None, 0.0)), st.tuples(st.floats(0, 0.99), st.sampled_from([0.0, 0.5, 1.0, 3.0])))


def test_quoted_bound_of_sgd() -> None:
    """K = 3, D = 4, M = 2, L = 5: c0 = 4 * 3 * 16 = 192, so 1536 u^2 + 18 u = 1."""
    rate = quoted_condition((4, 2, 0), lipschitz=5, error_bound=2).learning_rate
    assert 1536 * (5 * rate) ** 2 + 18 * 5 * rate == pytest.approx(1, rel=1e-12)


@pytest.mark.parametrize(
    ("s", "c2", "sum_c2_s2"), [(0.0, 4.0, 4.0), (1.0, (0.5 - 1) ** 2 / 0.25, 2.0), (2.0, 0.0, 4.0)]
)
def test_quoted_bound_of_momentum(s: float, c2: float, sum_c2_s2: float) -> None:
    """beta = 1/2, K = 2, D = 3, M = 1: c3 = 18 * 9 (c2 + s^2), c4 = 3 + c2 / 4 + 2 / 4 * 9 (c2 + s^2)."""
    u = quoted_condition((3, 0), lipschitz=1, error_bound=1, momentum=0.5, s=s).learning_rate
    c3, c4 = 162 * sum_c2_s2, 3 + c2 / 4 + 4.5 * sum_c2_s2
    assert c3 * u**2 + c4 * u / 0.5 == pytest.approx(1, rel=1e-12)


def test_proven_constants() -> None:
    """K = 3: the telescoped differences have 3, 3 and 2 terms, 9 + 9 + 4 = 22."""
    condition = proven_condition((2, 1, 0), lipschitz=1, error_bound=3)
    assert (condition.quadratic, condition.linear) == (22 * 9 * 4, 1)
    condition = proven_condition((2, 1, 0), lipschitz=1, error_bound=3, momentum=0.5, s=1)
    assert condition.quadratic == 2 * 22 * 9 * 4 * (1 + 1)
    assert condition.linear == (2 + 0.25) / 0.5


@given(staleness=DEPTHS, lipschitz=SIZES, error_bound=SIZES, form=FORMS)
def test_what_is_quoted_is_proven(
    staleness: tuple[int, ...], lipschitz: float, error_bound: float, form: tuple[float | None, float]
) -> None:
    """The quoted condition implies the proven one: both coefficients are at least as large."""
    arguments = {"lipschitz": lipschitz, "error_bound": error_bound, "momentum": form[0], "s": form[1]}
    quoted, proven = quoted_condition(staleness, **arguments), proven_condition(staleness, **arguments)
    assert quoted.quadratic >= proven.quadratic * (1 - 1e-12)
    assert quoted.linear >= proven.linear
    u = proven.learning_rate * lipschitz
    assert proven.quadratic * u**2 + proven.linear * u == pytest.approx(1, rel=1e-9)


def test_a_tiny_quadratic_term_loses_no_digits() -> None:
    condition = proven_condition((1, 0), lipschitz=1, error_bound=1e-9)
    assert condition.learning_rate == pytest.approx(1, rel=1e-15)


def test_the_promise_at_a_constant_rate() -> None:
    """2 gap / (alpha N) + sigma^2 (L alpha + c1 D^2 L^2 alpha^2)."""
    found = mean_squared_gradient_bound((2, 0), lipschitz=2, error_bound=1, variance=3, gap=5, rates=[0.01] * 100)
    assert found == pytest.approx(10 / 1 + 3 * (0.02 + 8 * 4 * 4 * 1e-4))


def test_the_promise_with_momentum_at_a_constant_rate() -> None:
    """2 gap / (eta N) + sigma^2 (L eta (1 + beta^2 c2) + 2 c1 D^2 L^2 alpha^2 (c2 + s^2)), eta = alpha / (1 - beta)."""
    found = mean_squared_gradient_bound(
        (2, 0), lipschitz=2, error_bound=1, variance=3, gap=5, rates=[0.002] * 100, momentum=0.5
    )
    assert found == pytest.approx(10 / 0.4 + 3 * (2 * 0.004 * 2 + 2 * 8 * 4 * 4 * 0.002**2 * 4))


def test_halving_the_rate_and_quadrupling_the_time_halves_the_promise() -> None:
    def promise(exponent: int) -> float:
        count = 4**exponent
        rates = [0.01 / math.sqrt(count)] * count
        return mean_squared_gradient_bound(
            (4, 2, 0), lipschitz=1, error_bound=1, variance=1, gap=1, rates=rates, momentum=0.5, s=1
        )

    assert promise(7) / promise(6) == pytest.approx(0.5, abs=0.001)


@pytest.mark.parametrize("rates", [[], [0.1, 0.2], [0.4]])
def test_nothing_is_promised_beyond_the_theorem(rates: list[float]) -> None:
    with pytest.raises(ConfigError, match="rate"):
        mean_squared_gradient_bound((4, 2, 0), lipschitz=1, error_bound=1, variance=1, gap=1, rates=rates)


@pytest.mark.parametrize(
    "wrong",
    [{"lipschitz": 0}, {"error_bound": -1}, {"lipschitz": math.nan}, {"momentum": 1}, {"momentum": 0.9, "s": -1}],
)
def test_numbers_out_of_range(wrong: dict[str, float]) -> None:
    for condition in (quoted_condition, proven_condition):
        with pytest.raises(ConfigError, match=r"momentum|s is|lipschitz|error_bound"):
            condition((4, 2, 0), **{"lipschitz": 1.0, "error_bound": 1.0, **wrong})
