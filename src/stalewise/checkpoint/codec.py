"""Nested plain values with tensors in them, as JSON and one-dimensional tensors.

    None, bool, int, str, finite float   themselves
    other float                          ["float", "inf"]
    list, tuple                          ["list", a, b], ["tuple", a, b]
    dict, Counter                        ["dict", [key, value], ..], ["counter", ..]
    tensor                               ["tensor", number, dtype, size, stride, host or device]

A tensor is kept with its strides, because a kernel may round differently for another layout: as the elements from its
first to its last in memory. Tensors that show the same elements are kept once.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from stalewise.errors import CheckpointError, ConfigError

__all__ = ["Packer", "contiguous_copy", "unpack"]

_NATIVE = frozenset(
    {
        torch.float64,
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
        torch.uint8,
        torch.bool,
    }
)
"""What safetensors can name; the rest is kept as bytes."""


class Packer:
    """Copies values into host memory.

    Attributes:
        tensors: the copies so far, by name; one-dimensional, on the CPU.
    """

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._names: dict[tuple[Any, ...], str] = {}

    def pack(self, value: Any, what: str) -> Any:
        """The value as JSON; its tensors are copied now.

        Args:
            value: of the types above.
            what: names it in an error.

        Raises:
            ConfigError: where it holds something else.
        """
        packed = self._pack(value, what)
        self._names.clear()  # from now on the memory of what was packed may become another tensor's
        return packed

    def _pack(self, value: Any, path: str) -> Any:
        if value is None or isinstance(value, bool | int | str):
            return value
        if isinstance(value, float):
            return value if math.isfinite(value) else ["float", repr(value)]
        if isinstance(value, Tensor):
            return self._pack_tensor(value, path)
        if type(value) in (list, tuple):
            return [type(value).__name__, *(self._pack(entry, f"{path}[{i}]") for i, entry in enumerate(value))]
        if isinstance(value, Mapping):
            kind = "counter" if isinstance(value, Counter) else "dict"
            pairs = ([self._pack(key, path), self._pack(entry, f"{path}[{key!r}]")] for key, entry in value.items())
            return [kind, *pairs]
        raise ConfigError(
            f"{path} is of type {type(value).__name__}, which a checkpoint cannot hold; it holds tensors, numbers, "
            "text, and lists, tuples and dicts of them."
        )

    def _pack_tensor(self, value: Tensor, path: str) -> list[Any]:
        if value.layout is not torch.strided or value.is_quantized:
            raise ConfigError(
                f"{path} is a tensor of layout {value.layout}, which a checkpoint cannot hold; make it dense."
            )
        value = value.detach().resolve_conj().resolve_neg()
        size, stride = list(value.shape), list(value.stride())
        key = (value.device, value.data_ptr(), value.dtype, *size, *stride)
        name = self._names.get(key) if value.numel() else None
        if name is None:
            name = f"t{len(self.tensors)}"
            self._names[key] = name
            flat = torch.as_strided(value, (_span(size, stride),), (1,)).to("cpu", copy=True)
            self.tensors[name] = flat if flat.dtype in _NATIVE else flat.view(torch.uint8)
        dtype = str(value.dtype).removeprefix("torch.")
        return ["tensor", name, dtype, size, stride, "host" if value.device.type == "cpu" else "device"]


def unpack(packed: Any, tensors: Mapping[str, Tensor], *, device: torch.device) -> Any:
    """The value again, with tensors of its own.

    Args:
        packed: of `Packer.pack`.
        tensors: of the packer.
        device: for tensors that were not on the CPU.

    Raises:
        CheckpointError: where that is not what a packer gives.
    """
    flats: dict[tuple[str, bool], Tensor] = {}

    def flat(name: str, on_device: bool) -> Tensor:
        # A copy: memory of its own, aligned as torch aligns it.
        key = (name, on_device)
        if key not in flats:
            flats[key] = tensors[name].to(device if on_device else "cpu", copy=True)
        return flats[key]

    try:
        return _unpack(packed, flat)
    except (KeyError, IndexError, TypeError, ValueError, RuntimeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"it does not describe values ({type(error).__name__}: {error}).") from None


def contiguous_copy(value: Tensor) -> Tensor:
    """A copy on the CPU in logical order, which safetensors can name."""
    copy = torch.empty(value.shape, dtype=value.dtype).copy_(value.detach())
    if copy.dtype not in _NATIVE:
        raise ConfigError(f"a parameter or buffer is of dtype {value.dtype}, which a checkpoint cannot hold.")
    return copy


def _unpack(packed: Any, flat: Callable[[str, bool], Tensor]) -> Any:
    if not isinstance(packed, list):
        if isinstance(packed, dict):
            raise ValueError("an object where a value is due")
        return packed
    kind, *entries = packed
    match kind:
        case "list":
            return [_unpack(entry, flat) for entry in entries]
        case "tuple":
            return tuple(_unpack(entry, flat) for entry in entries)
        case "dict":
            return {_unpack(key, flat): _unpack(value, flat) for key, value in entries}
        case "counter":
            return Counter({_unpack(key, flat): _unpack(value, flat) for key, value in entries})
        case "float":
            return float(entries[0])
        case "tensor":
            name, dtype, size, stride, place = entries
            values = flat(name, place == "device")
            kind_of = getattr(torch, dtype)
            if not isinstance(kind_of, torch.dtype) or len(size) != len(stride):
                raise ValueError(f"a tensor of dtype {dtype}, size {size} and stride {stride}")
            typed = values if values.dtype == kind_of else values.view(kind_of)
            if typed.numel() < _span(size, stride):
                raise ValueError(f"a tensor of size {size} and stride {stride} in {typed.numel()} elements")
            return torch.as_strided(typed, size, stride)
    raise ValueError(f"a value of kind {kind!r}")


def _span(size: Sequence[int], stride: Sequence[int]) -> int:
    """Elements from the first to the last of a tensor in memory."""
    if 0 in size:
        return 0
    return 1 + sum((length - 1) * step for length, step in zip(size, stride, strict=True))
