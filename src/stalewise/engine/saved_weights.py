"""Which weights the backward of a stored graph uses.

Autograd keeps references to the weights that a backward formula needs, and refuses to run once an optimizer has
changed them in place. Here a graph keeps a *name* for them instead (saved-tensor hooks), which is resolved when the
backward runs:

    stashed   the values at the time of the forward: before an update, the weights that graphs in flight refer to are
              copied once, for all graphs of that version (weight stashing)
    current   the values of the moment, so nothing is copied; PipeMare's correction may be added

Only weights that a formula needs are copied: not biases, for example. Everything else that autograd saves stays as it
is, and is checked for changes in place as autograd itself does.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from stalewise.plan.saved_tensors import SavedTensor, SavedTensorLog
from stalewise.protocol.policy import BackwardWeights

__all__ = ["DiscrepancyCorrection", "SavedWeights"]

Unit = tuple[int, int | None]


@dataclass(frozen=True, slots=True)
class _Weight:
    """A saved weight, or a view of it."""

    index: int
    version: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


class DiscrepancyCorrection:
    """PipeMare's T2: where the weights of the forward are estimated to have been (arXiv:1910.05124).

    After every update delta <- gamma delta + (1 - gamma) (w_new - w_old), from 0, with gamma = D^(1/m); the backward
    then uses w - m delta.

    Args:
        parameters: of the stage.
        staleness: m, updates between forward and backward; at least 1.
        decay: D.
    """

    def __init__(self, parameters: Sequence[Tensor], *, staleness: int, decay: float) -> None:
        self._parameters = parameters
        self._staleness = staleness
        self._gamma = decay ** (1 / staleness)
        self.deltas = [torch.zeros_like(parameter) for parameter in parameters]
        self._before: list[Tensor] = []

    def before_update(self) -> None:
        """Remember the weights."""
        self._before = [parameter.detach().clone() for parameter in self._parameters]

    def after_update(self) -> None:
        """Move the averages."""
        for delta, parameter, before in zip(self.deltas, self._parameters, self._before, strict=True):
            delta.mul_(self._gamma).add_(parameter.detach() - before, alpha=1 - self._gamma)
        self._before = []

    def estimate(self, index: int) -> Tensor:
        """The weights that the backward uses for a parameter."""
        return self._parameters[index].detach() - self._staleness * self.deltas[index]


class SavedWeights:
    """Names the weights in the graphs of one stage.

    Args:
        parameters: of the stage.
        weights: which values a backward uses.
        correction: of current weights, or None.
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        weights: BackwardWeights,
        correction: DiscrepancyCorrection | None = None,
    ) -> None:
        self._parameters = tuple(parameters)
        self._stashes = weights == "stashed"
        self._correction = correction
        self._version = 0
        self._users: dict[int, set[Unit]] = {}
        self._needed: set[int] = set()
        self._stash: dict[int, dict[int, Tensor]] = {}
        self._estimates: dict[int, Tensor] = {}
        self._version_of: dict[Unit, int] = {}

    def recording(self, unit: Unit, log: SavedTensorLog | None = None) -> AbstractContextManager[object]:
        """Inside, the graph of this batch is built.

        Args:
            unit: batch and micro-batch.
            log: is told what is saved besides weights, or None.
        """
        keep = SavedTensor.of if log is None else log.pack
        places = {parameter.untyped_storage().data_ptr(): index for index, parameter in enumerate(self._parameters)}
        version = self._version
        self._users.setdefault(version, set()).add(unit)
        self._version_of[unit] = version

        def pack(tensor: Tensor) -> _Weight | SavedTensor:
            index = places.get(tensor.untyped_storage().data_ptr())
            if index is None or tensor.numel() == 0:
                return keep(tensor)
            self._needed.add(index)
            return _Weight(index, version, tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset()))

        return torch.autograd.graph.saved_tensors_hooks(pack, self._unpack)

    def release(self, unit: Unit) -> None:
        """The graph of this batch is used up."""
        version = self._version_of.pop(unit)
        users = self._users[version]
        users.discard(unit)
        if not users:
            del self._users[version]
            self._stash.pop(version, None)

    def before_update(self) -> None:
        """The weights are about to change."""
        if self._stashes and self._version in self._users:
            self._stash[self._version] = {index: _copy(self._parameters[index]) for index in sorted(self._needed)}
        if self._correction is not None:
            self._correction.before_update()

    def after_update(self) -> None:
        """The weights have changed."""
        self._version += 1
        self._estimates.clear()
        if self._correction is not None:
            self._correction.after_update()

    def stashed(self) -> list[Tensor]:
        """The copies that are held now."""
        return [tensor for copies in self._stash.values() for tensor in copies.values()]

    def held(self) -> list[Tensor]:
        """Everything beside the weights themselves: stashed copies, averages of their change, estimates."""
        deltas = [] if self._correction is None else self._correction.deltas
        return [*self.stashed(), *deltas, *self._estimates.values()]

    def _unpack(self, saved: _Weight | SavedTensor) -> Tensor:
        if isinstance(saved, SavedTensor):
            return saved.unpack()
        if self._stashes:
            stash = self._stash.get(saved.version)
            source = self._parameters[saved.index].detach() if stash is None else stash[saved.index]
        elif self._correction is not None:
            if saved.index not in self._estimates:
                self._estimates[saved.index] = _like(
                    self._parameters[saved.index], self._correction.estimate(saved.index)
                )
            source = self._estimates[saved.index]
        else:
            source = self._parameters[saved.index].detach()
        offset = saved.offset - int(self._parameters[saved.index].storage_offset()) + int(source.storage_offset())
        return torch.as_strided(source, saved.size, saved.stride, offset)


def _copy(parameter: Tensor) -> Tensor:
    """The values with the same strides."""
    return _like(parameter, parameter.detach())


def _like(parameter: Tensor, values: Tensor) -> Tensor:
    """`values` with the strides of a parameter."""
    return torch.empty_strided(parameter.shape, parameter.stride(), dtype=values.dtype, device=values.device).copy_(
        values
    )
