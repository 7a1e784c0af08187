"""How long a stage computed and waited in each of its last steps."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping

from stalewise.protocol.actions import COMPUTE, Kind
from stalewise.protocol.bottleneck import StepRecord

__all__ = ["StepClock"]

_KEPT = 64
_INPUTS = (Kind.LOAD, Kind.RECEIVE_ACTIVATION, Kind.RECEIVE_TOKEN)
_OUTPUTS = (Kind.RECEIVE_GRADIENT, Kind.RECEIVE_LOSS)


class StepClock:
    """Told of every update.

    Args:
        is_first: whether the stage loads batches.

    """

    def __init__(self, *, is_first: bool) -> None:
        self._steps: deque[StepRecord] = deque(maxlen=_KEPT)
        self._is_first = is_first
        self._before: dict[Kind, int] = dict.fromkeys(Kind, 0)
        self._end_ns: int | None = None

    def records(self) -> list[list[int]]:
        """The last steps, as JSON values; may be called from another thread."""
        return [list(step) for step in self._steps.copy()]

    def updated(self, update: int, time_ns: Mapping[Kind, int], end_ns: int) -> None:
        """An update has ended.

        Args:
            update: its local index.
            time_ns: spent since the run began, by kind of action.
            end_ns: now.
        """
        spent = {kind: time_ns[kind] - before for kind, before in self._before.items()}
        self._before.update(time_ns)
        if self._end_ns is not None:
            compute = sum(spent[kind] for kind in COMPUTE)
            # A stage waits for its next input between actions, too: it must know whether there is one at all.
            between = end_ns - self._end_ns - sum(spent.values())
            inputs = sum(spent[kind] for kind in _INPUTS) + max(0, between)
            outputs = sum(spent[kind] for kind in _OUTPUTS)
            load, activation = (inputs, 0) if self._is_first else (0, inputs)
            self._steps.append(StepRecord(update, compute, load, activation, outputs, end_ns))
        self._end_ns = end_ns
