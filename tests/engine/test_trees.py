"""Stages that exchange nested values: tuples, dicts, lists, None, integers, complex numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from engine_nets import assert_same, build_engine, model_state, momentum, sgd, train
from reference import train_reference
from torch import Tensor, nn

from stalewise.engine.messages import Activation
from stalewise.engine.tree import flatten
from stalewise.errors import ConfigError

# A tree of two float leaves, an integer mask and a None between three stages, and the same numbers packed into one
# tensor: (4 samples) x (3 of `h`, 3 of `skip`, 3 of `mask`).

Pair = dict[str, Any]


def pack(tree: Pair) -> Tensor:
    return torch.cat([tree["parts"][0], tree["parts"][1][0], tree["mask"].to(torch.float32)], 1)


def unpack(packed: Tensor) -> Pair:
    h, skip, mask = (part.contiguous() for part in packed.split(3, 1))
    return {"parts": (h, [skip, None]), "mask": mask.detach().to(torch.int64), "nothing": None}


class Enter(nn.Module):
    """A tensor or a dict of two to a tree."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, 3))

    def forward(self, inputs: Any) -> Pair:
        h, mask = inputs["h"], inputs["mask"]
        return {"parts": (h * self.weight, [h, None]), "mask": mask, "nothing": None}


class Middle(nn.Module):
    """Works on both float leaves and hands the mask on."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-0.5, 0.7, 3))
        self.shift = nn.Parameter(torch.zeros(3))

    def forward(self, tree: Pair) -> Pair:
        h, (skip, none) = tree["parts"]
        assert none is None
        assert tree["nothing"] is None
        return {
            "parts": (torch.tanh(h * self.weight) * tree["mask"], [skip * self.weight + self.shift, None]),
            "mask": tree["mask"],
            "nothing": None,
        }


class Leave(nn.Module):
    """A tree to a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(1.0, 0.2, 3))

    def forward(self, tree: Pair) -> Tensor:
        h, (skip, _) = tree["parts"]
        return (h * self.weight + skip) * tree["mask"]


class Packed(nn.Module):
    """A layer on trees as a layer on tensors."""

    def __init__(self, layer: nn.Module, *, first: bool = False, last: bool = False) -> None:
        super().__init__()
        self.layer, self.first, self.last = layer, first, last

    def forward(self, h: Tensor) -> Tensor:
        if self.first:
            parts = h.split(3, 1)
            return pack(self.layer({"h": parts[0].contiguous(), "mask": parts[1].to(torch.int64)}))
        output = self.layer(unpack(h))
        return output if self.last else pack(output)


def squared(output: Tensor, target: Any) -> Tensor:
    wanted = target["wanted"][0] if isinstance(target, dict) else target
    return ((output - wanted) ** 2).mean()


@pytest.mark.parametrize("staleness", [(0, 0, 0), (2, 1, 0), (4, 2, 0), (3, 0, 0)])
def test_a_tree_between_stages_trains_like_its_leaves_packed_into_one_tensor(staleness: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(3)
    values = [
        (torch.randn(4, 3, generator=generator), torch.randint(3, (4, 3), generator=generator), torch.randn(4, 3))
        for _ in range(9)
    ]
    layers: list[nn.Module] = [Enter(), Middle(), Leave()]
    truth: list[nn.Module] = [Packed(Enter(), first=True), Packed(Middle()), Packed(Leave(), last=True)]
    engine = build_engine(layers, staleness, (1, 2), loss_fn=squared)
    nested = [({"h": h, "mask": mask}, {"wanted": [target, None]}) for h, mask, target in values]
    packed = [(torch.cat([h, mask.to(torch.float32)], 1), target) for h, mask, target in values]
    losses = train(engine, nested)
    expected = train_reference(truth, (1, 2), staleness, packed, squared, momentum)
    assert losses == expected.losses
    assert_same(list(engine.state_dict().values()), list(model_state(truth).values()))


def test_gradients_exist_for_used_float_leaves_only() -> None:
    """Integers, unused leaves and None: what the last stage and the stage before it answer per leaf."""
    torch.manual_seed(0)

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, h: Tensor) -> tuple[Tensor, Any, Tensor]:
            return self.used(h), {"unused": self.unused(h), "none": None}, torch.arange(4)

    layers: list[nn.Module] = [Two(), nn.Identity(), Head()]
    engine = build_engine(layers, (1, 1, 0), (1, 2), loss_fn=lambda output, target: output.mean(), optimizer=sgd)
    first, second, last = engine.stages
    values, structure = flatten(torch.randn(4, 3))
    sent = first.forward(Activation(values, structure, None), 0, keep_graph=False)
    assert [value.dtype for value in sent.values] == [torch.float32, torch.float32, torch.int64]
    assert not any(value.requires_grad for value in sent.values)
    passed_on = second.forward(sent, 0, keep_graph=False)
    assert_same(passed_on.values, sent.values)
    last.forward(passed_on, 0, keep_graph=True)
    used, unused, integers = last.backward(None, 0)
    assert used is not None
    assert torch.equal(used, torch.full((4, 3), 1 / 12))
    assert unused is None
    assert integers is None
    second.recompute(0)
    answers = second.backward([used, unused, integers], 0)
    assert torch.equal(answers[0], used)
    assert answers[1:] == [None, None]
    first.recompute(0)
    assert first.backward(answers, 0) == [None]  # nobody wants the gradient of the batch
    assert layers[0].used.weight.grad is not None
    assert layers[0].unused.weight.grad is None
    before = layers[0].unused.weight.detach().clone()
    first.update()
    assert torch.equal(layers[0].unused.weight, before)


