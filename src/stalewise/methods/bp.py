"""BP: backpropagation over a model that is cut into stages, one batch at a time.

    RECV_A n   F n   SEND_A n   RECV_G n   B n   SEND_G n   U

It keeps forward, backward and update locking, so one stage works and the others wait. Its numbers are those of the
unsplit model, and of DSP with m = (0, .., 0).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from stalewise.errors import ConfigError
from stalewise.methods.method import Method, backward_slots, forward_slots
from stalewise.protocol.program import StageProgram
from stalewise.protocol.staleness import Staleness

__all__ = ["BP"]


@dataclass(frozen=True)
class BP(Method):
    """Model-parallel backpropagation.

    Args:
        stages: K >= 1.
    """

    name: ClassVar[str] = "bp"

    stages: int

    def __post_init__(self) -> None:
        if isinstance(self.stages, bool) or not isinstance(self.stages, int) or self.stages < 1:
            raise ConfigError(f"stages is {self.stages!r}; a pipeline has at least 1 stage.")

    @property
    def staleness(self) -> Staleness:
        """0 everywhere."""
        return Staleness((0,) * self.stages)

    def stage_program(self, stage: int) -> StageProgram:
        """The local step of stage `stage`."""
        return StageProgram(
            forward_slots(stage, self.stages) + backward_slots(stage, self.stages, lag=0, recompute=False)
        )
