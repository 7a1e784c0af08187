"""The model of a run, with the weights of its seed and the memory layout of its configuration."""

from __future__ import annotations

import torch
from torch import nn

from stalewise.experiments.config import TrainConfig
from stalewise.models import build_model
from stalewise.plan.partition import check_room

__all__ = ["build_run_model", "check_run_model"]


def check_run_model(config: TrainConfig) -> None:
    """Refuse a built-in model that cannot be, or that is cut too often, before there is a process for each stage.

    A model of the user's own is built and refused where it is trained.

    Raises:
        ConfigError: where there is no such model.
        PlanError: where it has fewer layers than the run has stages.
    """
    if ":" not in config.model:
        with torch.device("meta"):
            check_room(len(build_model(config.model, num_classes=10)), config.stages)


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
