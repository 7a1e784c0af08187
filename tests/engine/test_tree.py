"""Trees flatten to tensors and a JSON structure, and back."""

from __future__ import annotations

import json
from collections import UserDict, namedtuple
from typing import Any

import pytest
import torch
from engine_nets import CPU, assert_same
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from stalewise.engine.tree import flatten, num_samples, to_device, unflatten
from stalewise.errors import ConfigError

LEAVES = st.integers(0, 9).map(lambda size: torch.arange(size)) | st.none()
TREES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=8,
)


def same_types(one: Any, other: Any) -> bool:
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return list(one) == list(other) and all(same_types(one[key], other[key]) for key in one)
    if isinstance(one, tuple | list):
        return len(one) == len(other) and all(map(same_types, one, other))
    return one is other  # the very tensors, and None


@given(TREES)
@settings(deadline=None, derandomize=True)
def test_unflatten_is_the_inverse_of_flatten(tree: Any) -> None:
    leaves, structure = flatten(tree)
    assert all(isinstance(leaf, Tensor) for leaf in leaves)
    assert same_types(unflatten(structure, leaves), tree)
    assert same_types(unflatten(json.loads(json.dumps(structure)), leaves), tree)


def test_structure_as_documented() -> None:
    a, b = torch.ones(1), torch.zeros(2)
    leaves, structure = flatten(({"x": a, "none": None}, [b, a], ()))
    assert [id(leaf) for leaf in leaves] == [id(a), id(b), id(a)]
    assert json.dumps(structure) == json.dumps(
        ["tuple", ["dict", ["x", "tensor"], ["none", None]], ["list", "tensor", "tensor"], ["tuple"]]
    )


def test_other_mappings_become_dicts() -> None:
    leaves, structure = flatten(UserDict(x=torch.ones(1)))
    assert type(unflatten(structure, leaves)) is dict


Point = namedtuple("Point", "x y")


@pytest.mark.parametrize(
    ("tree", "where", "kind"),
    [
        (3, "a value", "int"),
        ((torch.ones(1), {"a": [None, "text"]}), "the entry [1]['a'][1] of a value between stages", "str"),
        ({1: torch.ones(1)}, "a value", "dict"),
        ([Point(1, 2)], "the entry [0] of a value between stages", "Point"),
    ],
)
def test_anything_else_is_refused_with_its_place(tree: Any, where: str, kind: str) -> None:
    with pytest.raises(ConfigError) as caught:
        flatten(tree)
    assert str(caught.value).startswith(f"{where} ")
    assert f"of type {kind};" in str(caught.value)


@pytest.mark.parametrize(
    ("tree", "samples"),
    [
        (torch.ones(5, 2), 5),
        ((None, {"a": torch.ones(3)}, torch.ones(7)), 3),
        (torch.tensor(1.0), 1),
        (torch.ones(0, 2), 0),
        (None, 1),
    ],
)
def test_samples_of_a_batch_are_the_length_of_its_first_tensor(tree: Any, samples: int) -> None:
    assert num_samples(tree) == samples


def test_to_device_keeps_values_and_structure() -> None:
    tree = ({"x": torch.ones(2)}, None)
    moved = to_device(tree, CPU)
    assert_same(moved, tree)
    assert to_device(tree, torch.device("meta"))[0]["x"].device.type == "meta"
    assert to_device(tree[0]["x"], torch.device("meta")).device.type == "meta"
