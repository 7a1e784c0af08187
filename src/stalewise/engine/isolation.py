"""The input of a stage, kept as it is whatever its first layer does to what it gets."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from stalewise.errors import ConfigError

__all__ = ["Isolation", "has_gradient"]


def has_gradient(tensor: Tensor) -> bool:
    """Whether gradients flow to tensors of this type."""
    return tensor.is_floating_point() or tensor.is_complex()


class Isolation:
    """Gives layers their input so that the stored one stays as it is.

    A first layer that works in place (an in-place ReLU) would change what the recompute starts from. The first pass
    runs on copies and sees from the tensors' version counters whether that happens; only then later passes copy too.

    Attributes:
        copies: whether passes copy; None before the first.
    """

    def __init__(self, stage: int) -> None:
        self._stage = stage
        self.copies: bool | None = None
        self._versions: list[int] = []

    def inputs(self, stored: Sequence[Tensor], *, with_graph: bool) -> tuple[list[Tensor], list[Tensor]]:
        """The leaves that collect gradients, and what the layers get."""
        leaves = list(stored)
        if with_graph:
            leaves = [leaf.detach().requires_grad_(self._stage > 0 and has_gradient(leaf)) for leaf in stored]
        given = leaves if self.copies is False else [leaf.clone() for leaf in leaves]
        self._versions = [value._version for value in given]
        return leaves, given

    def check(self, given: Sequence[Tensor], batch: int) -> None:
        """Learn from the first pass, and hold later ones to it."""
        changed = any(value._version != version for value, version in zip(given, self._versions, strict=True))
        if self.copies is None:
            self.copies = changed
        elif changed and not self.copies:
            raise ConfigError(
                f"stage {self._stage} changed its input in place in batch {batch}, but not in its first batch; the "
                "stored input of this batch is lost. Make the first layer always or never work in place."
            )
