"""FR: Features Replay.

    RECV_A n   F n   SEND_A n   R j   RECV_G j   B j   SEND_G j   U         j = n - (K-1-k)

Stored inputs are replayed with the current weights. Its numbers are those of DSP with m_k = K-1-k and p = 0; what it
has besides is the forward dependency of its paper: batch n+1 enters the first stage only after the last stage has
forwarded batch n (tokens `SEND_T`, `RECV_T`, part of the timing alone).

Source: Huo, Gu, Huang, arXiv:1807.04511 [S].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from stalewise.methods.method import Method, check_stages, staircase, stale_slots, with_forward_dependency
from stalewise.protocol.program import StageProgram
from stalewise.protocol.staleness import Staleness

__all__ = ["FeaturesReplay"]


@dataclass(frozen=True)
class FeaturesReplay(Method):
    """Delayed gradients by recompute, with a forward dependency.

    Args:
        stages: K >= 1.
    """

    name: ClassVar[str] = "fr"

    stages: int

    def __post_init__(self) -> None:
        check_stages(self.stages)

    @property
    def staleness(self) -> Staleness:
        """m_k = K-1-k."""
        return staircase(self.stages, 1)

    def stage_program(self, stage: int) -> StageProgram:
        """The local step of stage `stage`."""
        lag = self.staleness[stage]
        slots = stale_slots(stage, self.stages, lag=lag, recompute=lag > 0)
        return StageProgram(with_forward_dependency(slots, stage, self.stages))
