"""What the experiments of `paper` share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

__all__ = [
    "ALL_METHODS",
    "FULL_WORDS",
    "ONE_PROCESS",
    "PIPELINES",
    "SHORT",
    "SHORT_WORDS",
    "SMOKE",
    "SMOKE_WORDS",
    "dsp_rows",
    "small_cuts",
    "staleness_rows",
]

SMOKE: Mapping[str, Any] = {
    "model": "resnet8",
    "data": "digits",
    "train_limit": 128,
    "test_limit": 64,
    "batch_size": 32,
    "epochs": 2,
    "lr": 0.05,
    "partition": (2, 3),
    "threads": 1,
}
SHORT: Mapping[str, Any] = {
    "model": "resnet20",
    "data": "cifar10",
    "batch_size": 128,
    "momentum": 0.9,
    "weight_decay": 5e-4,
    "lr": 0.1,
    "lr_schedule": "onecycle",
}
ONE_PROCESS: Mapping[str, Any] = {"engine": "sequential"}
SMOKE_WORDS = "Everything: a tiny network on a few handwritten digits. The numbers say nothing about the methods."
SHORT_WORDS = (
    "CIFAR-10 from its JPEG copy, one-cycle learning rate with a peak of 0.1 in place of 0.01 with two drops over 300 "
    "epochs, momentum 0.9 without Nesterov"
)
FULL_WORDS = "None known, beyond what the recipe of each part states; the papers do not tell everything."
PIPELINES = ("bp", "fr", "ddg", "dni", "gpipe", "dsp")
ALL_METHODS = ("bp", "gpipe", "1f1b", "dni", "ddg", "fr", "pipedream", "pipemare", "fdg", "dsp")


def small_cuts(stages: int) -> tuple[int, ...]:
    """Cuts of the 5 entries of ResNet-8."""
    return tuple(range(5 - stages + 1, 5))


def staleness_rows(depths: Sequence[Sequence[int]]) -> dict[str, Mapping[str, Any]]:
    """Options by the name of a row for each depth, as in m4.2.0."""
    return {f"m{'.'.join(map(str, depth))}": {"staleness": tuple(depth)} for depth in depths}


def dsp_rows(rows: Mapping[str, Any]) -> tuple[str, ...]:
    """The methods of such rows."""
    return tuple(f"{name}=dsp" for name in rows)
