"""Dense tensors keep their memory; all others become contiguous."""

from __future__ import annotations

from itertools import product

import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from stalewise.engine.layout import dense, is_dense


@given(st.lists(st.tuples(st.integers(1, 4), st.integers(0, 12)), max_size=4))
@settings(deadline=None, derandomize=True, max_examples=300)
def test_dense_means_that_the_elements_fill_one_block(dims: list[tuple[int, int]]) -> None:
    shape, strides = tuple(size for size, _ in dims), tuple(stride for _, stride in dims)
    offsets = [sum(i * s for i, s in zip(index, strides, strict=True)) for index in product(*map(range, shape))]
    assert is_dense(shape, strides) == (sorted(offsets) == list(range(len(offsets))))


@given(st.permutations(range(4)), st.lists(st.integers(0, 3), min_size=4, max_size=4))
@settings(deadline=None, derandomize=True)
def test_every_permutation_of_a_contiguous_tensor_stays_as_it_is(order: list[int], shape: list[int]) -> None:
    tensor = torch.zeros(shape).permute(order)
    assume(tensor.numel())
    assert is_dense(tuple(tensor.shape), tensor.stride())
    assert dense(tensor) is tensor


def test_what_is_not_dense_becomes_contiguous_with_equal_values() -> None:
    base = torch.arange(24.0).reshape(4, 6)
    for tensor in (base[:, ::2], base[:, 1:4], base[::2], base[:1].expand(4, 6), base.t()[1:5]):
        made = dense(tensor)
        assert made.is_contiguous()
        assert torch.equal(made, tensor)
        assert made.data_ptr() != tensor.data_ptr()


def test_a_dense_part_of_a_larger_memory_stays_as_it_is() -> None:
    part = torch.arange(24.0).reshape(4, 6)[1:3]
    assert dense(part) is part
    assert dense(empty := torch.zeros(3, 0)) is empty
