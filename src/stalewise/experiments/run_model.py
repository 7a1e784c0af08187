"""The model of a run, with the weights of its seed and the memory layout of its configuration."""

from __future__ import annotations

import torch
from torch import nn

from stalewise.experiments.config import TrainConfig
from stalewise.models import build_model

__all__ = ["build_run_model"]


def build_run_model(config: TrainConfig, *, num_classes: int) -> nn.Sequential | list[nn.Module]:
    """The unsplit model on the CPU.

    With `channels_last` the weights of convolutions lie so in memory; their outputs then do, too.
    """
    torch.manual_seed(config.seed)
    model = build_model(config.model, num_classes=num_classes)
    if config.channels_last:
        for layer in model:
            layer.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model
