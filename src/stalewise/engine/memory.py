"""How much memory a stage takes, measured: bytes of the storages that are alive between its actions.

Everything that a stage, its interpreter and its queues hold is looked through after an action, and each storage is
counted once, in the first category that it belongs to (`plan.memory` says what they are). What a pass holds only
while it runs is not seen. In the sequential engine a storage that two stages hold, such as an output that is the next
stage's input, counts for both, as it would with a process each.

Measuring changes no number: what autograd saves is noted by hooks that give the same tensors back.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from stalewise.engine.stage import Stage
from stalewise.plan.memory import StageMemory
from stalewise.plan.storage import Storages, storages
from stalewise.plan.tree import tensors

__all__ = ["MemoryMeter", "StageUsage", "resident_bytes"]

MEASURED_AT_FIRST = 8
"""Steps of each cycle that are measured after twice the largest lag: several periods of every program."""
MEASURED_EVERY = 50
"""Steps between measurements after that."""


class MemoryMeter:
    """Measures one stage.

    Args:
        stage: what is measured; from now on it notes what autograd saves.
        max_lag: of the program, in local steps.

    Attributes:
        peak: the account of the moment with the largest total.
        peaks: the largest of each category; not all of one moment.
        now: the latest account.
    """

    def __init__(self, stage: Stage, *, max_lag: int) -> None:
        stage.log_saved_tensors()
        self._stage = stage
        self._first_steps = 2 * max_lag + MEASURED_AT_FIRST
        self._is_due = False
        self.peak = self.peaks = self.now = StageMemory()

    def begin_step(self, step: int) -> None:
        """A local step begins; `step` counts from the last drain."""
        self._is_due = step <= self._first_steps or step % MEASURED_EVERY == 0

    def after_action(self, queues: Iterable[Tensor]) -> None:
        """Measure, where this step is due.

        Args:
            queues: what the stage has received and not used yet, or made and not sent yet.
        """
        if not self._is_due:
            return
        self.now = self._measure(queues)
        self.peak = max(self.peak, self.now, key=lambda memory: memory.total)
        self.peaks = self.peaks.maximum(self.now)

    def _measure(self, queues: Iterable[Tensor]) -> StageMemory:
        stage, synthesizer = self._stage, self._stage.synthesizer
        modules, optimizers = [stage.module], [stage.optimizer]
        if synthesizer is not None and synthesizer.module is not None:
            modules.append(synthesizer.module)
            optimizers.append(synthesizer.optimizer)
        weights = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
        states = [state for optimizer in optimizers if optimizer is not None for state in optimizer.state.values()]
        seen: Storages = {}
        return StageMemory(
            weights=_added(weights, seen),
            stashed=_added(stage.weight_copies(), seen),
            optimizer=_added(tensors(states), seen),
            gradients=_added((weight.grad for weight in weights if weight.grad is not None), seen),
            inputs=_added(stage.stored_tensors(), seen),
            graphs=_added(stage.graph_tensors(), seen),
            queues=_added(queues, seen),
        )


def _added(tensors: Iterable[Tensor], seen: Storages) -> int:
    """Bytes of the storages that were not seen before; they are from now on."""
    new = {key: size for key, size in storages(tensors).items() if key not in seen}
    seen.update(new)
    return sum(new.values())


@dataclass(frozen=True, kw_only=True)
class StageUsage:
    """What a stage has taken so far.

    Args:
        peak: the account of the moment at which it held the most memory; None where that is not measured.
        peaks: the largest of each category; None likewise.
        resident_bytes: the most memory that its process ever had; None where the system does not tell.
        bytes_sent: payload of its messages to other stages.
    """

    peak: StageMemory | None
    peaks: StageMemory | None
    resident_bytes: int | None
    bytes_sent: int

    def as_json(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> StageUsage:
        """The inverse of `as_json`."""
        memories = {name: None if value[name] is None else StageMemory(**value[name]) for name in ("peak", "peaks")}
        return cls(**{**value, **memories})


def resident_bytes() -> int | None:
    """The most resident memory that this process ever had (VmHWM of Linux); None on other systems."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    for line in status.splitlines():
        name, _, value = line.partition(":")
        if name == "VmHWM":
            return int(value.split()[0]) * 1024
    return None
