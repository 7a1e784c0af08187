"""Buffers that a graph-less forward must not change.

BatchNorm counts a batch in every pass, and a recomputing stage passes each batch twice. Only the pass that builds
the graph may count it (dsp.md, section 3), so the other one runs on copies. The copies take the buffers' place in
the modules, because a module may update a buffer in place, assign another tensor, or register a new one. They are
fresh ones for each pass, because a stage may also give a buffer away as its output.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

__all__ = ["unchanged_buffers"]


@contextmanager
def unchanged_buffers(module: nn.Module) -> Iterator[None]:
    """Inside, the module works on copies of its buffers; after it, it has its own again, and no others."""
    own = [(part, dict(part._buffers)) for part in module.modules()]
    copies: dict[int, Tensor] = {}
    for part, buffers in own:
        for name, buffer in buffers.items():
            if buffer is not None:
                if id(buffer) not in copies:
                    copies[id(buffer)] = buffer.detach().clone()
                part._buffers[name] = copies[id(buffer)]
    try:
        yield
    finally:
        for part, buffers in own:
            part._buffers.clear()
            part._buffers.update(buffers)
