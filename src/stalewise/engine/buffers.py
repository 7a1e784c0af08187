"""Buffers that a graph-less forward, or a batch with NaN in it, must not change.

BatchNorm counts a batch in every pass, and a recomputing stage passes each batch twice. Only the pass that builds
the graph may count it (docs/design.md), so the other one runs on copies. The copies take the buffers' place in
the modules, because a module may update a buffer in place, assign another tensor, or register a new one. They are
fresh ones for each pass, because a stage may also give a buffer away as its output.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

__all__ = ["all_buffers", "finite_buffers", "restore_buffers", "unchanged_buffers"]


def all_buffers(module: nn.Module) -> Iterator[tuple[str, Tensor | None]]:
    """Every place of a buffer, also an empty one."""
    for path, part in module.named_modules():
        for name, buffer in part._buffers.items():
            yield (f"{path}.{name}" if path else name), buffer


def restore_buffers(module: nn.Module, values: Mapping[str, Tensor | None]) -> None:
    """Put values of `all_buffers` back into their places."""
    with torch.no_grad():
        for path, value in values.items():
            parent, _, name = path.rpartition(".")
            part = module.get_submodule(parent)
            own = part._buffers.get(name)
            if own is not None and value is not None and own.shape == value.shape and own.dtype == value.dtype:
                own.copy_(value)
            else:
                part.register_buffer(name, value, persistent=name not in part._non_persistent_buffers_set)


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


@contextmanager
def finite_buffers(module: nn.Module) -> Iterator[None]:
    """After it all buffers are as before where a finite one is no longer finite: running statistics never forget a NaN.

    Constants that are infinite by design, such as masks, do not count.
    """
    own = [(part, name, buffer) for part in module.modules() for name, buffer in part._buffers.items()]
    kept = [(part, name, buffer, None if buffer is None else buffer.detach().clone()) for part, name, buffer in own]
    watched = [(part, name) for part, name, _, copy in kept if _is_finite(copy)]
    yield
    if all(_is_finite(part._buffers.get(name)) for part, name in watched):
        return
    for part, name, buffer, copy in kept:
        part._buffers[name] = buffer
        if buffer is not None and copy is not None:
            # Past autograd: graphs of other batches may have saved the buffer, and do not depend on its values.
            buffer.data.copy_(copy)


def _is_finite(buffer: Tensor | None) -> bool:
    return buffer is not None and buffer.is_floating_point() and bool(torch.isfinite(buffer).all())
