"""BP: backpropagation over a model that is cut into stages, one batch at a time.

    RECV_A n   F n   SEND_A n   RECV_G n   B n   SEND_G n   U

It keeps forward, backward and update locking, so one stage works and the others wait. Its numbers are those of the
unsplit model, and of DSP with m = (0, .., 0).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from stalewise.methods.method import Method, check_stages, staircase, stale_slots
from stalewise.protocol.policy import StagePolicy
from stalewise.protocol.program import StageProgram
from stalewise.protocol.staleness import Staleness

__all__ = ["BP"]


@dataclass(frozen=True)
class BP(Method):
    """Model-parallel backpropagation.

    Args:
        stages: K >= 1.
        accumulate: batches per update.

    Raises:
        ConfigError: where a number is out of its range.
    """

    name: ClassVar[str] = "bp"

    stages: int
    accumulate: int = 1

    def __post_init__(self) -> None:
        check_stages(self.stages)
        self._policy()

    @property
    def staleness(self) -> Staleness:
        """0 everywhere."""
        return staircase(self.stages, 0)

    def stage_program(self, stage: int) -> StageProgram:
        """The local step of stage `stage`."""
        return StageProgram(stale_slots(stage, self.stages, lag=0, recompute=False), self._policy())

    def _policy(self) -> StagePolicy:
        return StagePolicy(accumulate=self.accumulate)
