"""Which weights the backward of a stored graph uses.

Autograd keeps references to the weights that a backward formula needs, and refuses to run once an optimizer has
changed them in place. Here a graph keeps a *name* for them instead (saved-tensor hooks), which is resolved when the
backward runs:

    stashed   the values at the time of the forward: before an update, the weights that graphs in flight refer to are
              copied once, for all graphs of that version (weight stashing)
    current   the values of the moment, so nothing is copied; PipeMare's correction may be added

Only weights that a formula needs are copied: not biases, for example. Everything else that autograd saves stays as it
is, and is checked for changes in place as autograd itself does.

A graph can be built again from a checkpoint although its weights are long gone: what it saved is kept in the order in
which it was saved, the forward runs once more on the same input, with whatever weights, and each thing that autograd
saves is replaced by the one that was saved in its place before (`replaying`).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import astuple, dataclass
from typing import Any

import torch
from torch import Tensor

from stalewise.errors import ConfigError
from stalewise.plan.saved_tensors import SavedTensor, SavedTensorLog
from stalewise.protocol.policy import BackwardWeights

__all__ = ["DiscrepancyCorrection", "SavedWeights"]

Unit = tuple[int, int | None]


@dataclass(frozen=True, slots=True, weakref_slot=True, eq=False)
class _Weight:
    """A saved weight, or a view of it."""

    index: int
    version: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


_Saved = _Weight | SavedTensor


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
        self._saved: dict[Unit, list[weakref.ref[_Saved]]] = {}

    def recording(self, unit: Unit, log: SavedTensorLog | None = None) -> AbstractContextManager[object]:
        """Inside, the graph of this batch is built.

        Args:
            unit: batch and micro-batch.
            log: is told what is saved besides weights, or None.
        """
        version = self._version
        self._users.setdefault(version, set()).add(unit)
        self._version_of[unit] = version
        pack = self._packer(version, SavedTensor.of if log is None else log.pack)
        saved = self._saved[unit] = []

        def pack_and_note(tensor: Tensor) -> _Saved:
            packed = pack(tensor)
            saved.append(weakref.ref(packed))
            return packed

        return torch.autograd.graph.saved_tensors_hooks(pack_and_note, self._unpack)

    def replaying(self, unit: Unit, saved: Sequence[Any], log: SavedTensorLog | None = None) -> _Replay:
        """Inside, a graph is built again that `restore` announced, with what it saved before.

        Args:
            unit: batch and micro-batch.
            saved: of `saved_in`, in the same order.
            log: see `recording`.
        """
        keep = SavedTensor.of if log is None else log.pack
        before: list[_Saved | None] = []
        for entry in saved:
            if entry is None or isinstance(entry, Tensor):
                before.append(None if entry is None else keep(entry))
            else:
                index, version, size, stride, offset = entry
                before.append(_Weight(index, version, tuple(size), tuple(stride), offset))
        notes: list[weakref.ref[_Saved]] = []
        self._saved[unit] = notes
        return _Replay(unit, before, self._packer(self._version_of[unit], keep), self._unpack, notes)

    def saved_in(self, unit: Unit) -> list[Tensor | tuple[Any, ...] | None]:
        """What the graph of a batch holds, in the order in which autograd saved it: tensors, or names of weights.

        None where the graph has dropped it again, because no output needs it.
        """
        alive = [reference() for reference in self._saved[unit]]
        return [
            saved.tensor if isinstance(saved, SavedTensor) else None if saved is None else astuple(saved)
            for saved in alive
        ]

    def snapshot(self) -> dict[str, Any]:
        """Everything beside the graphs, by reference."""
        return {
            "version": self._version,
            "version_of": dict(self._version_of),
            "needed": sorted(self._needed),
            "stash": {version: dict(copies) for version, copies in self._stash.items()},
            "deltas": [] if self._correction is None else list(self._correction.deltas),
        }

    def restore(self, snapshot: Mapping[str, Any]) -> None:
        """The inverse of `snapshot`; the graphs are to be built with `replaying`."""
        self._version = snapshot["version"]
        self._version_of = dict(snapshot["version_of"])
        self._users = {}
        for unit, version in self._version_of.items():
            self._users.setdefault(version, set()).add(unit)
        self._needed = set(snapshot["needed"])
        self._stash = {
            version: {index: _like(self._parameters[index], values) for index, values in copies.items()}
            for version, copies in snapshot["stash"].items()
        }
        if self._correction is not None:
            self._correction.deltas = list(snapshot["deltas"])

    def _packer(self, version: int, keep: Callable[[Tensor], SavedTensor]) -> Callable[[Tensor], _Saved]:
        """Puts a name in the place of each weight of this version."""
        places = {parameter.untyped_storage().data_ptr(): index for index, parameter in enumerate(self._parameters)}

        def pack(tensor: Tensor) -> _Saved:
            index = places.get(tensor.untyped_storage().data_ptr())
            if index is None or tensor.numel() == 0:
                return keep(tensor)
            self._needed.add(index)
            return _Weight(index, version, tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset()))

        return pack

    def release(self, unit: Unit) -> None:
        """The graph of this batch is used up."""
        version = self._version_of.pop(unit)
        self._saved.pop(unit, None)
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

    def _unpack(self, saved: _Saved) -> Tensor:
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


class _Replay(AbstractContextManager[None]):
    """Hooks that give autograd, one after another, what an earlier pass over the same layers saved."""

    def __init__(
        self,
        unit: Unit,
        before: Sequence[_Saved | None],
        pack: Callable[[Tensor], _Saved],
        unpack: Callable[[_Saved], Tensor],
        notes: list[weakref.ref[_Saved]],
    ) -> None:
        self._unit = unit
        self._before = before
        self._pack_anew = pack
        self._notes = notes
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, unpack)

    def __enter__(self) -> None:
        self._hooks.__enter__()

    def __exit__(self, *failure: Any) -> None:
        self._hooks.__exit__(*failure)
        if failure[0] is None and len(self._notes) != len(self._before):
            raise self._differs(f"saves {len(self._notes)} tensors for it, and {len(self._before)} are kept")

    def _pack(self, tensor: Tensor) -> _Saved:
        number = len(self._notes)
        packed = self._pack_anew(tensor)
        before = self._before[number] if number < len(self._before) else None
        if before is not None:
            if isinstance(before, SavedTensor) != isinstance(packed, SavedTensor):
                raise self._differs(f"saves something else in place {number}")
            size = before.tensor.shape if isinstance(before, SavedTensor) else before.size
            if tuple(size) != tuple(tensor.shape):
                raise self._differs(f"saves shape {tuple(tensor.shape)} in place {number}, and {tuple(size)} is kept")
            packed = before
        self._notes.append(weakref.ref(packed))
        return packed

    def _differs(self, what: str) -> ConfigError:
        return ConfigError(
            f"the graph of batch {self._unit[0]} cannot be built again: the forward {what}. Layers whose course "
            'depends on values or on the weights cannot be resumed with stored graphs; use activations="recompute", or '
            "save after a drain."
        )


def _copy(parameter: Tensor) -> Tensor:
    """The values with the same strides."""
    return _like(parameter, parameter.detach())


def _like(parameter: Tensor, values: Tensor) -> Tensor:
    """`values` with the strides of a parameter."""
    return torch.empty_strided(parameter.shape, parameter.stride(), dtype=values.dtype, device=values.device).copy_(
        values
    )
