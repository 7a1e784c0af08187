"""What the experiments of `paper` share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

__all__ = [
    "ALL_METHODS",
    "FULL_WORDS",
    "LEARNING",
    "LEARNING_WORDS",
    "ONE_PROCESS",
    "PIPELINES",
    "RESNET20_CUTS",
    "SHORT",
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
    "batch_size": 64,
    "momentum": 0.9,
    "weight_decay": 5e-4,
    "lr": 0.1,
    "lr_schedule": "onecycle",
}
ONE_PROCESS: Mapping[str, Any] = {"engine": "sequential"}
RESNET20_CUTS: Mapping[int, tuple[int, ...]] = {
    2: (5,),
    3: (3, 6),
    4: (2, 5, 8),
    6: (1, 3, 5, 7, 9),
    8: (1, 2, 4, 5, 6, 8, 9),
    10: (1, 2, 3, 4, 5, 6, 7, 8, 9),
}
"""Of its 11 entries, by the number of stages. Given, not measured, so that equal runs are made once."""
LEARNING: Mapping[str, Any] = {
    **SHORT,
    **ONE_PROCESS,
    "threads": 1,
    "stages": 3,
    "partition": RESNET20_CUTS[3],
    "epochs": 3,
    "gradient_difference_every": 40,
}
"""What short runs have in common that are asked for what is learned; each is made once for all experiments."""
LEARNING_WORDS = (
    "ResNet-20 in place of deeper networks, 3 epochs of the JPEG copy of CIFAR-10, batches of 64, one-cycle learning "
    "rate with a peak of 0.1, momentum 0.9 without Nesterov, in place of 300 epochs with batches of 128 and a rate of "
    "0.01 with two drops. All stages in one process with one thread, which gives the same numbers as one process each."
)
SMOKE_WORDS = "Everything: a tiny network on a few handwritten digits. The numbers say nothing about the methods."
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
