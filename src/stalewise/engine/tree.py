"""Nested tuples, lists and dicts of tensors: what a stage takes and gives.

A tree's *structure* is JSON, so that it can be described once to a peer and compared as text:

    tensor -> "tensor"    None -> null    (a, b) -> ["tuple", a, b]    [a, b] -> ["list", a, b]
    {"x": a} -> ["dict", ["x", a]]
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from stalewise.errors import ConfigError

__all__ = ["Structure", "Tree", "flatten", "num_samples", "unflatten"]

Tree = Any
"""A tensor, None, or a tuple, list or dict (with string keys) of trees."""

Structure = Any
"""The shape of a tree as JSON; see above."""


def flatten(tree: Tree, what: str = "a value between stages") -> tuple[list[Tensor], Structure]:
    """The tensors of a tree in order, and its structure.

    Args:
        tree: what to take apart.
        what: names it in an error.

    Raises:
        ConfigError: where the tree holds something else; the message names the place.
    """
    leaves: list[Tensor] = []
    return leaves, _describe(tree, leaves, what, "")


def unflatten(structure: Structure, leaves: Sequence[Tensor]) -> Tree:
    """The tree of this structure with these leaves; the inverse of `flatten`."""
    remaining = iter(leaves)
    return _build(structure, remaining)


def num_samples(tree: Tree) -> int:
    """Samples of a batch: the length of its first tensor, 1 for a scalar."""
    leaves, _ = flatten(tree)
    return int(leaves[0].shape[0]) if leaves and leaves[0].ndim else 1


def _describe(tree: Tree, leaves: list[Tensor], what: str, path: str) -> Structure:
    if isinstance(tree, Tensor):
        leaves.append(tree)
        return "tensor"
    if tree is None:
        return None
    if type(tree) in (tuple, list):
        items = (_describe(item, leaves, what, f"{path}[{index}]") for index, item in enumerate(tree))
        return [type(tree).__name__, *items]
    if isinstance(tree, Mapping) and all(isinstance(key, str) for key in tree):
        return ["dict", *([key, _describe(item, leaves, what, f"{path}[{key!r}]")] for key, item in tree.items())]
    place = f"the entry {path} of {what}" if path else what
    raise ConfigError(
        f"{place} is of type {type(tree).__name__}; stages exchange tensors, None, and tuples, lists and dicts (string "
        "keys) of them. Convert it, or cut the model elsewhere."
    )


def _build(structure: Structure, leaves: Iterator[Tensor]) -> Tree:
    if structure == "tensor":
        return next(leaves)
    if structure is None:
        return None
    kind, *items = structure
    if kind == "dict":
        return {key: _build(item, leaves) for key, item in items}
    built = (_build(item, leaves) for item in items)
    return tuple(built) if kind == "tuple" else list(built)


def to_device(tree: Tree, device: torch.device) -> Tree:
    """The tree with every tensor on `device`."""
    if isinstance(tree, Tensor):
        return tree.to(device, non_blocking=True)
    leaves, structure = flatten(tree)
    return unflatten(structure, [leaf.to(device, non_blocking=True) for leaf in leaves])
