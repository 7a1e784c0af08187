"""The optimizers of the unified form against their definition and against torch's."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn

from stalewise.errors import ConfigError
from stalewise.theory import UnifiedMomentum


def gradient(x: Tensor) -> Tensor:
    return x**3 - 2 * x.flip(0)


def run(make: Callable[[list[nn.Parameter]], torch.optim.Optimizer], rates: Sequence[float]) -> list[Tensor]:
    x = nn.Parameter(torch.tensor([0.5, -1.0, 1.5], dtype=torch.float64))
    optimizer = make([x])
    found = []
    for rate in rates:
        optimizer.param_groups[0]["lr"] = rate
        x.grad = gradient(x.detach())
        optimizer.step()
        found.append(x.detach().clone())
    return found


CONSTANT = [0.05] * 12
STAIRS = [0.05] * 6 + [0.005] * 6


def unified(s: float) -> Callable[[list[nn.Parameter]], torch.optim.Optimizer]:
    return lambda params: UnifiedMomentum(params, lr=0.05, momentum=0.9, s=s)


@pytest.mark.parametrize("s", [0.0, 0.5, 1.0, 4.0])
@pytest.mark.parametrize("rates", [CONSTANT, STAIRS])
def test_the_definition(s: float, rates: list[float]) -> None:
    x = [torch.tensor([0.5, -1.0, 1.5], dtype=torch.float64)]
    ys = [x[0]]
    for rate in rates:
        y = x[-1] - rate * gradient(x[-1])
        ys.append(x[-1] - s * rate * gradient(x[-1]))
        x.append(y + 0.9 * (ys[-1] - ys[-2]))
    torch.testing.assert_close(run(unified(s), rates), x[1:], rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize(("s", "nesterov"), [(0.0, False), (1.0, True)])
def test_torch_computes_the_same_at_a_constant_rate_and_not_where_it_changes(s: float, nesterov: bool) -> None:
    def torch_sgd(params: list[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.SGD(params, lr=0.05, momentum=0.9, nesterov=nesterov)

    torch.testing.assert_close(run(unified(s), CONSTANT), run(torch_sgd, CONSTANT), rtol=1e-12, atol=1e-14)
    ours, theirs = run(unified(s), STAIRS), run(torch_sgd, STAIRS)
    assert (ours[6] - theirs[6]).abs().max() > 1e-3


def test_the_third_member_of_the_family_is_sgd_at_a_larger_rate() -> None:
    """s = 1 / (1 - beta)."""

    def sgd(params: list[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.SGD(params, lr=0.05)

    ours, plain = run(unified(10.0), [0.005] * 12), run(sgd, CONSTANT)
    torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-14)


def test_a_state_that_is_saved_goes_on() -> None:
    def interrupted(params: list[nn.Parameter]) -> torch.optim.Optimizer:
        first = UnifiedMomentum(params, lr=0.05, momentum=0.9, s=1)
        before = params[0].detach().clone()
        params[0].grad = gradient(before)
        first.step()
        second = UnifiedMomentum(params, lr=0.05, momentum=0.9, s=1)
        second.load_state_dict(first.state_dict())
        return second

    assert torch.equal(run(interrupted, CONSTANT)[-2], run(unified(1.0), CONSTANT)[-1])


def test_a_parameter_without_gradient_stays() -> None:
    x = nn.Parameter(torch.ones(2))
    optimizer = UnifiedMomentum([x], lr=0.1, momentum=0.9)
    assert optimizer.step(lambda: 3.0) == 3.0
    assert torch.equal(x, torch.ones(2))


@pytest.mark.parametrize("wrong", [{"lr": -1.0}, {"momentum": 1.0}, {"momentum": -0.1}, {"s": -0.5}])
def test_numbers_out_of_range(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        UnifiedMomentum([nn.Parameter(torch.ones(1))], **{"lr": 0.1, "momentum": 0.9, **wrong})