class Head(nn.Module):
    """Uses the first leaf of three and must find the None where it was."""

    def forward(self, tree: tuple[Tensor, Any, Tensor]) -> Tensor:
        h, rest, integers = tree
        assert rest["none"] is None
        assert torch.equal(integers, torch.arange(4))
        return h


class Complex(nn.Module):
    def forward(self, h: Tensor) -> Tensor:
        return torch.complex(h, h.flip(1))


class Magnitude(nn.Module):
    def forward(self, h: Tensor) -> Tensor:
        return torch.cat([h.real, h.imag * 2], 1)


def test_complex_activations_carry_gradients() -> None:
    def layers() -> list[nn.Module]:
        torch.manual_seed(0)
        return [nn.Sequential(nn.Linear(3, 3), Complex()), Magnitude(), nn.Linear(6, 3)]

    batches = [(torch.randn(4, 3), torch.randn(4, 3)) for _ in range(6)]
    model, truth = layers(), layers()
    engine = build_engine(model, (2, 1, 0), (1, 2), loss_fn=squared)
    losses = train(engine, batches)
    expected = train_reference(truth, (1, 2), (2, 1, 0), batches, squared, momentum)
    assert losses == expected.losses
    assert_same(engine.state_dict(), model_state(truth))


def test_a_target_may_be_none_and_reaches_the_loss_as_it_was_given() -> None:
    seen: list[Any] = []

    def loss_fn(output: Tensor, target: Any) -> Tensor:
        seen.append(target)
        return output.mean()

    targets: list[Any] = [None, (torch.ones(1), [None, {"a": torch.zeros(2)}]), torch.ones(3), {}]
    batches = [(torch.ones(2, 3), target) for target in targets]
    train(build_engine([nn.Linear(3, 3), nn.Linear(3, 3)], (2, 0), (1,), loss_fn=loss_fn), batches)
    assert_same(seen, targets)
    assert [type(target) for target in seen] == [type(target) for target in targets]


def test_shapes_may_change_from_batch_to_batch() -> None:
    """Other image sizes and a smaller last batch: each batch remembers its own."""

    class Pool(nn.Module):
        def forward(self, h: Tensor) -> Tensor:
            return h.mean((2, 3))

    def layers() -> list[nn.Module]:
        torch.manual_seed(0)
        return [nn.Conv2d(2, 3, 3, padding=1), nn.ReLU(inplace=True), Pool(), nn.Linear(3, 3)]

    shapes = [(4, 3), (4, 5), (1, 2), (4, 4), (2, 3), (4, 1), (3, 6)]
    batches = [(torch.randn(n, 2, size, size), torch.randn(n, 3)) for n, size in shapes]
    truth = layers()
    engine = build_engine(layers(), (4, 2, 0), (1, 2), loss_fn=squared)
    losses = train(engine, batches)
    assert losses == train_reference(truth, (1, 2), (4, 2, 0), batches, squared, momentum).losses
    assert_same(engine.state_dict(), model_state(truth))


@pytest.mark.parametrize("staleness", [(0, 0, 0), (2, 1, 0), (4, 2, 0)])
def test_the_structure_may_change_from_batch_to_batch(staleness: tuple[int, ...]) -> None:
    """A key that comes and goes. At learning rate 0, where staleness makes no difference, against the unsplit model."""

    def layers() -> list[nn.Module]:
        torch.manual_seed(0)
        return [Spread(), Join(), nn.Linear(2, 3)]

    batches = [(torch.randn(4, 2, size, size), torch.randn(4, 3)) for size in (3, 4, 2, 5, 1, 4)]
    model, truth = layers(), nn.Sequential(*layers())
    gradients: list[list[Tensor]] = []

    def make_optimizer(params: Any) -> torch.optim.Optimizer:
        optimizer = torch.optim.SGD(params, lr=0.0)
        if params[0] is model[0].weight:
            optimizer.register_step_pre_hook(lambda *_: gradients.append([p.grad.clone() for p in params]))
        return optimizer

    losses = train(build_engine(model, staleness, (1, 2), loss_fn=squared, optimizer=make_optimizer), batches)
    for (inputs, target), loss, gradient in zip(batches, losses, gradients, strict=True):
        truth.zero_grad()
        expected = squared(truth(inputs), target)
        expected.backward()
        assert loss == expected.item()
        assert_same(gradient, [truth[0].weight.grad])


class Join(nn.Module):
    """The mean of the images, plus the second leaf where there is one."""

    def forward(self, tree: dict[str, Tensor]) -> Tensor:
        h = tree["images"].mean((2, 3))
        return h + tree["extra"] if "extra" in tree else h


class Spread(nn.Module):
    """Images, and for odd sizes a second leaf."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, 1, 1))

    def forward(self, h: Tensor) -> dict[str, Tensor]:
        tree = {"images": h * self.weight}
        return tree if h.shape[-1] % 2 == 0 else {**tree, "extra": tree["images"].amax((2, 3))}


@pytest.mark.parametrize("value", [3, "text", {1: torch.ones(1)}, {"a": (torch.ones(1), object())}])
def test_what_stages_cannot_exchange_is_refused(value: Any) -> None:
    class Odd(nn.Module):
        def forward(self, h: Tensor) -> Any:
            return value

    with pytest.raises(ConfigError, match="exchange tensors, None, and tuples, lists and dicts"):
        train(build_engine([Odd(), nn.Identity()], (2, 0), (1,)), [(torch.ones(2), None)])
