# ruff: noqa: RUF005 (tables of bad values)
"""Batches, losses, models and metrics that cannot be trained with."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from bad_cases import Case
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from stalewise import Pipeline
from stalewise.methods import METHOD_NAMES, build_method

__all__ = ["batches", "layers", "losses"]


def _good(random: Random) -> list[Any]:
    """Five batches, the last one smaller; enough samples for every method's micro-batches."""
    return [(torch.randn(size, 4), torch.randint(3, (size,))) for size in (8, 8, 8, 8, random.choice((8, 5)))]


def _net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))


def _train(random: Random, given: Any, **options: Any) -> Callable[[], object]:
    method = random.choice(METHOD_NAMES)
    partition: Any = random.choice([(2, 3), (2, 3), "profile"])

    def act() -> object:
        ran = Pipeline(
            options.pop("model", None) or _net(),
            method=build_method(method, num_stages=3),
            loss_fn=options.pop("loss_fn", cross_entropy),
            optimizer=lambda params: torch.optim.SGD(params, lr=0.1),
            partition=partition,
            verbose=False,
            **options,
        )
        return list(ran.train(given))

    return act


def batches(random: Random, folder: Path) -> Case:
    """One batch of five that is no batch, or does not fit the others."""
    good = _good(random)
    place = random.randrange(len(good))
    inputs, target = good[place]
    size = len(inputs)
    bad: dict[str, Callable[[], Any]] = {
        "no pair": lambda: random.choice(
            [None, 3, "ab", inputs, (inputs,), (inputs, target, target), {}, [], object()]
        ),
        "no tensors": lambda: random.choice(
            [(inputs.numpy(), target), (inputs.tolist(), target), ("a", target), ({1: inputs}, target), ((), target)]
            + [(inputs, target.numpy()), (inputs, "target"), (inputs, 3), ({1, 2}, target), (None, target)]
        ),
        "another width": lambda: (torch.randn(size, random.choice((1, 3, 5, 40))), target),
        "another rank": lambda: (random.choice([inputs[0, 0], inputs[:, None, :, None], inputs.reshape(-1)]), target),
        "another type": lambda: (
            inputs.to(random.choice([torch.int64, torch.float64, torch.complex64, torch.bool])),
            target,
        ),
        "targets out of range": lambda: (inputs, torch.full((size,), random.choice((3, -1, 10**9, -(2**62))))),
        "fewer targets": lambda: (inputs, target[: random.randrange(size)]),
        "targets of another type": lambda: (
            inputs,
            random.choice([target.to(torch.int16), target == 1, target.float()]),
        ),
        "no target": lambda: (inputs, None),
        "meta": lambda: random.choice([(inputs.to("meta"), target), (inputs, target.to("meta"))]),
        "sparse": lambda: random.choice([(inputs.to_sparse(), target), (inputs, target.to_sparse())]),
        "two inputs": lambda: ((inputs, inputs), target),
    }
    name = random.choice([*bad, "nothing", "inference", "no iterable", "inference mode", "raises", "nan", "empty"])
    act: Callable[[], object]
    match name:
        case "nothing":
            act = lambda: Pipeline.evaluate(_pipeline(), [], lambda output, target: 0.0)  # noqa: E731
            return Case("evaluate without batches", act)
        case "inference":
            with torch.inference_mode():
                good = [(inputs.clone(), target.clone()) for inputs, target in good]
            return Case("tensors made in inference mode", _train(random, good), must_fail=False)
        case "inference mode":
            within = _train(random, good)

            def act() -> object:
                with torch.inference_mode():
                    return within()

            return Case("train within inference mode", act)
        case "no iterable":
            return Case(name, _train(random, random.choice([3, None, object(), torch.nn.Linear(1, 1)])))
        case "raises":
            return Case("batches that are good", _train(random, good), must_fail=False)
        case "nan":
            inputs[random.randrange(size), 0] = random.choice([math.nan, math.inf, -math.inf])
            policy = random.choice(["stop", "skip", "go-on"])
            act = _train(random, good, nonfinite_loss=policy, nonfinite_folder=folder / "nonfinite")
            return Case(f"{name}, {policy}", act, policy == "stop")
        case "empty":
            good[place] = (inputs[:0], target[:0])
            return Case("a batch without samples", _train(random, good), must_fail=False)
    good[place] = bad[name]()
    # A copy is made where that is meant well: other integers as targets, for one, or a target that nobody needs.
    return Case(f"batch {place}: {name}", _train(random, good), name not in ("another rank", "another type"))


def _pipeline() -> Pipeline:
    return Pipeline(
        _net(),
        method=build_method("dsp", num_stages=3),
        loss_fn=cross_entropy,
        optimizer=lambda params: torch.optim.SGD(params, lr=0.1),
        partition=(2, 3),
    )


