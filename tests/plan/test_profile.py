"""What is timed, in which place, and that nothing is changed by it.

Where times matter, layers work on a clock of the test, which only their forward and backward move.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stalewise.errors import PlanError
from stalewise.plan.partition import LayerCost
from stalewise.plan.profile import profile_layers

CPU = torch.device("cpu")


def mean_loss(output: Tensor, targets: Tensor) -> Tensor:
    return (output - targets).square().mean()


def profile(layers: Sequence[Any], inputs: Any, **options: Any) -> list[LayerCost]:
    """`profile_layers` with the options that a test does not care about."""
    defaults: dict[str, Any] = {
        "targets": torch.zeros(()),
        "loss_fn": mean_loss,
        "device": "cpu",
        "names": [f"layer{index}" for index in range(len(layers))],
    }
    options = defaults | options
    return profile_layers(layers, inputs, options.pop("targets"), options.pop("loss_fn"), **options)


class Clock:
    """Stands in for the module `time`."""

    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("stalewise.plan.profile.time", clock)
    return clock


class Spent(torch.autograd.Function):
    """Moves the clock in its backward, and notes whether its input needs a gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, layer: Timed) -> Tensor:
        ctx.layer = layer
        layer.needs.append(ctx.needs_input_grad[0])
        return x * weight

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        ctx.layer.backwards.append(gradient)
        ctx.layer.clock.now += ctx.layer.backward_s
        return gradient, gradient.sum(), None


class Timed(nn.Module):
    """Takes the given seconds of the clock, a list of them in turn."""

    def __init__(self, clock: Clock, forward_s: Sequence[float] = (1.0,), backward_s: float = 2.0) -> None:
        super().__init__()
        self.clock, self.forward_s, self.backward_s = clock, forward_s, backward_s
        self.weight = nn.Parameter(torch.ones(()))
        self.needs: list[bool] = []
        self.backwards: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        assert torch.is_grad_enabled()
        self.clock.now += self.forward_s[len(self.needs) % len(self.forward_s)]
        out: Tensor = Spent.apply(x, self.weight, self)
        return out


