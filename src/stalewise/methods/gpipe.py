"""GPipe: micro-batches through the stages, then their gradients back, then one update (a flush).

    stage 0   F n.0  F n.1  F n.2  F n.3                       B n.0  B n.1  B n.2  B n.3  U
    stage 1          F n.0  F n.1  F n.2  F n.3         B n.0  B n.1  B n.2  B n.3  U
    stage 2                 F n.0  F n.1  F n.2  F n.3  B n.0  B n.1  B n.2  B n.3  U

The update is that of the whole batch, so no weight is ever stale. The price is the bubble, (K-1)/(M+K-1) of the time.
With recompute (the paper's choice) a stage keeps M inputs instead of M graphs and forwards each micro-batch twice.
BatchNorm sees micro-batches. Micro-batches are backwarded in the order of their forwards; the paper does not say.

Source: Huang et al., arXiv:1811.06965 [S].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from stalewise.methods.method import (
    Activations,
    Method,
    backward_slots,
    check_activations,
    check_stages,
    forward_slots,
    staircase,
)
from stalewise.protocol.actions import Kind
from stalewise.protocol.policy import StagePolicy
from stalewise.protocol.program import Slot, StageProgram
from stalewise.protocol.staleness import Staleness

__all__ = ["GPipe"]


@dataclass(frozen=True)
class GPipe(Method):
    """Synchronous pipeline of micro-batches.

    Args:
        stages: K >= 1.
        micro_batches: M, parts of each batch.
        activations: "recompute" or "stored".

    Raises:
        ConfigError: where an argument is not valid.
    """

    name: ClassVar[str] = "gpipe"

    stages: int
    micro_batches: int = 4
    activations: Activations = "recompute"

    def __post_init__(self) -> None:
        check_stages(self.stages)
        check_activations(self.activations)
        self._policy()

    @property
    def staleness(self) -> Staleness:
        """0 everywhere."""
        return staircase(self.stages, 0)

    def stage_program(self, stage: int) -> StageProgram:
        """The local step of stage `stage`."""
        recompute = self.activations == "recompute"
        slots: tuple[Slot, ...] = ()
        for part in range(self.micro_batches):
            slots += forward_slots(stage, self.stages, micro_batch=self._part(part), loads=part == 0)
        for part in range(self.micro_batches):
            slots += backward_slots(stage, self.stages, recompute=recompute, micro_batch=self._part(part))
        return StageProgram((*slots, Slot(Kind.UPDATE)), self._policy())

    def _part(self, index: int) -> int | None:
        return None if self.micro_batches == 1 else index

    def _policy(self) -> StagePolicy:
        return StagePolicy(micro_batches=self.micro_batches)
