"""Run a layer without leaving a mark on it.

A forward writes more than its output: BatchNorm counts batches, some layers assign new buffers, an embedding
with a maximum norm rescales its weights, dropout draws random numbers. Whoever only wants to know how long a
layer takes must not change what is trained afterwards. So the layer works on copies of its tensors, on the
device where it is to be timed, and then gets back its own memory: nothing is copied back, so nothing differs.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["preserved_random_state", "scratch_copy"]


@contextmanager
def scratch_copy(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Inside, the module works on copies of its weights and buffers on `device`; after it, on its own.

    Attributes that the module assigns inside (buffers, flags, caches, counters) are as before after it, as is
    what it puts into and takes from dicts and sets. `.grad` is left alone: take gradients with
    `torch.autograd.grad`. The copies take the place of the tensors' memory, not of the tensors, so that
    whatever else refers to a weight (a list of them, a tied layer) sees the copy too.
    """
    attributes = [_Attributes(part) for part in module.modules()]
    own: list[tuple[Tensor, Tensor]] = []
    try:
        for tensor in chain(module.parameters(), module.buffers()):
            data = tensor.data
            own.append((tensor, data))
            tensor.data = data.to(device, copy=True)
        for part in module.modules():
            if isinstance(part, nn.RNNBase):
                part.flatten_parameters()
        yield
    finally:
        for tensor, data in reversed(own):
            tensor.data = data
        for part_attributes in attributes:
            part_attributes.restore()


@contextmanager
def preserved_random_state(device: torch.device) -> Iterator[None]:
    """Leave the global random states of torch (CPU and CUDA), numpy and Python as they were."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    uses_cuda = device.type == "cuda" or torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count()) if uses_cuda else ()):
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)


class _Attributes:
    """The attributes of one module, and the entries of its dicts and sets: its buffers are in one of them."""

    def __init__(self, module: nn.Module) -> None:
        self._current = vars(module)
        self._saved = dict(self._current)
        self._entries: list[tuple[Any, Any]] = [
            (value, value.copy()) for value in self._saved.values() if isinstance(value, dict | set)
        ]

    def restore(self) -> None:
        """Put them back."""
        for container, entries in [(self._current, self._saved), *self._entries]:
            container.clear()
            container.update(entries)
