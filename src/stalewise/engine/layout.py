"""The memory layout of what crosses a cut.

A dense tensor keeps its strides, whatever their order (channels-last stays channels-last); anything else (expanded,
sliced with gaps) is made contiguous. Both engines do so, because a kernel may round differently for another layout.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stalewise.errors import ConfigError

__all__ = ["check_sendable", "dense", "is_dense"]


def is_dense(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Whether elements fill one block of memory without gaps or overlaps."""
    expected = 1
    for stride, size in sorted(zip(strides, shape, strict=True)):
        if size == 1:
            continue
        if size == 0:
            return True
        if stride != expected:
            return False
        expected *= size
    return True


def dense(tensor: Tensor) -> Tensor:
    """`tensor` itself where it is dense, else a contiguous copy."""
    if tensor.is_contiguous() or is_dense(tuple(tensor.shape), tensor.stride()):
        return tensor
    return tensor.contiguous()


def check_sendable(value: Tensor, what: str) -> None:
    """Refuse a tensor that has no values, or no strides.

    Raises:
        ConfigError: naming it.
    """
    if value.layout is torch.strided and not (value.is_meta or value.is_nested or value.is_quantized):
        return
    kind = "meta" if value.is_meta else "nested" if value.is_nested else str(value.layout).removeprefix("torch.")
    raise ConfigError(
        f"{what} has a {'quantized' if value.is_quantized else kind} tensor; stages exchange dense tensors with "
        "values. Convert it, for example with .to_dense() or .dequantize()."
    )
