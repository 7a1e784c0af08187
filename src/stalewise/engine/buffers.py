"""Buffers that a graph-less forward must not change.

BatchNorm counts a batch in every pass, and a recomputing stage passes each batch twice. Only the pass that builds
the graph may count it (dsp.md, section 3), so the other one runs on copies. The copies take the buffers' place in
the modules, because a module may update a buffer in place or assign a new one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

__all__ = ["BufferGuard"]


class BufferGuard:
    """Keeps the buffers of a module from a pass that must not change them.

    Args:
        module: its buffers are looked up at every pass; shapes and devices may change in between.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._copies: dict[tuple[int, str], Tensor] = {}

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        """Inside, the module works on copies of its buffers; after it, on the buffers themselves."""
        places = [
            (module, name, buffer)
            for module in self._module.modules()
            for name, buffer in module.named_buffers(recurse=False, remove_duplicate=False)
        ]
        shared: dict[int, Tensor] = {}
        with torch.no_grad():
            for module, name, buffer in places:
                if id(buffer) not in shared:
                    shared[id(buffer)] = self._copy((id(module), name), buffer)
                setattr(module, name, shared[id(buffer)])
        try:
            yield
        finally:
            for module, name, buffer in places:
                setattr(module, name, buffer)

    def _copy(self, place: tuple[int, str], buffer: Tensor) -> Tensor:
        """The values of `buffer`, in memory that is reused from pass to pass."""
        copy = self._copies.get(place)
        if copy is None or copy.shape != buffer.shape or copy.dtype != buffer.dtype or copy.device != buffer.device:
            copy = self._copies[place] = torch.empty_like(buffer)
        return copy.copy_(buffer)
