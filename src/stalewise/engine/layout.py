"""The memory layout of what crosses a cut.

A dense tensor keeps its strides, whatever their order (channels-last stays channels-last); anything else (expanded,
sliced with gaps) is made contiguous. Both engines do so, because a kernel may round differently for another layout.
"""

from __future__ import annotations

from torch import Tensor

__all__ = ["dense", "is_dense"]


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
