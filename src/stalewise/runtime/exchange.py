"""Collectives on plain values and tensors. Values travel as JSON; nothing is unpickled."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from stalewise.errors import TransportError
from stalewise.runtime.wire import MAX_LEAF_BYTES, as_bytes

__all__ = ["all_gather_json", "all_gather_tensors", "broadcast_json", "broadcast_tensors"]

MAX_JSON_BYTES = 1 << 30


def broadcast_json(value: Any, source: int, group: dist.ProcessGroup) -> Any:
    """The value of rank `source`, on every rank; other ranks' values are ignored.

    Raises:
        TransportError: where what comes is no such value.
    """
    is_source = dist.get_rank() == source
    data = torch.frombuffer(bytearray(json.dumps(value if is_source else None).encode()), dtype=torch.uint8)
    size = torch.tensor([data.numel()], dtype=torch.int64)
    dist.broadcast(size, source, group=group)
    if not 0 < size.item() <= MAX_JSON_BYTES:
        raise TransportError(f"rank {source} announces a value of {size.item()} bytes; it has 1 to {MAX_JSON_BYTES}.")
    if not is_source:
        data = torch.empty(int(size.item()), dtype=torch.uint8)
    dist.broadcast(data, source, group=group)
    try:
        return json.loads(bytes(data.numpy().data))
    except (ValueError, RecursionError) as error:
        raise TransportError(f"rank {source} sent a value that is not JSON ({error}).") from None


def all_gather_json(value: Any, group: dist.ProcessGroup) -> list[Any]:
    """The values of all ranks, in order, on every rank."""
    return [broadcast_json(value, source, group) for source in range(dist.get_world_size())]


def broadcast_tensors(tensors: Mapping[str, Tensor] | None, source: int, group: dist.ProcessGroup) -> dict[str, Tensor]:
    """Named CPU tensors of rank `source`, on every rank, in their order."""
    own = {name: tensor.contiguous() for name, tensor in (tensors or {}).items()}
    described = [[name, str(value.dtype).removeprefix("torch."), list(value.shape)] for name, value in own.items()]
    received: dict[str, Tensor] = {}
    for name, dtype, shape in broadcast_json(described, source, group):
        value = own[name] if name in own else _empty(dtype, shape, source)
        if value.numel():
            dist.broadcast(as_bytes(value), source, group=group)
        received[name] = value
    return received


def _empty(dtype: Any, shape: Any, source: int) -> Tensor:
    kind = getattr(torch, dtype, None) if isinstance(dtype, str) else None
    sizes: list[Any] = shape if isinstance(shape, list) else [None]
    if not isinstance(kind, torch.dtype) or not all(isinstance(size, int) and size >= 0 for size in sizes):
        raise TransportError(f"rank {source} announces a tensor of dtype {dtype!r} and shape {shape!r}.")
    if math.prod(sizes) * kind.itemsize > MAX_LEAF_BYTES:
        raise TransportError(
            f"rank {source} announces a tensor of shape {shape}; at most {MAX_LEAF_BYTES} bytes travel."
        )
    return torch.empty(sizes, dtype=kind)


def all_gather_tensors(own: Mapping[str, Tensor], group: dist.ProcessGroup) -> list[dict[str, Tensor]]:
    """The named CPU tensors of all ranks, in order, on every rank."""
    rank = dist.get_rank()
    return [
        broadcast_tensors(own if source == rank else None, source, group) for source in range(dist.get_world_size())
    ]
