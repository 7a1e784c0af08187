"""The memory behind tensors: storages, each of which counts once however many tensors share it.

Views, detached tensors and in-place results share the storage of what they came from, and a view keeps all of it
alive: a batch that was sliced out of a whole data set counts as the whole data set.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

__all__ = ["Storages", "storages"]

Storages = dict[tuple[str, int], int]
"""(device, address) -> bytes. Empty storages have no address of their own and are left out."""


def storages(tensors: Iterable[Tensor]) -> Storages:
    """The storages behind tensors; of a sparse one, those of its indices and values."""
    found: Storages = {}
    for tensor in tensors:
        for part in _strided_parts(tensor):
            storage = part.untyped_storage()
            if storage.nbytes():
                found[str(storage.device), storage.data_ptr()] = storage.nbytes()
    return found


def _strided_parts(tensor: Tensor) -> Iterator[Tensor]:
    if tensor.layout is torch.strided:
        yield tensor
    elif tensor.layout is torch.sparse_coo:
        yield from (tensor._indices(), tensor._values())
