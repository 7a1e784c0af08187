"""PipeMare: old activations, current weights in the backward, and two corrections.

    RECV_A n   F n   SEND_A n   RECV_G j   B j   SEND_G j   U         j = n - 2(K-1-k)

The graph is stored, but its backward uses the weights of the moment, so nothing is stashed. Against the delay:

    T1   update i uses lr / (m_k + 1)^p, p = 1 - min(i / annealing_updates, 1)
    T2   the backward uses w - m_k delta, delta an exponential moving average of the weights' change per update with
         decay gamma = D^(1 / m_k): an estimate of the weights of the forward

Differs from the paper: it counts delays in updates of N micro-batches, (2(K-k)-1)/N with k from 0; ours is N = 1, so
its delay is m_k + 1, and the distance between forward and backward weights is m_k updates. Weights that a formula does
not save (a product of weights computed in the forward, for example) keep their forward values. T3 (synchronous warm-up
epochs) is left to the user: train with `BP` first.

Source: Yang et al., arXiv:1910.05124 [S for the idea and T1, R for the constants of T2].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from stalewise.methods.method import Method, check_stages, staircase, stale_slots
from stalewise.protocol.policy import DelayCorrection, StagePolicy
from stalewise.protocol.program import StageProgram
from stalewise.protocol.staleness import Staleness

__all__ = ["PipeMare"]


@dataclass(frozen=True)
class PipeMare(Method):
    """Asynchronous pipeline without stashing.

    Args:
        stages: K >= 1.
        annealing_updates: over which T1 fades; 0 turns it off.
        discrepancy_decay: D of T2; None turns it off.

    Raises:
        ConfigError: where an argument is not valid.
    """

    name: ClassVar[str] = "pipemare"

    stages: int
    annealing_updates: int = 1000
    discrepancy_decay: float | None = 0.135

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
        correction = DelayCorrection(annealing_updates=self.annealing_updates, discrepancy_decay=self.discrepancy_decay)
        return StagePolicy(weights="current", correction=correction)
