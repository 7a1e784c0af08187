"""Convergence to critical points, observed: exponents with intervals at fixed seeds, below what is promised."""

from __future__ import annotations

import math

import pytest
import torch

from stalewise.errors import ConfigError
from stalewise.theory import PREDICTED, SineChain, StepSizes, observe_rate

UPDATES = (512, 1024, 2048)
FORMS = {"sgd": (None, 0.0), "heavy ball": (0.5, 0.0), "nesterov": (0.5, 1.0)}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("staleness", "steps"),
    [((0, 0), "constant"), ((2, 0), "constant"), ((6, 0), "constant"), ((2, 0), "diminishing")],
)
@pytest.mark.parametrize("form", FORMS)
def test_the_gradient_falls_at_least_as_fast_as_predicted(
    form: str, staleness: tuple[int, ...], steps: StepSizes
) -> None:
    momentum, s = FORMS[form]
    seen = observe_rate(
        SineChain(num_stages=2), staleness, steps=steps, updates=UPDATES, copies=2048, momentum=momentum, s=s
    )
    # So few updates still contain some of the beginning, which costs up to an eighth of the exponent.
    assert seen.high <= 0.88 * PREDICTED[steps], seen
    assert seen.high - seen.low < 0.12, seen
    for mean, promise in zip(seen.means, seen.promises, strict=True):
        assert mean < promise, seen


def test_without_updates_to_speak_of_nothing_falls() -> None:
    """The test above can fail: at rates a thousandth of the bound the exponent is nearly 0."""
    problem = SineChain(num_stages=2)
    tiny = [problem.squared_gradients((2, 0), [1e-5] * count, copies=16, seed=0).mean() for count in (100, 400)]
    assert abs(math.log(tiny[1] / tiny[0])) < 0.01


def test_what_is_known_of_the_problem_is_true() -> None:
    """L, M and sigma against what autograd finds at random weights."""
    problem = SineChain(num_stages=3, target=0.4, noise=0.7)
    generator = torch.Generator().manual_seed(0)
    points = 4 * torch.randn(400, 3, 1, generator=generator, dtype=torch.float64)

    def gradient(weights: torch.Tensor, y: float) -> torch.Tensor:
        leaves = weights.clone().requires_grad_()
        hidden = torch.zeros(1, dtype=torch.float64)
        for weight in leaves:
            hidden = torch.sin(hidden + weight)
        (found,) = torch.autograd.grad((hidden - y).square().sum() / 2, leaves)
        return found

    gradients = [gradient(point, 0.4) for point in points]
    squares = torch.stack([found.square().sum() for found in gradients])
    torch.testing.assert_close(problem.true_squared_gradient(points)[:, 0], squares, rtol=1e-12, atol=0)
    steepest = 0.0
    for point, here in zip(points, gradients, strict=True):
        shift = 0.01 * torch.randn(3, 1, generator=generator, dtype=torch.float64)
        steepest = max(steepest, float((gradient(point + shift, 0.4) - here).norm() / shift.norm()))
        assert (gradient(point, 1.1) - here).square().sum() <= problem.variance
    assert problem.lipschitz / 6 < steepest <= problem.lipschitz
    assert problem.error_bound == 1 + 0.4 + 0.7
    assert problem.gap == pytest.approx(0.08)


def test_a_run_is_the_recurrence_in_updates() -> None:
    """Update t of stage k: own weights of now, inputs of weights m_i updates ago: equation (1) of theory.md."""
    problem = SineChain(num_stages=2, target=0.3, noise=0.0)
    rates = [0.2 / (1 + update) for update in range(12)]
    found = problem.squared_gradients((3, 0), rates, copies=16, seed=0)[:, 0].tolist()
    past = [(0.0, 0.0)]
    for update, rate in enumerate(rates):
        a, b = past[-1]
        stale = math.sin(past[max(0, update - 3)][0])
        own = math.sin(a)
        error = (math.sin(own + b) - 0.3) * math.cos(own + b)
        assert found[update] == pytest.approx(error**2 * (1 + math.cos(a) ** 2), rel=1e-12)
        stale_error = (math.sin(stale + b) - 0.3) * math.cos(stale + b)
        past.append((a - rate * stale_error * math.cos(a), b - rate * stale_error))


@pytest.mark.parametrize("wrong", [{"updates": (100,)}, {"updates": (200, 100)}, {"copies": 20}])
def test_a_slope_needs_points_and_groups(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=r"multiple|two"):
        observe_rate(SineChain(num_stages=2), (2, 0), steps="constant", **wrong)  # type: ignore[arg-type]


def test_a_problem_that_cannot_be() -> None:
    with pytest.raises(ConfigError, match="target"):
        SineChain(num_stages=2, target=1.5)
