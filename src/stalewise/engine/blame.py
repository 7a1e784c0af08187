"""Errors of torch's operations that a batch led to, as sentences that name stage, batch and tensors.

Only what torch itself refuses is told anew: an error that the user's own code raises is left as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stalewise.engine.tree import flatten
from stalewise.errors import ConfigError, StalewiseError

__all__ = ["blamed", "describe_values"]

_TORCH = str(Path(torch.__file__).parent)
_REFUSALS = (RuntimeError, ValueError, TypeError, IndexError, AttributeError)


@contextmanager
def blamed(what: str, details: Callable[[], str]) -> Iterator[None]:
    """Turn an error that torch raises inside into a `ConfigError`.

    Args:
        what: failed, such as "the forward of batch 7 on stage 1".
        details: what it was given, and what to do; called only then.
    """
    try:
        yield
    except StalewiseError:
        raise
    except _REFUSALS as error:
        if isinstance(error, torch.OutOfMemoryError) or not _raised_by_torch(error):
            raise
        raise ConfigError(f"{what} failed: {type(error).__name__}: {error}\n{details()}") from error


def describe_values(tree: Any) -> str:
    """Types, shapes and, of whole numbers, the range of the tensors in a tree."""
    try:
        leaves, _ = flatten(tree)
    except ConfigError:
        return f"a {type(tree).__name__}"
    return ", ".join(_describe(leaf) for leaf in leaves) or "nothing"


def _describe(value: Tensor) -> str:
    text = f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    if value.numel() and not value.is_floating_point() and not value.is_complex() and value.dtype is not torch.bool:
        text += f" from {int(value.min())} to {int(value.max())}"
    return text


def _raised_by_torch(error: BaseException) -> bool:
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    # What works in place is often a line of the user's, and refused by autograd.
    in_place = "in-place" in str(error) or "inplace" in str(error)
    return trace is not None and (in_place or trace.tb_frame.f_code.co_filename.startswith(_TORCH))
