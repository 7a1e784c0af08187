"""A layer that ran on a scratch copy is the layer that it was."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from stalewise.plan.scratch import preserved_random_state, scratch_copy

CPU = torch.device("cpu")


class Marks(nn.Module):
    """Changes all that a forward can change of a module."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.replaced = nn.Parameter(torch.ones(2))
        self.register_buffer("written", torch.zeros(2))
        self.register_buffer("assigned", torch.zeros(2))
        self.register_buffer("absent", None)
        self.register_buffer("dropped", torch.zeros(1))
        self.inner = nn.Dropout()
        self.calls = 0
        self.cache: dict[str, Tensor] = {}
        self.seen: set[int] = set()
        self.last: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.weight.mul_(3)
        self.replaced = nn.Parameter(torch.zeros(2))
        self.written += 1
        self.assigned = self.assigned + 1
        self.absent = torch.ones(1)
        del self.dropped
        self.register_buffer("new", torch.ones(1), persistent=False)
        self.inner.eval()
        self.calls += 1
        self.cache["x"] = x
        self.seen.add(len(x))
        self.last = x
        return x * self.weight


def state(module: nn.Module) -> list[tuple[Any, ...]]:
    """All there is to know about the tensors of a module, their identity and their memory's included."""
    named = [*module.named_parameters(), *module.named_buffers()]
    return [
        (
            name,
            id(tensor),
            tensor.data_ptr(),
            tensor.device,
            tensor.requires_grad,
            id(tensor.grad),
            tensor.tolist(),
        )
        for name, tensor in named
    ]


def test_everything_that_a_forward_changed_is_back() -> None:
    module = Marks()
    before, keys, names = state(module), list(module.state_dict()), list(vars(module))
    with scratch_copy(module, CPU):
        module(torch.ones(2))
        assert module.weight.tolist() == [3, 3]
        assert module.calls == 1
    assert state(module) == before
    assert list(module.state_dict()) == keys
    assert list(vars(module)) == names
    assert (module.calls, module.cache, module.seen, module.last, module.absent) == (0, {}, set(), None, None)
    assert module.inner.training
    assert not hasattr(module, "new")


def test_the_copy_is_back_after_an_error_too() -> None:
    module = Marks()
    before = state(module)

    def fail() -> None:
        with scratch_copy(module, CPU):
            module(torch.ones(2))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert state(module) == before


def test_whatever_refers_to_a_weight_sees_the_copy() -> None:
    module = nn.Linear(2, 2)
    module.weights = [module.weight]
    tied = nn.Sequential(module, nn.Linear(2, 2))
    tied[1].weight = module.weight
    before = state(tied)
    with scratch_copy(tied, CPU):
        assert module.weight.data_ptr() != before[0][2]
        with torch.no_grad():
            module.weights[0].zero_()
        assert tied[1].weight.tolist() == [[0, 0], [0, 0]]
    assert state(tied) == before


def test_a_graph_that_was_open_before_can_still_be_used() -> None:
    module = nn.Linear(3, 1, bias=False)
    x = torch.ones(1, 3, requires_grad=True)
    loss = module(x).square().sum()
    with scratch_copy(module, CPU):
        module(torch.ones(1, 3))
    (gradient,) = torch.autograd.grad(loss, x)
    assert torch.allclose(gradient, 2 * module.weight.sum() * module.weight)


def test_recurrent_layers_work_on_their_copy() -> None:
    module = nn.LSTM(2, 3)
    before, expected = state(module), module(torch.ones(4, 1, 2))[0]
    with scratch_copy(module, CPU):
        assert torch.equal(module(torch.ones(4, 1, 2))[0], expected)
    assert state(module) == before


def numpy_draw() -> float:
    return float(np.random.random())


@pytest.mark.parametrize("draw", [lambda: torch.rand(()).item(), numpy_draw, random.random])
def test_random_states_are_kept(draw: Callable[[], float]) -> None:
    with preserved_random_state(CPU):
        inside = [draw(), draw()]
    assert [draw(), draw()] == inside


def test_random_states_are_kept_after_an_error() -> None:
    states = torch.get_rng_state(), random.getstate()

    def fail() -> None:
        with preserved_random_state(CPU):
            torch.rand(3), random.random()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_module_comes_back_from_an_accelerator() -> None:
    device = torch.device("cuda")
    module = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout())
    module[0].weight.grad = torch.ones(4, 4)
    before, cuda_state = state(module), torch.cuda.get_rng_state(device)
    with preserved_random_state(device), scratch_copy(module, device):
        assert module(torch.ones(3, 4, device=device)).device.type == "cuda"
    assert state(module) == before
    assert torch.equal(torch.cuda.get_rng_state(device), cuda_state)
    assert copy.deepcopy(module)(torch.ones(3, 4)).device == CPU
