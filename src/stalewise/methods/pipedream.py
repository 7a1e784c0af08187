"""PipeDream: 1F1B without flush, with weight stashing.

    RECV_A n   F n   SEND_A n   RECV_G j   B j   SEND_G j   U         j = n - (K-1-k)

No lock is left. The backward differentiates exactly what the forward computed: the graph is stored, and the weights of
up to K-1-k versions are stashed. (Vertical sync, an option of the paper that makes all stages use one version for
a batch, is not part of it.)

Source: Harlap et al., arXiv:1806.03377 [S].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from stalewise.methods.method import Method, check_stages, staircase, stale_slots
from stalewise.protocol.policy import StagePolicy
from stalewise.protocol.program import StageProgram
from stalewise.protocol.staleness import Staleness

__all__ = ["PipeDream"]


@dataclass(frozen=True)
class PipeDream(Method):
    """Asynchronous 1F1B with weight stashing.

    Args:
        stages: K >= 1.
    """

    name: ClassVar[str] = "pipedream"

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
        return StageProgram(slots, StagePolicy(weights="stashed"))
