"""Trees of tensors: what is mapped, and what is handed on."""

from __future__ import annotations

from collections import OrderedDict
from typing import NamedTuple

import torch
from torch import Tensor

from stalewise.plan.tree import describe, map_tensors, tensors


class Pair(NamedTuple):
    """A tuple with names."""

    left: Tensor
    right: object


def example() -> dict[str, object]:
    return {
        "x": (torch.zeros(2, 3), [torch.ones(4, dtype=torch.int64), None, 7]),
        "pair": Pair(torch.full((), 2.0), "text"),
        "ordered": OrderedDict(y=torch.zeros(0, dtype=torch.bool)),
    }


def test_map_keeps_containers_and_hands_on_the_rest() -> None:
    tree = example()
    mapped = map_tensors(lambda tensor: tensor + 1 if tensor.dtype != torch.bool else tensor, tree)
    assert list(mapped) == ["x", "pair", "ordered"]
    assert torch.equal(mapped["x"][0], torch.ones(2, 3))
    assert type(mapped["x"]) is tuple
    assert type(mapped["x"][1]) is list
    assert torch.equal(mapped["x"][1][0], torch.full((4,), 2))
    assert mapped["x"][1][1:] == [None, 7]
    assert type(mapped["pair"]) is Pair
    assert (mapped["pair"].left.item(), mapped["pair"].right) == (3.0, "text")
    assert type(mapped["ordered"]) is OrderedDict
    assert torch.equal(tree["x"][0], torch.zeros(2, 3))  # type: ignore[index]


def test_tensors_come_in_order() -> None:
    assert [list(tensor.shape) for tensor in tensors(example())] == [[2, 3], [4], [], [0]]
    assert list(tensors(None)) == []


def test_describe() -> None:
    assert describe(example()) == (
        "{'x': (float32[2, 3], [int64[4], NoneType, int]), 'pair': (float32[], str), 'ordered': {'y': bool[0]}}"
    )