def losses(random: Random, folder: Path) -> Case:
    """Loss functions and metrics that give no number to train with."""
    bad: dict[str, Callable[[Any, Any], Any]] = {
        "per sample": lambda output, target: cross_entropy(output, target, reduction="none"),
        "a float": lambda output, target: cross_entropy(output, target).item(),
        "none": lambda output, target: None,
        "detached": lambda output, target: cross_entropy(output, target).detach(),
        "a constant": lambda output, target: torch.tensor(1.0),
        "whole": lambda output, target: output.argmax(),
        "complex": lambda output, target: cross_entropy(output, target) * 1j,
        "a pair": lambda output, target: (cross_entropy(output, target), 3),
        "of shapes": lambda output, target: nn.functional.l1_loss(
            output, target.float()[:, None, None].expand(-1, 2, 5)
        ),
        "nan": lambda output, target: cross_entropy(output, target) * math.nan,
        "infinite": lambda output, target: cross_entropy(output, target) / 0,
        "numpy": lambda output, target: np.float32(1),
        "numbers out": lambda output, target: nn.functional.nll_loss(output, target + 5),
        "empty": lambda output, target: output[:0].sum(dim=1),
    }
    if random.random() < 0.3:
        metrics: dict[str, Any] = {
            "none": lambda output, target: None,
            "per sample": lambda output, target: output[:, 0],
            "a text": lambda output, target: "high",
            "of shapes": lambda output, target: nn.functional.nll_loss(output, target + 5),
            "not callable": 3,
        }
        name = random.choice(list(metrics))
        return Case(f"metric: {name}", lambda: _pipeline().evaluate(_good(random), metrics[name]))
    name = random.choice(list(bad))
    return Case(f"loss: {name}", _train(random, _good(random), loss_fn=bad[name]))


class _Gives(nn.Module):
    """Returns something else than a tensor, or treats its input badly."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what
        self.calls = 0

    def forward(self, inputs: Tensor) -> Any:
        self.calls += 1
        gives: dict[str, Callable[[], Any]] = {
            "a text": lambda: "text",
            "a number": lambda: 3.5,
            "an object": object,
            "numpy": lambda: inputs.detach().numpy(),
            "a set": lambda: {1},
            "a dict of numbers": lambda: {1: inputs},
            "nothing": lambda: None,
            "a generator": lambda: (part for part in inputs),
            "in place": lambda: inputs.mul_(2),
            "in place later": lambda: inputs.mul_(2) if self.calls > 2 else inputs * 2,
            "meta": lambda: inputs.to("meta"),
            "sparse": lambda: inputs.to_sparse(),
            "detached": lambda: inputs.detach(),
            "whole": lambda: inputs.long(),
            "wrong width": lambda: inputs[:, :3],
        }
        return gives[self.what]()


def layers(random: Random, folder: Path) -> Case:
    """Layers that do not go together, share something across stages, or give what cannot be sent."""
    net = list(_net())
    name = random.choice(["gives", "gives", "shared weight", "shared buffer", "lazy", "hook", "root hook", "recipe"])
    must_fail = True
    model: Any = net
    match name:
        case "gives":
            what = random.choice(
                ["a text", "a number", "an object", "numpy", "a set", "a dict of numbers", "nothing", "a generator"]
                + ["in place", "in place later", "meta", "sparse", "detached", "whole", "wrong width"]
            )
            net.insert(random.choice((1, 2, 3)), _Gives(what))
            name, must_fail = f"gives {what}", what not in ("in place", "in place later", "detached")
        case "shared weight":
            net[2].weight = net[4].weight = nn.Parameter(torch.randn(8, 8))
            net[4].bias = nn.Parameter(torch.zeros(8))
        case "shared buffer":
            net.append(nn.BatchNorm1d(3))
            net[0] = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8))
            net[0][1].running_mean = net[3].running_mean
        case "lazy":
            net[random.choice((0, 2, 4))] = random.choice([nn.LazyLinear(8), nn.LazyBatchNorm1d()])
        case "hook":
            what = random.choice(["a text", "nothing", "wrong width"])
            giver = _Gives(what)
            net[2].register_forward_hook(lambda module, given, output: giver(output))
            name, must_fail = f"hook gives {what}", what != "nothing"
        case "root hook":
            model = nn.Sequential(*net)
            model.register_forward_hook(lambda module, given, output: output)
        case "recipe":
            model = [*net[:4], random.choice([lambda: nn.Linear(9, 3), lambda: None, lambda: 1 / 0, nn.Linear])]
    return Case(f"model: {name}", _train(random, _good(random), model=model), must_fail)
