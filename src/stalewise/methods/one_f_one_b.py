"""1F1B with flush (PipeDream-Flush): GPipe's numbers and bubble with less memory.

    stage 0   F n.0  F n.1  F n.2                B n.0  F n.3  B n.1         B n.2  B n.3  U
    stage 1          F n.0  F n.1         B n.0  F n.2  B n.1  F n.3  B n.2  B n.3  U
    stage 2                 F n.0  B n.0  F n.1  B n.1  F n.2  B n.2  F n.3  B n.3  U

A stage forwards K-1-k micro-batches ahead, then alternates, so it keeps at most K-k graphs instead of M.

Source: Narayanan et al., arXiv:2006.09503 [S].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from stalewise.methods.method import Method, backward_slots, check_stages, forward_slots, staircase
from stalewise.protocol.actions import Kind
from stalewise.protocol.policy import StagePolicy
from stalewise.protocol.program import Slot, StageProgram
from stalewise.protocol.staleness import Staleness

__all__ = ["OneFOneB"]


@dataclass(frozen=True)
class OneFOneB(Method):
    """Synchronous pipeline of micro-batches that alternates forward and backward.

    Args:
        stages: K >= 1.
        micro_batches: M, parts of each batch.

    Raises:
        ConfigError: where an argument is not valid.
    """

    name: ClassVar[str] = "1f1b"

    stages: int
    micro_batches: int = 4

    def __post_init__(self) -> None:
        check_stages(self.stages)
        self._policy()

    @property
    def staleness(self) -> Staleness:
        """0 everywhere."""
        return staircase(self.stages, 0)

    def stage_program(self, stage: int) -> StageProgram:
        """The local step of stage `stage`."""
        ahead = min(self.stages - 1 - stage, self.micro_batches)
        slots: tuple[Slot, ...] = ()
        for part in range(self.micro_batches + ahead):
            if part < self.micro_batches:
                slots += forward_slots(stage, self.stages, micro_batch=self._part(part), loads=part == 0)
            if part >= ahead:
                slots += backward_slots(stage, self.stages, micro_batch=self._part(part - ahead))
        return StageProgram((*slots, Slot(Kind.UPDATE)), self._policy())

    def _part(self, index: int) -> int | None:
        return None if self.micro_batches == 1 else index

    def _policy(self) -> StagePolicy:
        return StagePolicy(micro_batches=self.micro_batches)
