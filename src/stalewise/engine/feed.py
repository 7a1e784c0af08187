"""Batches from the user's iterable, as the first stage takes them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from stalewise.engine.layout import check_sendable
from stalewise.engine.messages import Activation
from stalewise.engine.streams import Streams, streams_of
from stalewise.engine.tree import flatten, unflatten
from stalewise.errors import ConfigError

__all__ = ["Feed", "check_batch", "iterate"]


class Feed:
    """Looks one batch ahead, so that the end is known before a step begins.

    Args:
        batches: an iterable of (input, target).
        device: where the inputs go, copied beside other work; targets stay where they are.
        streams: of the device; None: its own.
    """

    def __init__(self, batches: Any, device: torch.device, streams: Streams | None = None) -> None:
        self._batches = iterate(batches)
        self._device = device
        self._streams = streams_of(device) if streams is None else streams
        self._side = self._streams.side()
        self._copied: Any = None
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
        self._streams.wait(self._copied)
        self._streams.keep(batch.values)
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
        # The last stage copies targets in every pass; from memory that is not pinned, a copy waits for the device.
        targets = [self._streams.pinned(_usable(target)) for target in targets]
        values = [_usable(value) for value in values]
        on_a_device = any(value.device.type != "cpu" for value in values)
        made = self._streams.mark() if on_a_device else None
        with self._streams.on(self._side):
            self._streams.wait(made)
            values = [self._streams.pinned(value).to(self._device, non_blocking=True) for value in values]
            self._copied = self._streams.mark()
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
