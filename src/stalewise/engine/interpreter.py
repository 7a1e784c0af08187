"""Executes the actions of one stage.

The one place where an action of a program becomes a pass over layers or a message; both engines use it, and differ
only in the links that they give it and in the order in which they let stages go on.

    LOAD / RECV_A ─► inbox ─► F ─► outbox ─► SEND_A
                              │ stored input
                              ▼
                  R ─► graph ─► B ─► input gradients ─► SEND_G
    RECV_G ─► gradients ────────┘ └► loss
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor

from stalewise.engine.messages import Activation, Gradient
from stalewise.engine.stage import Stage
from stalewise.protocol.actions import COMPUTE, Action, Kind
from stalewise.protocol.program import StageProgram
from stalewise.protocol.trace import Trace

__all__ = ["Interpreter", "Links"]


class Links(Protocol):
    """Where a stage's messages come from and go to. Batches are named by their global index."""

    def load(self, batch: int) -> Activation:
        """The batch that the data loader gave (first stage)."""

    def receive_activation(self, batch: int) -> Activation:
        """The output of the stage before for this batch."""

    def send_activation(self, batch: int, activation: Activation) -> None:
        """Hand an output to the stage after; does not wait for it."""

    def receive_gradient(self, batch: int) -> Gradient:
        """The gradient of this stage's output for this batch."""

    def send_gradient(self, batch: int, gradient: Gradient) -> None:
        """Hand a gradient to the stage before; does not wait for it."""


Unit = tuple[int, int | None]


class Interpreter:
    """One stage, its program, its links, and the record of what it did.

    Args:
        stage: the layers.
        program: its local step.
        links: its messages.
        clock: nanoseconds for the trace.

    Attributes:
        batch: global index of the batch last acted on; -1 before the first.
        action: the kind of the action last begun; None before the first.
        time_ns: time spent so far, by kind of action.
        trace: the record.
    """

    def __init__(
        self,
        stage: Stage,
        program: StageProgram,
        links: Links,
        *,
        clock: Callable[[], int] = time.perf_counter_ns,
    ) -> None:
        self.stage = stage
        self.program = program
        self.trace = Trace(stage.index)
        self._losses: deque[tuple[int, Tensor]] = deque()
        self._links = links
        self._clock = clock
        self._inbox: dict[Unit, Activation] = {}
        self._outbox: dict[Unit, Activation] = {}
        self._gradients: dict[Unit, Gradient] = {}
        self._input_gradients: dict[Unit, Gradient] = {}
        self.batch = -1
        self.action: Kind | None = None
        self.time_ns = dict.fromkeys(Kind, 0)

    @property
    def waiting_ns(self) -> int:
        """Time spent waiting for messages so far."""
        return self.time_ns[Kind.RECEIVE_ACTIVATION] + self.time_ns[Kind.RECEIVE_GRADIENT]

    def execute(self, action: Action, first_batch: int) -> None:
        """Do what the action says.

        Args:
            action: with its batch counted from the start of the cycle.
            first_batch: global index of that start.
        """
        start = self._clock()
        if action.batch is not None:
            self.batch = first_batch + action.batch
        self.action = action.kind
        if action.batch is None:
            self.stage.update()
        else:
            self._act(action.kind, (self.batch, action.micro_batch))
        end = self._clock()
        self.time_ns[action.kind] += end - start
        self.trace.add(action, self.batch, start, end)

    def status(self) -> dict[str, Any]:
        """How the stage is doing, as JSON values; counters grow from the start of the run."""
        return {
            "stage": self.stage.index,
            "batch": self.batch,
            "updates": self.stage.num_updates,
            "time_ns": self._clock(),
            "busy_ns": sum(self.time_ns[kind] for kind in COMPUTE),
            "wait_ns": self.waiting_ns,
        }

    def take_losses(self, batch: int) -> list[Tensor]:
        """The losses not yet taken, of the batches up to global index `batch`, in order."""
        taken = []
        while self._losses and self._losses[0][0] <= batch:
            taken.append(self._losses.popleft()[1])
        return taken

    def _act(self, kind: Kind, unit: Unit) -> None:
        batch = unit[0]
        match kind:
            case Kind.LOAD:
                self._inbox[unit] = self._links.load(batch)
            case Kind.RECEIVE_ACTIVATION:
                self._inbox[unit] = self._links.receive_activation(batch)
            case Kind.FORWARD:
                keep_graph = not self.program.recomputes
                self._outbox[unit] = self.stage.forward(self._inbox.pop(unit), *unit, keep_graph=keep_graph)
            case Kind.SEND_ACTIVATION:
                self._links.send_activation(batch, self._outbox.pop(unit))
            case Kind.RECOMPUTE:
                self.stage.recompute(*unit)
            case Kind.RECEIVE_GRADIENT:
                self._gradients[unit] = self._links.receive_gradient(batch)
            case Kind.BACKWARD:
                self._backward(unit)
            case Kind.SEND_GRADIENT:
                self._links.send_gradient(batch, self._input_gradients.pop(unit))

    def _backward(self, unit: Unit) -> None:
        if self.stage.is_last:
            loss = self._outbox.pop(unit).values[0]
            gradients = self.stage.backward(None, *unit)
        else:
            received = self._gradients.pop(unit)
            loss = received.loss
            gradients = self.stage.backward(received.values, *unit)
        self._losses.append((unit[0], loss))
        if not self.stage.is_first:
            self._input_gradients[unit] = Gradient(gradients, loss)
