"""The checks of a run's configuration that concern types: a configuration also comes from a file."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from stalewise.errors import ConfigError
from stalewise.planning import parse_bytes
from stalewise.protocol.staleness import whole_numbers

__all__ = ["check_types"]

MOST_PROCESSES = 4096
"""Threads and loader processes of one stage: more is a slip of the hand."""


def check_types(config: Any) -> None:
    """Refuse fields of a `TrainConfig` that are of another type than theirs, or far out of range.

    Raises:
        ConfigError: naming the first one.
    """
    texts = ("model", "data", "method", "lr_schedule", "engine", "device", "display")
    for name in (*texts, "data_dir"):
        value = getattr(config, name)
        if not isinstance(value, str) and not (name == "data_dir" and value is None):
            raise ConfigError(f"{name} is {value!r}; it must be a text, such as the default of the field.")
    for name in ("nesterov", "channels_last", "augment", "measure_memory"):
        if not isinstance(getattr(config, name), bool):
            raise ConfigError(f"{name} is {getattr(config, name)!r}; it must be true or false.")
    if not isinstance(config.options, Mapping) or not all(isinstance(name, str) for name in config.options):
        raise ConfigError(f"options is {config.options!r}; it must be names with values, such as micro_batches=8.")
    for name in ("queue", "staleness"):
        if getattr(config, name) is not None and (name, config.staleness) != ("staleness", "auto"):
            whole_numbers(name, getattr(config, name))
    if config.staleness == "auto" and config.partition != "profile":
        raise ConfigError(
            'staleness is "auto", which needs a profile, and the cuts are given. Use partition="profile", or give the '
            "staleness, such as 4,2,0."
        )
    if config.memory_limit is not None:
        parse_bytes(config.memory_limit)
    if not 0 <= config.seed < 2**64:
        raise ConfigError(f"seed is {config.seed}; it must be below 2**64.")
    for name in ("threads", "loader_workers"):
        value = getattr(config, name)
        if isinstance(value, int) and value > MOST_PROCESSES:
            raise ConfigError(f"{name} is {value}; at most {MOST_PROCESSES} can be of use.")
    _check_device(config.device)
    _check_milestones(config.lr_milestones)
    _check_partition(config.partition, config.stages)


def _check_device(device: str) -> None:
    """Whether there is such a device is known only where the run takes place."""
    try:
        if device != "auto":
            torch.device(device)
    except RuntimeError:
        raise ConfigError(f'device is {device!r}; it must be "auto", "cpu", "cuda" or one such as "cuda:0".') from None


def _check_milestones(milestones: Any) -> None:
    numbers = isinstance(milestones, tuple) and all(
        isinstance(entry, int | float) and math.isfinite(entry) and 0 < entry < 1 for entry in milestones
    )
    if not numbers:
        raise ConfigError(f"lr_milestones is {milestones!r}; give parts of the run, such as (0.5, 0.75).")


def _check_partition(partition: Any, stages: int) -> None:
    if partition == "profile":
        return
    if not isinstance(partition, tuple):
        raise ConfigError(f'partition is {partition!r}; it must be "profile", or the first layers of stages 1, 2, ..')
    cuts = whole_numbers("partition", partition) if partition else ()
    if list(cuts) != sorted(set(cuts)) or 0 in cuts:
        wanted = sorted(set(cuts) - {0})
        raise ConfigError(f"partition {cuts} must grow, from layer 1 on. Did you mean {','.join(map(str, wanted))}?")
    if cuts and len(cuts) != stages - 1:
        raise ConfigError(
            f"partition {cuts} makes {len(cuts) + 1} stages and there are {stages}; give one cut per stage but the "
            f"first, or use --stages {len(cuts) + 1}."
        )
