"""Batches from the user's iterable, as the first stage takes them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from stalewise.engine.layout import check_sendable
from stalewise.engine.messages import Activation
from stalewise.engine.tree import flatten, unflatten
from stalewise.errors import ConfigError

__all__ = ["Feed", "check_batch", "iterate"]


class Feed:
    """Looks one batch ahead, so that the end is known before a step begins.

    Args:
        batches: an iterable of (input, target).
        device: where the inputs go; targets stay where they are.
    """

    def __init__(self, batches: Any, device: torch.device) -> None:
        self._batches = iterate(batches)
        self._device = device
        self._next: Activation | None = None

    def another(self) -> bool:
        """Whether a batch is left; reads it."""
        if self._next is None:
            for batch in self._batches:
                self._next = self._activation(batch)
                break
        return self._next is not None

    def take(self) -> Activation:
        """The batch that `another` announced."""
        assert self._next is not None, "another() must be true"
        batch, self._next = self._next, None
        return batch

    def _activation(self, batch: Any) -> Activation:
        check_batch(batch)
        values, structure = flatten(batch[0], "the input of a batch")
        if not values:
            raise ConfigError("a batch has no tensor in its input; give at least one.")
        targets, target_structure = flatten(batch[1], "the target of a batch")
        if torch.is_inference_mode_enabled():
            raise ConfigError(
                "batches are read within torch.inference_mode(), where nothing can be trained. Leave it before train "
                "or evaluate; evaluate builds no graphs by itself."
            )
        values = [_usable(value).to(self._device, non_blocking=True) for value in values]
        targets = [_usable(target) for target in targets]
        return Activation(values, structure, unflatten(target_structure, targets))


def _usable(value: Tensor) -> Tensor:
    """The tensor; where it was made in inference mode a copy, through which gradients can flow."""
    return value.clone() if value.is_inference() else value


def iterate(batches: Any) -> Iterator[Any]:
    """An iterator over the user's batches.

    Raises:
        ConfigError: where they are not iterable.
    """
    try:
        return iter(batches)
    except TypeError:
        raise ConfigError(
            f"batches is a {type(batches).__name__}; it must be an iterable of (input, target) pairs, such as a "
            "DataLoader. Only ranks above 0 may pass None."
        ) from None


def check_batch(batch: Any) -> None:
    """Refuse a batch that is not a pair of trees of dense tensors.

    Raises:
        ConfigError: where it is something else.
    """
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        size = f" of {len(batch)}" if isinstance(batch, tuple | list) else ""
        raise ConfigError(
            f"a batch is a {type(batch).__name__}{size}; it must be a pair (input, target). Pack several inputs into a "
            "tuple or dict: ((a, b), target)."
        )
    for part, what in zip(batch, ("the input of a batch", "the target of a batch"), strict=True):
        for value in flatten(part, what)[0]:
            check_sendable(value, what)
