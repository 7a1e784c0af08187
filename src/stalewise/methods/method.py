"""What a method is: data from which the program of every stage follows."""

from __future__ import annotations

import abc
from typing import ClassVar, final

from stalewise.protocol.actions import Kind
from stalewise.protocol.program import Program, Slot, StageProgram
from stalewise.protocol.staleness import Staleness

__all__ = ["Method"]


class Method(abc.ABC):
    """A training method: how many stages, how stale each is, and what a stage does in a local step.

    Methods are values: they hold no torch object, and engines ask them for nothing but their program.
    """

    name: ClassVar[str]

    @property
    @abc.abstractmethod
    def staleness(self) -> Staleness:
        """m_k per stage, in batches."""

    @abc.abstractmethod
    def stage_program(self, stage: int) -> StageProgram:
        """The local step of stage `stage`."""

    @property
    def num_stages(self) -> int:
        """K."""
        return len(self.staleness)

    @final
    def program(self) -> Program:
        """The local steps of all stages."""
        return Program(
            stages=tuple(self.stage_program(stage) for stage in range(self.num_stages)),
            staleness=self.staleness,
        )


def forward_slots(stage: int, num_stages: int) -> tuple[Slot, ...]:
    """Take a batch, forward it, pass the output on."""
    source = Kind.LOAD if stage == 0 else Kind.RECEIVE_ACTIVATION
    slots = (Slot(source), Slot(Kind.FORWARD))
    return slots if stage == num_stages - 1 else (*slots, Slot(Kind.SEND_ACTIVATION))


def backward_slots(stage: int, num_stages: int, *, lag: int, recompute: bool) -> tuple[Slot, ...]:
    """Rebuild the graph if there is none, backward, pass the gradient on, update."""
    slots: tuple[Slot, ...] = ()
    if recompute:
        slots += (Slot(Kind.RECOMPUTE, lag),)
    if stage < num_stages - 1:
        slots += (Slot(Kind.RECEIVE_GRADIENT, lag),)
    slots += (Slot(Kind.BACKWARD, lag),)
    if stage > 0:
        slots += (Slot(Kind.SEND_GRADIENT, lag),)
    return (*slots, Slot(Kind.UPDATE, lag))


def forward_only(num_stages: int) -> Program:
    """The program of an evaluation: batches flow through and nothing comes back."""
    return Program(
        stages=tuple(StageProgram(forward_slots(stage, num_stages)) for stage in range(num_stages)),
        staleness=Staleness((0,) * num_stages),
    )
