"""DNI: Decoupled Neural Interfaces using synthetic gradients.

    stage k < K-1   RECV_A n   F n   SEND_A n   S n   B n   SEND_G n   U   RECV_G n-d   T n-d   RECV_L   SEND_L
    stage K-1       RECV_A n   F n   B n   SEND_G n   SEND_L n   U

A stage does not wait for its gradient: a synthesizer predicts it from the output (S), and is trained (T) when the
gradient of the stage after comes. That one is bootstrapped, computed from the next synthetic gradient, except
from the last stage. It is waited for after a fixed number of steps, d: so the run is deterministic. Losses cannot
ride on gradients that are sent before the loss is known, so they travel alone.

Differs from the paper: the synthesizer predicts the gradient per sample (N times that of the mean loss), and does not
see the label.

Source: Jaderberg et al., arXiv:1608.05343 [S].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from stalewise.errors import ConfigError
from stalewise.methods.method import Method, check_stages, forward_slots, staircase
from stalewise.protocol.actions import Kind
from stalewise.protocol.policy import StagePolicy, SynthesizerPolicy
from stalewise.protocol.program import Slot, StageProgram
from stalewise.protocol.staleness import Staleness

__all__ = ["DNI"]


@dataclass(frozen=True)
class DNI(Method):
    """Synthetic gradients at every cut.

    Args:
        stages: K >= 1.
        target_delay: d, steps after which the true gradient is waited for; from 2 on no stage waits for the next.
        hidden_layers: of a synthesizer.
        synthesizer_lr: of its Adam optimizer.

    Raises:
        ConfigError: where an argument is not valid.
    """

    name: ClassVar[str] = "dni"

    stages: int
    target_delay: int = 2
    hidden_layers: int = 1
    synthesizer_lr: float = 1e-3

    def __post_init__(self) -> None:
        check_stages(self.stages)
        if isinstance(self.target_delay, bool) or not isinstance(self.target_delay, int) or self.target_delay < 1:
            raise ConfigError(f"target_delay is {self.target_delay!r}; it counts steps, so it must be at least 1.")
        SynthesizerPolicy(hidden_layers=self.hidden_layers, lr=self.synthesizer_lr)

    @property
    def staleness(self) -> Staleness:
        """0 everywhere: forward and backward of a batch use the same weights."""
        return staircase(self.stages, 0)

    def stage_program(self, stage: int) -> StageProgram:
        """The local step of stage `stage`."""
        is_last = stage == self.stages - 1
        slots = forward_slots(stage, self.stages)
        slots += (Slot(Kind.BACKWARD),) if is_last else (Slot(Kind.SYNTHESIZE), Slot(Kind.BACKWARD))
        if stage > 0:
            slots += (Slot(Kind.SEND_GRADIENT),)
        slots += (Slot(Kind.UPDATE),)
        loss_lag = self.target_delay * (self.stages - 1 - stage)
        if not is_last:
            slots += (Slot(Kind.RECEIVE_GRADIENT, self.target_delay), Slot(Kind.TRAIN_SYNTHESIZER, self.target_delay))
            slots += (Slot(Kind.RECEIVE_LOSS, loss_lag),)
        if stage > 0:
            slots += (Slot(Kind.SEND_LOSS, loss_lag),)
        policy = StagePolicy()
        if not is_last:
            policy = StagePolicy(
                synthesizer=SynthesizerPolicy(hidden_layers=self.hidden_layers, lr=self.synthesizer_lr)
            )
        return StageProgram(slots, policy)
