"""What a method is: data from which the program of every stage follows."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import ClassVar, Literal, final

from stalewise.errors import ConfigError
from stalewise.protocol.actions import Kind
from stalewise.protocol.elastic import Elastic
from stalewise.protocol.program import Program, Slot, StageProgram
from stalewise.protocol.staleness import Staleness

__all__ = ["Activations", "Method"]

Activations = Literal["recompute", "stored"]
"""What is kept of a forward until its backward: the input alone, or the graph."""


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
    def is_decided(self) -> bool:
        """Whether the programs are known without a plan."""
        return True

    @property
    def knows_staleness(self) -> bool:
        """Whether `staleness` is that of the run; False where a plan chooses it, and it is provisional."""
        return True

    def with_staleness(self, staleness: Sequence[int]) -> Method:
        """The same with this staleness, where a method leaves it to a plan."""
        raise ConfigError(f"{self.name} leaves no staleness to a plan; its staleness is {self.staleness}.")

    def with_activations(self, activations: Activations | Sequence[Activations]) -> Method:
        """The same with these activations, where a method leaves them to a plan."""
        raise ConfigError(
            f"{self.name} leaves nothing to a plan: what its stages keep of a forward is part of the method."
        )

    @property
    def elastic_rule(self) -> Elastic | None:
        """How stages decide at run time, where staleness is a bound; None where it is fixed."""
        return None

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
            elastic=self.elastic_rule,
        )


def forward_slots(
    stage: int, num_stages: int, *, micro_batch: int | None = None, loads: bool = True
) -> tuple[Slot, ...]:
    """Take a batch (or a part of it), forward it, pass the output on.

    Args:
        stage: k.
        num_stages: K.
        micro_batch: the part, or None for the batch.
        loads: whether the first stage takes the batch from the loader here; it does so once per batch.
    """
    slots: tuple[Slot, ...] = ()
    if stage > 0:
        slots += (Slot(Kind.RECEIVE_ACTIVATION, 0, micro_batch),)
    elif loads:
        slots += (Slot(Kind.LOAD),)
    slots += (Slot(Kind.FORWARD, 0, micro_batch),)
    return slots if stage == num_stages - 1 else (*slots, Slot(Kind.SEND_ACTIVATION, 0, micro_batch))


def backward_slots(
    stage: int, num_stages: int, *, lag: int = 0, recompute: bool = False, micro_batch: int | None = None
) -> tuple[Slot, ...]:
    """Rebuild the graph if there is none, backward, pass the gradient on."""
    slots: tuple[Slot, ...] = ()
    if recompute:
        slots += (Slot(Kind.RECOMPUTE, lag, micro_batch),)
    if stage < num_stages - 1:
        slots += (Slot(Kind.RECEIVE_GRADIENT, lag, micro_batch),)
    slots += (Slot(Kind.BACKWARD, lag, micro_batch),)
    if stage > 0:
        slots += (Slot(Kind.SEND_GRADIENT, lag, micro_batch),)
    return slots


def stale_slots(stage: int, num_stages: int, *, lag: int, recompute: bool) -> tuple[Slot, ...]:
    """The local step of all methods that forward batch n, backward batch n - lag and update."""
    return (
        *forward_slots(stage, num_stages),
        *backward_slots(stage, num_stages, lag=lag, recompute=recompute),
        Slot(Kind.UPDATE, lag),
    )


def with_forward_dependency(slots: tuple[Slot, ...], stage: int, num_stages: int) -> tuple[Slot, ...]:
    """Let batch n + 1 enter the first stage only after the last stage has forwarded batch n (FR, DDG)."""
    if num_stages == 1:
        return slots
    if stage == 0:
        return (Slot(Kind.RECEIVE_TOKEN, 1), *slots)
    if stage == num_stages - 1:
        forward = next(index for index, slot in enumerate(slots) if slot.kind is Kind.FORWARD)
        return (*slots[: forward + 1], Slot(Kind.SEND_TOKEN), *slots[forward + 1 :])
    return slots


def forward_only(num_stages: int) -> Program:
    """The program of an evaluation: batches flow through and nothing comes back."""
    return Program(
        stages=tuple(StageProgram(forward_slots(stage, num_stages)) for stage in range(num_stages)),
        staleness=Staleness((0,) * num_stages),
    )


def check_stages(stages: object) -> None:
    """Refuse a number of stages that is none.

    Raises:
        ConfigError: where it is not an integer of at least 1.
    """
    if isinstance(stages, bool) or not isinstance(stages, int) or stages < 1:
        raise ConfigError(f"stages is {stages!r}; a pipeline has at least 1 stage.")


def check_activations(activations: object) -> None:
    """Refuse anything that is not of `Activations`."""
    if activations not in ("recompute", "stored"):
        raise ConfigError(f'activations is {activations!r}; it must be "recompute" or "stored".')


def staircase(stages: int, step: int) -> Staleness:
    """m_k = step (K-1-k): 1 is the shallowest without a bubble, 2 the shallowest without any lock."""
    return Staleness(tuple(step * (stages - 1 - stage) for stage in range(stages)))
