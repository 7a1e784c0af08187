"""FDG: Fully Decoupled neural network learning using delayed Gradients, with gradient shrinking.

    RECV_A n   F n   SEND_A n   RECV_G j   B j   SEND_G j   U         j = n - 2(K-1-k)

No lock is left. The gradient that a stage sends is multiplied by beta, so the stages with the oldest gradients move
least. The source does not say which weights its backward uses; we stash those of the forward. beta = 1 is DSP(minimal)
with stored graphs and stashed weights.

Source: Zhuang et al., arXiv:1906.09108 [S; stashing: ours].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from stalewise.methods.method import Method, check_stages, staircase, stale_slots
from stalewise.protocol.policy import StagePolicy
from stalewise.protocol.program import StageProgram
from stalewise.protocol.staleness import Staleness

__all__ = ["FDG"]


@dataclass(frozen=True)
class FDG(Method):
    """Delayed gradients that shrink at each cut.

    Args:
        stages: K >= 1.
        beta: factor of the gradient at each cut, above 0 and at most 1.

    Raises:
        ConfigError: where an argument is not valid.
    """

    name: ClassVar[str] = "fdg"

    stages: int
    beta: float = 0.5

    def __post_init__(self) -> None:
        check_stages(self.stages)
        self._policy()

    @property
    def staleness(self) -> Staleness:
        """m_k = 2(K-1-k)."""
        return staircase(self.stages, 2)

    def stage_program(self, stage: int) -> StageProgram:
        """The local step of stage `stage`."""
        slots = stale_slots(stage, self.stages, lag=self.staleness[stage], recompute=False)
        return StageProgram(slots, self._policy())

    def _policy(self) -> StagePolicy:
        return StagePolicy(weights="stashed", gradient_scale=self.beta)
