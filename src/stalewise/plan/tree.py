"""Nested tuples, lists and dicts of tensors: what a layer takes and gives.

Anything else in a tree is handed on as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

__all__ = ["describe", "map_tensors", "tensors"]


def map_tensors(function: Callable[[Tensor], Tensor], tree: Any) -> Any:
    """The tree with `function` applied to each of its tensors, in order; containers are new ones."""
    if isinstance(tree, Tensor):
        return function(tree)
    if isinstance(tree, dict):
        return type(tree)((key, map_tensors(function, item)) for key, item in tree.items())
    if isinstance(tree, tuple | list):
        items = (map_tensors(function, item) for item in tree)
        return type(tree)(*items) if hasattr(tree, "_fields") else type(tree)(items)
    return tree


def tensors(tree: Any) -> Iterator[Tensor]:
    """The tensors of a tree, in order."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, dict | tuple | list):
        for item in tree.values() if isinstance(tree, dict) else tree:
            yield from tensors(item)


def describe(tree: Any) -> str:
    """The tree in a few words, such as `(float32[8, 32], {'mask': bool[8]})`."""
    if isinstance(tree, Tensor):
        return f"{str(tree.dtype).removeprefix('torch.')}{list(tree.shape)}"
    if isinstance(tree, dict):
        return "{" + ", ".join(f"{key!r}: {describe(item)}" for key, item in tree.items()) + "}"
    if isinstance(tree, tuple | list):
        left, right = "()" if isinstance(tree, tuple) else "[]"
        return left + ", ".join(map(describe, tree)) + right
    return type(tree).__name__
