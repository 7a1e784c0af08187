"""The optimizer and the learning-rate schedule of a run, as the recipes that `Pipeline` takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from stalewise.experiments.config import TrainConfig

__all__ = ["learning_rates", "optimizer_recipe", "schedule_recipe"]


def optimizer_recipe(config: TrainConfig) -> Callable[[Any], Optimizer]:
    """SGD with the run's momentum and weight decay."""
    return lambda params: torch.optim.SGD(
        params,
        lr=config.lr,
        momentum=config.momentum,
        nesterov=config.nesterov,
        weight_decay=config.weight_decay,
    )


def schedule_recipe(config: TrainConfig, *, num_updates: int) -> Callable[[Optimizer], LRScheduler] | None:
    """The schedule over a run of `num_updates` updates; None for a constant rate."""
    schedulers = torch.optim.lr_scheduler
    match config.lr_schedule:
        case "onecycle":
            return lambda optimizer: schedulers.OneCycleLR(
                optimizer, max_lr=config.lr, total_steps=num_updates + 1, cycle_momentum=False
            )
        case "cosine":
            return lambda optimizer: schedulers.CosineAnnealingLR(optimizer, T_max=num_updates)
        case "step":
            milestones = [round(fraction * num_updates) for fraction in config.lr_milestones]
            return lambda optimizer: schedulers.MultiStepLR(optimizer, milestones=milestones, gamma=0.1)
    return None


def learning_rates(config: TrainConfig, *, num_updates: int) -> list[float]:
    """The rate of every update of a run."""
    optimizer = torch.optim.SGD([torch.zeros(())], lr=config.lr)
    recipe = schedule_recipe(config, num_updates=num_updates)
    scheduler = recipe(optimizer) if recipe is not None else None
    rates = []
    for _ in range(num_updates):
        rates.append(float(optimizer.param_groups[0]["lr"]))
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
    return rates
