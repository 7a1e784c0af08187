"""What autograd saves for a backward, known for as long as it is saved.

Saved-tensor hooks give autograd a small object in the place of each tensor that a backward formula needs:

    pass ── pack ──► SavedTensor ◄── the graph alone holds it, until its backward has run or the graph is dropped
                          ▲
                          └ weak reference: the log

So the objects that are alive are exactly what the graphs alive keep, and the log keeps nothing alive. Autograd does
not check what a hook unpacks for changes in place; that is made up for here.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from weakref import WeakSet

import torch
from torch import Tensor

from stalewise.errors import ConfigError

__all__ = ["SavedTensor", "SavedTensorLog"]


@dataclass(frozen=True, slots=True, weakref_slot=True, eq=False)
class SavedTensor:
    """A tensor that a backward formula needs.

    Args:
        tensor: detached, so that the graph is not held by what it holds.
        changes: its version counter when it was saved.
    """

    tensor: Tensor
    changes: int

    @classmethod
    def of(cls, tensor: Tensor) -> SavedTensor:
        """Save a tensor."""
        return cls(tensor.detach(), tensor._version)

    def unpack(self) -> Tensor:
        """The tensor, as it was when it was saved.

        Raises:
            ConfigError: where it was changed in place since.
        """
        if self.tensor._version != self.changes:
            raise ConfigError(
                "a tensor that the backward needs was changed in place after the forward; autograd would give a "
                "wrong gradient. Use the out-of-place form of the operation that changes it."
            )
        return self.tensor


class SavedTensorLog:
    """Knows which saved tensors are alive."""

    def __init__(self) -> None:
        self._saved: WeakSet[SavedTensor] = WeakSet()

    def pack(self, tensor: Tensor) -> SavedTensor:
        """Save a tensor and note it."""
        saved = SavedTensor.of(tensor)
        self._saved.add(saved)
        return saved

    def recording(self) -> AbstractContextManager[object]:
        """Inside, what autograd saves is noted; where hooks are nested, only the innermost ones see it."""
        return torch.autograd.graph.saved_tensors_hooks(self.pack, SavedTensor.unpack)

    def alive(self) -> list[Tensor]:
        """What graphs hold now."""
        return [saved.tensor for saved in self._saved]
