"""A small network, its batches and a long training run, for tests that compare engines bit by bit."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from block import Block
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR, StepLR

import stalewise

CLASSES = 5


class Jitter(nn.Module):
    """Passes its input on, after a random time where `delay` is set (which it is in workers only)."""

    delay: Callable[[], None] | None = None

    def forward(self, inputs: Tensor) -> Tensor:
        if Jitter.delay is not None:
            Jitter.delay()
        return inputs


class RandomDelay:
    """Mostly well below a millisecond, now and then 15: as long as a few steps of the network below.

    Args:
        seed: of this delay's own random numbers.
    """

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def __call__(self) -> None:
        if self._random.random() < 0.02:
            time.sleep(0.015)
        elif self._random.random() < 0.5:
            time.sleep(self._random.expovariate(4000))
        else:
            end = time.perf_counter() + self._random.expovariate(4000)
            while time.perf_counter() < end:
                pass


def network() -> nn.Sequential:
    """Nine layers with BatchNorm, Dropout, and ReLUs in place; each stage of `CUTS` has a `Jitter`."""
    torch.manual_seed(0)
    return nn.Sequential(
        Block(nn.Conv2d(3, 6, 3, padding=1), Jitter()),
        nn.BatchNorm2d(6),
        nn.ReLU(inplace=True),
        Block(nn.Dropout2d(0.2), nn.Conv2d(6, 8, 3, stride=2, padding=1), Jitter()),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        Block(nn.Conv2d(8, 8, 3, padding=1), Jitter(), nn.Dropout(0.1)),
        nn.BatchNorm2d(8),
        Block(nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), Jitter(), nn.Linear(32, CLASSES)),
    )


CUTS = {2: (4,), 3: (2, 5), 4: (2, 5, 7)}


def batches(count: int, seed: int, *, last: int = 4) -> list[tuple[Tensor, Tensor]]:
    """`count` batches of 4 samples; the last one has `last`."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [4] * (count - 1) + [last]
    return [
        (
            torch.randn(size, 3, 8, 8, generator=generator),
            torch.randint(CLASSES, (size,), generator=generator),
        )
        for size in sizes
    ]


def accuracy(output: Tensor, target: Tensor) -> float:
    """Of one batch."""
    return (output.argmax(1) == target).double().mean().item()


def _nesterov(parameters: Any) -> Optimizer:
    return SGD(parameters, lr=0.05, momentum=0.9, nesterov=True, weight_decay=5e-4)


def _adamw(parameters: Any) -> Optimizer:
    return AdamW(parameters, lr=0.01, betas=(0.8, 0.99))


def _step(optimizer: Optimizer) -> LRScheduler:
    return StepLR(optimizer, 25, gamma=0.8)


def _one_cycle(optimizer: Optimizer) -> LRScheduler:
    return OneCycleLR(optimizer, max_lr=0.02, total_steps=400)


def _no_decay(name: str, parameter: nn.Parameter) -> dict[str, Any]:
    return {"weight_decay": 0.0} if parameter.ndim == 1 else {}


OPTIONS: dict[int, dict[str, Any]] = {
    2: {
        "method": stalewise.DSP.minimal(num_stages=2),
        "optimizer": _nesterov,
        "lr_scheduler": _step,
    },
    3: {
        "method": stalewise.DSP(queue=(2, 2, 0), staleness=(6, 3, 0)),
        "optimizer": _adamw,
        "lr_scheduler": _one_cycle,
        "clip_grad_norm": 1.0,
        "param_groups": _no_decay,
    },
    4: {
        "method": stalewise.DSP.minimal(num_stages=4),
        "optimizer": _nesterov,
        "lr_scheduler": _step,
    },
}


def pipeline(num_stages: int, **options: Any) -> stalewise.Pipeline:
    """The network as a pipeline; for K = 4 in channels-last format."""
    model = network()
    if num_stages == 4:
        model = model.to(memory_format=torch.channels_last)
    settings = {"loss_fn": cross_entropy, "partition": CUTS[num_stages], "seed": 11, **OPTIONS[num_stages], **options}
    return stalewise.Pipeline(model, **settings)


class Untouchable:
    """An iterable for ranks that must not read it."""

    def __iter__(self) -> Iterator[Any]:
        raise AssertionError("a rank above 0 touched its batches")


@dataclass(frozen=True)
class Outcome:
    """Everything that a run leaves behind."""

    losses: list[float]
    scores: list[float]
    rates: list[float | None]
    state: dict[str, Tensor]
    optimizer: dict[str, Any]


def train_long(pipe: stalewise.Pipeline) -> Outcome:
    """More than 200 updates: epochs without a drain, evaluations in between, small last batches, an early leave."""
    own = (lambda given: given) if pipe.rank == 0 else (lambda given: Untouchable())
    held_out = batches(7, 99, last=2)
    losses: list[float] = []
    scores: list[float] = []
    rates: list[float | None] = []
    losses += pipe.train(own(batches(60, 1, last=3)), drain=False)
    losses += pipe.train(own(batches(45, 2, last=1)), drain=False)
    rates.append(pipe.learning_rate)
    losses += pipe.drain()
    scores.append(pipe.evaluate(own(held_out), accuracy))
    losses += pipe.train(own(batches(50, 3, last=2)))
    scores.append(pipe.evaluate(own(held_out), accuracy))
    for loss in pipe.train(own(batches(100, 4))):
        losses.append(loss)
        if len(losses) == 185:
            break
    losses += pipe.train(own(batches(1, 5)), drain=False)
    losses += pipe.train(own([]), drain=False)
    losses += pipe.train(own(batches(30, 6)), drain=True)
    scores.append(pipe.evaluate(own(held_out), accuracy))
    rates.append(pipe.learning_rate)
    return Outcome(losses, scores, rates, pipe.state_dict(), pipe.optimizer_state_dict())
