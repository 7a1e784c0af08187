"""A metric over many batches, weighted by samples."""

from __future__ import annotations

import torch
from torch import Tensor

from stalewise.engine.blame import blamed, describe_values
from stalewise.engine.messages import Activation
from stalewise.engine.precision import FULL_PRECISION, Precision
from stalewise.engine.stage import Metric
from stalewise.engine.tree import num_samples, to_device, unflatten
from stalewise.errors import ConfigError

__all__ = ["Score", "mean"]


class Score:
    """Sums a metric; nothing waits for the device until the totals are asked for.

    Args:
        metric: (output, target) -> the batch's mean.
        precision: that it computes in.
    """

    def __init__(self, metric: Metric, precision: Precision = FULL_PRECISION) -> None:
        self._metric = metric
        self._precision = precision
        self._values: list[tuple[Tensor | float, int]] = []

    def add(self, activation: Activation, device: torch.device) -> None:
        """Score one output of the last stage."""
        output = unflatten(activation.structure, activation.values)
        target = to_device(activation.target, device)

        def details() -> str:
            return (
                f"It was given the output {describe_values(output)} and the target {describe_values(target)}. Check "
                "the targets, or use another metric."
            )

        with self._precision.region(device), blamed("metric", details):
            value = self._metric(output, target)
        if (isinstance(value, Tensor) and value.numel() != 1) or not isinstance(value, Tensor | float | int):
            got = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise ConfigError(f"metric returned {got}; it must return the batch's mean as one number.")
        self._values.append((value, num_samples(output if target is None else target)))

    def totals(self) -> tuple[float, int]:
        """The sum of the metric over samples, and the number of samples."""
        return sum(float(value) * count for value, count in self._values), sum(n for _, n in self._values)


def mean(total: float, samples: int) -> float:
    """The mean of a metric from its totals.

    Raises:
        ConfigError: where there was no sample.
    """
    if samples == 0:
        raise ConfigError("evaluate got no batch; a mean needs at least one sample. Is the iterable used up?")
    return total / samples
