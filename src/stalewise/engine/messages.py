"""What travels over the two queues of a link."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from torch import Tensor

from stalewise.engine.tree import Structure, Tree, flatten

__all__ = ["Activation", "Gradient", "message_tensors", "messages_value"]


class Activation(NamedTuple):
    """Stage k -> k+1: the output for one batch, and the batch's target on its way to the last stage."""

    values: list[Tensor]
    structure: Structure
    target: Tree
    micro_batch: int | None = None
    share: float = 1.0
    """Of the batch's samples that this micro-batch holds: the weight of its loss."""


class Gradient(NamedTuple):
    """Stage k+1 -> k: the gradient of each leaf of the activation (None where it has none).

    The batch's loss, a scalar, rides along: so every rank learns every loss without a message of its own.
    """

    values: list[Tensor | None]
    loss: Tensor | None
    micro_batch: int | None = None


def message_tensors(message: Activation | Gradient) -> Iterator[Tensor]:
    """The tensors of a message: values and target, or gradients and loss."""
    rest = flatten(message.target)[0] if isinstance(message, Activation) else [message.loss]
    yield from (tensor for tensor in (*message.values, *rest) if tensor is not None)


def messages_value(
    *,
    activations: Iterable[tuple[int, Activation]],
    gradients: Iterable[tuple[int, Gradient]],
    losses: Iterable[tuple[int, Tensor]],
    tokens: Iterable[tuple[int, None]],
) -> dict[str, Any]:
    """What lies on the links to a stage, as plain values; each kind in the order of sending."""
    return {
        "activations": [[batch, activation._asdict()] for batch, activation in activations],
        "gradients": [[batch, gradient._asdict()] for batch, gradient in gradients],
        "losses": [[batch, loss] for batch, loss in losses],
        "tokens": [batch for batch, _ in tokens],
    }
