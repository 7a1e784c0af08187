"""Bitwise comparison of nested values."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def assert_equal(value: Any, expected: Any, path: str = "value") -> None:
    """Same types, same keys in the same order, and every tensor equal bit by bit."""
    assert type(value) is type(expected), f"{path}: {type(value).__name__}, not {type(expected).__name__}"
    if isinstance(expected, Tensor):
        assert (value.dtype, value.shape) == (expected.dtype, expected.shape), path
        assert bits(value) == bits(expected), f"{path}: {value} != {expected}"
    elif isinstance(expected, dict):
        assert list(value) == list(expected), path
        for key in expected:
            assert_equal(value[key], expected[key], f"{path}[{key!r}]")
    elif isinstance(expected, list | tuple):
        assert len(value) == len(expected), f"{path}: {len(value)} entries, not {len(expected)}"
        for index, (one, other) in enumerate(zip(value, expected, strict=True)):
            assert_equal(one, other, f"{path}[{index}]")
    elif isinstance(expected, float):
        assert value.hex() == expected.hex(), f"{path}: {value!r} != {expected!r}"
    else:
        assert value == expected, f"{path}: {value!r} != {expected!r}"


def bits(tensor: Tensor) -> bytes:
    """The elements in logical order, as bytes: tells -0.0 from 0.0, and equal NaNs are equal."""
    plain = torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor.detach())
    return bytes(plain.reshape(-1).view(torch.uint8).numpy().data)