class TestTimes:
    def test_wider_layers_take_longer(self) -> None:
        layers = [
            nn.Linear(64, 64),
            nn.Linear(64, 1024),
            nn.Linear(1024, 1024),
            nn.Linear(1024, 64),
            nn.Linear(64, 64),
        ]
        costs = profile(layers, torch.randn(64, 64), repeats=15)
        assert max(range(5), key=lambda index: costs[index].forward_s or 0) == 2
        assert max(range(5), key=lambda index: costs[index].backward_s or 0) == 2
        assert min(min(cost.forward_s or 0, cost.backward_s or 0) for cost in costs) > 0

    def test_forward_and_backward_are_told_apart(self, clock: Clock) -> None:
        costs = profile([Timed(clock, [1], 2), Timed(clock, [3], 4), Timed(clock, [5], 6)], torch.ones(2))
        assert [(cost.forward_s, cost.backward_s) for cost in costs] == [(1, 2), (3, 4), (5, 6)]

    def test_the_median_counts_and_the_warm_up_does_not(self, clock: Clock) -> None:
        (cost,) = profile([Timed(clock, [100, 7, 1, 2])], torch.ones(2), budget_s=1e6)
        assert cost.forward_s == 2

    def test_the_last_layer_is_timed_with_the_loss(self, clock: Clock) -> None:
        loss = Timed(clock, [10], 20)
        costs = profile([Timed(clock), Timed(clock)], torch.ones(2), loss_fn=lambda output, _: loss(output.sum()))
        assert [(cost.forward_s, cost.backward_s) for cost in costs] == [(1, 2), (11, 22)]

    def test_every_pass_of_every_layer_is_counted(self, clock: Clock) -> None:
        layers = [Timed(clock), Timed(clock)]
        profile(layers, torch.ones(2), repeats=5, budget_s=1e6)
        assert [(len(layer.needs), len(layer.backwards)) for layer in layers] == [(6, 6), (6, 6)]

    @pytest.mark.parametrize(
        ("budget_s", "passes"),
        [(0, [2, 2]), (12, [2, 2]), (18, [3, 3]), (24, [4, 4]), (1e6, [4, 4])],
    )
    def test_the_budget_is_shared_by_the_layers(self, clock: Clock, budget_s: float, passes: list[int]) -> None:
        layers = [Timed(clock), Timed(clock)]  # 3 s a pass
        profile(layers, torch.ones(2), budget_s=budget_s)
        assert [len(layer.needs) for layer in layers] == passes

    def test_what_a_layer_leaves_of_the_budget_serves_the_next(self, clock: Clock) -> None:
        layers = [Timed(clock, [0], 0), Timed(clock)]
        profile(layers, torch.ones(2), budget_s=12)
        assert [len(layer.needs) for layer in layers] == [4, 4]

    def test_only_the_input_of_the_model_needs_no_gradient(self, clock: Clock) -> None:
        layers = [Timed(clock), Timed(clock), Timed(clock)]
        profile(layers, torch.ones(2, requires_grad=True), repeats=1)
        assert [layer.needs for layer in layers] == [[False] * 2, [True] * 2, [True] * 2]

    def test_the_output_gradient_is_not_flat(self, clock: Clock) -> None:
        layer = Timed(clock)
        profile([layer, nn.Identity()], torch.ones(64), repeats=1)
        assert layer.backwards[0].unique().numel() > 32

    def test_without_a_gradient_there_is_no_backward(self) -> None:
        costs = profile([nn.Flatten(), nn.Linear(4, 4).requires_grad_(False)], torch.ones(2, 2, 2))
        assert costs[0].backward_s == 0
        assert (costs[1].backward_s or 0) > 0  # of its input
        (cost,) = profile([nn.Linear(4, 4).requires_grad_(False)], torch.ones(2, 4))
        assert cost.backward_s == 0

    def test_layers_that_the_gradient_does_not_reach(self) -> None:
        class Choose(nn.Linear):
            def forward(self, x: Tensor) -> Tensor:
                return super().forward(x).argmax(dim=1)

        class Hidden(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.scale = [torch.ones(3, requires_grad=True)]

            def forward(self, x: Tensor) -> Tensor:
                return self.scale[0] * x

        class Unused(nn.Embedding):
            def __init__(self) -> None:
                super().__init__(3, 4)
                self.unused = nn.Parameter(torch.ones(2))

        chosen, embedded = profile([Choose(3, 3), Unused()], torch.ones(2, 3))
        hidden, _ = profile([Hidden(), nn.ReLU()], torch.ones(2, 3))
        assert (chosen.backward_s, hidden.backward_s) == (0, 0)
        assert (embedded.backward_s or 0) > 0

    @pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
    def test_the_mode_of_the_caller_does_not_matter(self, clock: Clock, mode: Callable[[], Any]) -> None:
        with mode():
            costs = profile([Timed(clock), Timed(clock)], torch.ones(2))
            assert not torch.is_grad_enabled()
        assert [cost.backward_s for cost in costs] == [2, 2]

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    def test_wider_layers_take_longer_on_an_accelerator(self) -> None:
        layers = [nn.Linear(256, 256), nn.Linear(256, 8192), nn.Linear(8192, 8192), nn.Linear(8192, 256)]
        costs = profile(layers, torch.randn(8192, 256), device="cuda", names=list("abcd"))
        assert max(range(4), key=lambda index: costs[index].forward_s or 0) == 2
        assert max(range(4), key=lambda index: costs[index].backward_s or 0) == 2
        assert {weight.device for layer in layers for weight in layer.parameters()} == {CPU}


class TestCosts:
    def test_sizes_names_and_types(self) -> None:
        frozen = nn.Linear(3, 5).requires_grad_(False)
        costs = profile([frozen, nn.ReLU(), nn.Linear(5, 2).double()][:2], torch.ones(7, 3), names=["a", "b.0"])
        assert [(cost.parameters, cost.output_bytes, cost.name, cost.type) for cost in costs] == [
            (20, 7 * 5 * 4, "a", "Linear"),
            (0, 7 * 5 * 4, "b.0", "ReLU"),
        ]

    def test_trees_of_any_kind(self) -> None:
        seen: list[Any] = []

        class Split(nn.Module):
            def forward(self, batch: dict[str, Any]) -> tuple[Any, ...]:
                seen.append(batch)
                return batch["x"] * 2, {"ids": batch["ids"] + 1, "note": batch["note"]}, [None, batch["x"]]

        class Join(nn.Module):
            def forward(self, parts: tuple[Any, ...]) -> Tensor:
                seen.append(parts)
                total: Tensor = parts[0] + parts[1]["ids"] + parts[2][1]
                return total

        inputs = {"x": torch.ones(4), "ids": torch.arange(4), "note": "kept"}
        loss_targets: list[Any] = []

        def loss(output: Tensor, targets: list[Tensor]) -> Tensor:
            loss_targets.append(targets)
            return (output - targets[0]).square().sum()

        costs = profile([Split(), Join()], inputs, targets=[torch.ones(4)], loss_fn=loss, repeats=1)
        assert [cost.output_bytes for cost in costs] == [4 * 4 + 4 * 8 + 4 * 4, 4 * 4]
        assert [cost.backward_s == 0 for cost in costs] == [True, False]
        parts = seen[-1]
        assert [parts[0].requires_grad, parts[1]["ids"].requires_grad, parts[2][1].requires_grad] == [1, 0, 1]
        assert (parts[1]["note"], parts[2][0]) == ("kept", None)
        assert parts[0].tolist() == [2] * 4
        assert torch.equal(loss_targets[-1][0], torch.ones(4))

    def test_layers_that_are_built_are_dropped_before_the_next(self) -> None:
        alive: list[weakref.ref[Any]] = []

        def build() -> nn.Module:
            assert [reference() for reference in alive] == [None] * len(alive)
            layer = nn.Sequential(nn.Linear(4, 4), nn.Dropout())
            alive.extend((weakref.ref(layer), weakref.ref(layer[0].weight)))
            return layer

        before = torch.get_rng_state()
        costs = profile([build, build, build], torch.ones(2, 4))
        assert len(alive) == 6
        assert torch.equal(torch.get_rng_state(), before)
        assert [(cost.type, cost.parameters) for cost in costs] == [("Sequential", 20)] * 3


class Assigns(nn.Module):
    """Assigns its buffer anew in each forward."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(2))

    def forward(self, x: Tensor) -> Tensor:
        self.count = self.count + x.detach().mean()
        return x + self.count.sum()


def everything(module: nn.Module) -> dict[str, Any]:
    """Values, identity, memory, device, gradient and mode of all that a module holds."""
    found: dict[str, Any] = {name: part.training for name, part in module.named_modules()}
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        found[f"{name} is"] = (id(tensor), tensor.data_ptr(), tensor.device, tensor.requires_grad)
        found[f"{name} holds"] = tensor.tolist()
        gradient = tensor.grad if isinstance(tensor, nn.Parameter) else None
        found[f"{name}.grad"] = None if gradient is None else (id(gradient), gradient.tolist())
    return found


class TestNothingChanges:
    def model(self) -> nn.Sequential:
        block = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
        block[1].eval()
        frozen = nn.Linear(4, 4)
        frozen.weight.requires_grad_(False)
        model = nn.Sequential(
            nn.ReLU(inplace=True),
            nn.BatchNorm1d(4),
            nn.Dropout(0.5),
            nn.ReLU(inplace=True),
            Assigns(),
            block,
            frozen,
        )
        model[1].weight.grad = torch.full((4,), 5.0)
        model[6].bias.grad = torch.full((4,), 6.0)
        return model

    @pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
    def test_of_a_model(self, device: str) -> None:
        if device == "cuda" and not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")
        model, inputs, targets = self.model(), torch.randn(8, 4), torch.randn(8, 4)
        before, batch, rng = everything(model), (inputs.clone(), targets.clone()), torch.get_rng_state()

        def loss(output: Tensor, targets: Tensor) -> Tensor:
            return targets.sub_(output).square_().mean()

        profile(list(model), inputs, targets=targets, loss_fn=loss, device=device)
        assert everything(model) == before
        assert torch.equal(inputs, batch[0])
        assert torch.equal(targets, batch[1])
        assert torch.equal(torch.get_rng_state(), rng)

    def test_the_layers_did_run_in_their_modes(self) -> None:
        """The contract is not kept by leaving the work out."""
        modes: list[tuple[bool, bool]] = []

        class Note(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.inner = nn.Dropout().eval()

            def forward(self, x: Tensor) -> Tensor:
                modes.append((self.training, self.inner.training))
                return x

        profile([Note(), Note().eval()], torch.ones(2), repeats=1)
        assert modes == [(True, False)] * 2 + [(False, False)] * 2

    def test_of_weights_that_a_forward_rescales(self) -> None:
        layer = nn.Embedding(3, 4, max_norm=0.1)
        before = everything(layer)
        profile([layer], torch.tensor([0, 1, 2]))
        assert everything(layer) == before

    def test_of_a_loss_with_buffers(self) -> None:
        class Counting(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.register_buffer("count", torch.zeros(()))

            def forward(self, output: Tensor, targets: Tensor) -> Tensor:
                self.count += 1
                return output.mean()

        loss = Counting()
        before = everything(loss)
        profile([nn.Linear(2, 2)], torch.ones(1, 2), loss_fn=loss)
        assert everything(loss) == before

    def test_of_an_optimizer_that_steps_in_the_backward(self) -> None:
        layer = nn.Linear(2, 2)
        stepped: list[Tensor] = []
        layer.weight.register_post_accumulate_grad_hook(stepped.append)
        profile([layer], torch.ones(1, 2))
        assert stepped == []

    def test_after_an_error(self) -> None:
        model, wrong, inputs = self.model(), nn.Linear(3, 3), torch.randn(8, 4)
        before, rng = everything(model), torch.get_rng_state()
        with pytest.raises(PlanError):
            profile([*model, wrong], inputs)
        assert everything(model) == before
        assert torch.equal(torch.get_rng_state(), rng)


class TestErrors:
    def test_a_layer_that_does_not_fit(self) -> None:
        with pytest.raises(PlanError, match=r"(?s)layer 1 \(head, Linear\) failed in its forward on cpu: ") as caught:
            profile(
                [nn.Linear(4, 4), nn.Linear(5, 2), nn.ReLU()],
                torch.ones(2, 4),
                names=["stem", "head", "relu"],
            )
        assert isinstance(caught.value.__cause__, RuntimeError)
        assert str(caught.value.__cause__) in str(caught.value)
        assert str(caught.value).endswith(
            "Each layer takes one argument; this one was given the output of the layer before, "
            "float32[2, 4]. Check the order of the layers, and run this one alone."
        )

    def test_a_backward_that_fails(self, clock: Clock) -> None:
        class Broken(Timed):
            @property
            def backward_s(self) -> float:
                raise ZeroDivisionError("half way")

            @backward_s.setter
            def backward_s(self, value: float) -> None:
                pass

        with pytest.raises(PlanError, match=r"layer 0 \(layer0, Broken\) failed in its backward on cpu: ZeroDiv"):
            profile([Broken(clock), nn.ReLU()], torch.ones(2))

    def test_a_layer_that_cannot_be_built(self) -> None:
        def build() -> nn.Module:
            raise ZeroDivisionError("no such layer")

        with pytest.raises(
            PlanError,
            match=r"layer 1 \(layer1, build\) failed in its construction on cpu: ZeroDivisionError: no such",
        ):
            profile([nn.ReLU(), build], torch.ones(2))

    def test_what_is_built_is_a_layer(self) -> None:
        with pytest.raises(PlanError, match=r"layer 0 \(layer0, dict\) returned a value of type dict; a layer is"):
            profile([dict], torch.ones(2))

    def test_a_layer_without_shapes(self) -> None:
        layer = nn.LazyLinear(3)
        with pytest.raises(PlanError, match=r"layer 0 \(layer0, LazyLinear\) has weights without a shape"):
            profile([layer], torch.ones(2, 2))
        assert nn.parameter.is_lazy(layer.weight)

    def test_a_loss_that_fails(self) -> None:
        with pytest.raises(PlanError, match=r"(?s)layer 0 .*check loss_fn and the targets too"):
            profile([nn.ReLU()], torch.ones(2), loss_fn=nn.CrossEntropyLoss(), targets=torch.ones(3))

    def test_a_loss_that_is_not_one_number(self) -> None:
        with pytest.raises(PlanError, match=r"loss_fn returned float32\[2\] for the output float32\[2\] of layer 0"):
            profile([nn.ReLU()], torch.ones(2), loss_fn=lambda output, _: output)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"names": ["one"]}, "1 names were given for 2 layers"),
            ({"repeats": 0}, "repeats is 0"),
            ({"budget_s": -1.0}, "budget_s is -1.0"),
            ({"budget_s": float("nan")}, "budget_s is nan"),
            ({"device": "meta"}, "device is meta; layers can be timed on cpu and cuda devices"),
            ({"device": "cuda:99"}, r"device is cuda:99, and torch sees \d CUDA devices"),
        ],
    )
    def test_arguments(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises(PlanError, match=message):
            profile([nn.ReLU(), nn.ReLU()], torch.ones(2), **options)

    def test_no_layers(self) -> None:
        with pytest.raises(PlanError, match="there are no layers to profile"):
            profile([], torch.ones(2))
