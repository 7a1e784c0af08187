"""Collectives on plain values and tensors. Values travel as JSON; nothing is unpickled."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from stalewise.runtime.wire import as_bytes

__all__ = ["all_gather_json", "all_gather_tensors", "broadcast_json", "broadcast_tensors"]


def broadcast_json(value: Any, source: int, group: dist.ProcessGroup) -> Any:
    """The value of rank `source`, on every rank; other ranks' values are ignored."""
    is_source = dist.get_rank() == source
    data = torch.frombuffer(bytearray(json.dumps(value if is_source else None).encode()), dtype=torch.uint8)
    size = torch.tensor([data.numel()], dtype=torch.int64)
    dist.broadcast(size, source, group=group)
    if not is_source:
        data = torch.empty(int(size.item()), dtype=torch.uint8)
    dist.broadcast(data, source, group=group)
    return json.loads(bytes(data.numpy().data))


def all_gather_json(value: Any, group: dist.ProcessGroup) -> list[Any]:
    """The values of all ranks, in order, on every rank."""
    return [broadcast_json(value, source, group) for source in range(dist.get_world_size())]


def broadcast_tensors(tensors: Mapping[str, Tensor] | None, source: int, group: dist.ProcessGroup) -> dict[str, Tensor]:
    """Named CPU tensors of rank `source`, on every rank, in their order."""
    own = {name: tensor.contiguous() for name, tensor in (tensors or {}).items()}
    described = [[name, str(value.dtype).removeprefix("torch."), list(value.shape)] for name, value in own.items()]
    received: dict[str, Tensor] = {}
    for name, dtype, shape in broadcast_json(described, source, group):
        value = own[name] if name in own else torch.empty(shape, dtype=getattr(torch, dtype))
        if value.numel():
            dist.broadcast(as_bytes(value), source, group=group)
        received[name] = value
    return received


def all_gather_tensors(own: Mapping[str, Tensor], group: dist.ProcessGroup) -> list[dict[str, Tensor]]:
    """The named CPU tensors of all ranks, in order, on every rank."""
    rank = dist.get_rank()
    return [
        broadcast_tensors(own if source == rank else None, source, group) for source in range(dist.get_world_size())
    ]
