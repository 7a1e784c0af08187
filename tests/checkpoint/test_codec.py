"""Values survive a checkpoint as they are: types, bits, strides; anything else is refused."""

from __future__ import annotations

import json
import math
from collections import Counter
from typing import Any

import pytest
import torch
from dist_equal import assert_equal
from hypothesis import given, settings
from hypothesis import strategies as st

from stalewise.checkpoint.codec import Packer, unpack
from stalewise.errors import CheckpointError, ConfigError

CPU = torch.device("cpu")
TYPES = [torch.float32, torch.float64, torch.bfloat16, torch.complex64, torch.int64, torch.uint8, torch.bool]


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    """Of any layout: transposed, expanded, with gaps, empty."""
    size = draw(st.lists(st.integers(0, 4), max_size=3))
    tensor = torch.arange(math.prod(size)).reshape(size).to(draw(st.sampled_from(TYPES)))
    if tensor.ndim:
        tensor = tensor.permute(draw(st.permutations(range(tensor.ndim))))
        form = draw(st.sampled_from(["whole", "every second", "expanded", "from the second"]))
        if form == "every second":
            tensor = tensor[::2]
        elif form == "expanded":
            tensor = tensor[None].expand(3, *tensor.shape)
        elif form == "from the second":
            tensor = tensor[1:]
    return tensor


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | tensors(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text(max_size=3) | st.integers() | st.tuples(st.integers(), st.none()), inner, max_size=3)
    ),
    max_leaves=12,
)


def restored(value: Any) -> Any:
    packer = Packer()
    text = json.dumps(packer.pack(value, "it"), allow_nan=False)
    assert all(tensor.ndim == 1 and tensor.is_contiguous() for tensor in packer.tensors.values())
    return unpack(json.loads(text), packer.tensors, device=CPU)


@given(values)
@settings(deadline=None, derandomize=True, max_examples=300)
def test_a_value_comes_back(value: Any) -> None:
    again = restored(value)
    if isinstance(value, float) and math.isnan(value):
        assert math.isnan(again)
    else:
        assert_equal(again, value)


@given(tensors())
@settings(deadline=None, derandomize=True, max_examples=100)
def test_strides_come_back(tensor: torch.Tensor) -> None:
    assert restored(tensor).stride() == tensor.stride()


def test_a_tensor_is_kept_once() -> None:
    packer = Packer()
    tensor = torch.arange(6.0)
    packed = packer.pack([tensor, tensor.detach(), tensor.view(2, 3)], "it")
    assert len(packer.tensors) == 2
    first, second, _ = unpack(packed, packer.tensors, device=CPU)
    assert first.data_ptr() == second.data_ptr()


def test_memory_that_is_used_again_is_another_tensor() -> None:
    """What was packed before may be gone, and its place taken."""
    packer = Packer()
    tensor = torch.zeros(4)
    first = packer.pack(tensor, "it")
    tensor.fill_(1)
    second = packer.pack(tensor, "it")
    assert unpack(first, packer.tensors, device=CPU).tolist() == [0] * 4
    assert unpack(second, packer.tensors, device=CPU).tolist() == [1] * 4


def test_a_counter_stays_one() -> None:
    assert type(restored(Counter({3: 1}))) is Counter


@pytest.mark.parametrize(
    "value",
    [object(), {1, 2}, b"bytes", [lambda: None], torch.ones(2).to_sparse()],
    ids=["object", "set", "bytes", "function", "sparse"],
)
def test_what_cannot_be_kept(value: Any) -> None:
    with pytest.raises(ConfigError, match="a checkpoint cannot hold"):
        Packer().pack({"a": value}, "it")


@pytest.mark.parametrize(
    "packed",
    [
        ["nothing"],
        ["tensor", "t1", "float32", [2], [1], "host"],
        ["tensor", "t0", "float32", [3], [1], "host"],
        ["tensor", "t0", "float32", [2], [-1], "host"],
        ["tensor", "t0", "float32", [1 << 62, 4], [1 << 62, 1], "host"],
        ["tensor", "t0", "load", [2], [1], "host"],
        ["tensor", "t0"],
        ["dict", [1]],
        ["dict", [["list"], 1]],
        {"a": 1},
        [],
    ],
    ids=str,
)
def test_what_no_packer_gives(packed: Any) -> None:
    with pytest.raises(CheckpointError, match="does not describe values"):
        unpack(packed, {"t0": torch.zeros(2)}, device=CPU)
