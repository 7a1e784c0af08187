"""DDG: Decoupled parallel backpropagation with Delayed Gradients.

    RECV_A n   F n   SEND_A n   RECV_G j   B j   SEND_G j   U         j = n - (K-1-k)

The graph of the forward is stored, and the backward differentiates exactly that: with the weights of the forward,
which are stashed. Backward locking is gone; forward locking stays: batch n+1 enters the first stage only after the
last stage has forwarded batch n, which the tokens `SEND_T` and `RECV_T` hold (they are part of the timing alone).

Source: Huo et al., arXiv:1804.10574 [S].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from stalewise.methods.method import Method, check_stages, staircase, stale_slots, with_forward_dependency
from stalewise.protocol.policy import StagePolicy
from stalewise.protocol.program import StageProgram
from stalewise.protocol.staleness import Staleness

__all__ = ["DDG"]


@dataclass(frozen=True)
class DDG(Method):
    """Delayed gradients with stashed weights and a forward dependency.

    Args:
        stages: K >= 1.
    """

    name: ClassVar[str] = "ddg"

    stages: int

    def __post_init__(self) -> None:
        check_stages(self.stages)

    @property
    def staleness(self) -> Staleness:
        """m_k = K-1-k."""
        return staircase(self.stages, 1)

    def stage_program(self, stage: int) -> StageProgram:
        """The local step of stage `stage`."""
        slots = stale_slots(stage, self.stages, lag=self.staleness[stage], recompute=False)
        return StageProgram(with_forward_dependency(slots, stage, self.stages), StagePolicy(weights="stashed"))
