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

import itertools
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from stalewise.engine.brake import Brake
from stalewise.engine.gradient_probe import GradientProbe
from stalewise.engine.memory import MemoryMeter, StageUsage, resident_bytes
from stalewise.engine.messages import Activation, Gradient, message_tensors
from stalewise.engine.nonfinite import GO_ON, LossGuard
from stalewise.engine.stage import Stage
from stalewise.engine.step_clock import StepClock
from stalewise.engine.trace_file import TraceFile
from stalewise.engine.tree import flatten, unflatten
from stalewise.errors import ConfigError
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

    def receive_loss(self, batch: int) -> Tensor:
        """The loss of this batch, from the stage after, where no gradient carries it."""

    def send_loss(self, batch: int, loss: Tensor) -> None:
        """Hand a loss to the stage before; does not wait for it."""

    def receive_token(self, batch: int) -> None:
        """Wait until the last stage has forwarded this batch (first stage)."""

    def send_token(self, batch: int) -> None:
        """Tell the first stage that this batch was forwarded (last stage)."""


Unit = tuple[int, int | None]


class Interpreter:
    """One stage, its program, its links, and the record of what it did.

    Args:
        stage: the layers.
        program: its local step.
        links: its messages.
        clock: nanoseconds for the trace.
        probe: compares this stage's gradients with those of backpropagation, or None.
        meter: measures this stage's memory after every action, or None.
        waiting: the tensors in the queues of the links, for the meter.
        brake: makes slow steps take longer, or None.
        guard: what becomes of batches whose loss is not finite.
        tell: called with the kind and the global batch of each action that begins.

    Attributes:
        batch: global index of the batch last acted on; -1 before the first.
        action: the kind of the action last begun; None before the first.
        time_ns: time spent so far, by kind of action.
        trace: the record.
        bytes_sent: payload handed to the links in training, headers not counted.
    """

    def __init__(
        self,
        stage: Stage,
        program: StageProgram,
        links: Links,
        *,
        clock: Callable[[], int] = time.perf_counter_ns,
        probe: GradientProbe | None = None,
        meter: MemoryMeter | None = None,
        waiting: Callable[[], Iterable[Tensor]] = tuple,
        brake: Brake | None = None,
        guard: LossGuard = GO_ON,
        tell: Callable[[Kind, int], None] = lambda kind, batch: None,
    ) -> None:
        self.stage = stage
        self.program = program
        self.trace = Trace(stage.index, store=TraceFile())
        self._losses: deque[tuple[int, Tensor]] = deque()
        self._losses_read: dict[int, Any] = {}
        self._links = links
        self.probe = probe
        self.meter = meter
        self._waiting = waiting
        self._brake = brake
        self._guard = guard
        self._tell = tell
        self._loaded: dict[int, Activation] = {}
        self._dropped: set[int] = set()
        self.bytes_sent = 0
        self._clock = clock
        self._inbox: dict[Unit, Activation] = {}
        self._outbox: dict[Unit, Activation] = {}
        self._gradients: dict[Unit, Gradient] = {}
        self._input_gradients: dict[Unit, Gradient] = {}
        self._to_predict: dict[int, Activation] = {}
        self._partial_losses: dict[int, Tensor] = {}
        self._losses_to_send: dict[int, Tensor] = {}
        self._tells_losses = any(slot.kind is Kind.SEND_LOSS for slot in program.slots)
        self.batch = -1
        self.action: Kind | None = None
        self.time_ns = dict.fromkeys(Kind, 0)
        self._step_clock = StepClock(is_first=stage.is_first)

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
        update, began = self.stage.num_updates, time.perf_counter_ns()
        if action.batch is not None:
            self.batch = first_batch + action.batch
        self.action = action.kind
        self._tell(action.kind, self.batch)
        if action.batch is None:
            if self.probe is not None:
                self.probe.before_update(self.batch)
            self.stage.update()
        else:
            self._act(action.kind, (self.batch, action.micro_batch))
        if self._brake is not None and action.kind in COMPUTE:
            self._brake.hold(update, began)
        end = self._clock()
        self.time_ns[action.kind] += end - start
        self.trace.add(action, self.batch, start, end)
        if action.batch is None:
            self._step_clock.updated(update, self.time_ns, end)
        if self.meter is not None:
            self.meter.after_action(itertools.chain(self._held(), self._waiting()))

    def status(self) -> dict[str, Any]:
        """How the stage is doing, as JSON values; counters grow from the start of the run."""
        return {
            "stage": self.stage.index,
            "batch": self.batch,
            "updates": self.stage.num_updates,
            "time_ns": self._clock(),
            "busy_ns": sum(self.time_ns[kind] for kind in COMPUTE),
            "wait_ns": self.waiting_ns,
            "steps": self._step_clock.records(),
        }

    def usage(self) -> StageUsage:
        """Memory and traffic of the stage so far."""
        return StageUsage(
            peak=None if self.meter is None else self.meter.peak,
            peaks=None if self.meter is None else self.meter.peaks,
            resident_bytes=resident_bytes(),
            bytes_sent=self.bytes_sent,
        )

    def take_losses(self, batch: int) -> list[Tensor]:
        """The losses not yet taken, of the batches up to global index `batch`, in order."""
        taken = []
        while self._losses and self._losses[0][0] <= batch:
            index, loss = self._losses.popleft()
            self.stage.streams.settle(self._losses_read.pop(index, None))
            taken.append(loss)
        return taken

    def settle_losses(self) -> None:
        """Wait until the losses that nobody took yet are in host memory."""
        while self._losses_read:
            self.stage.streams.settle(self._losses_read.popitem()[1])

    def _held(self) -> Iterator[Tensor]:
        """What came and was not used yet, or was made and not sent yet, and losses that nobody took yet."""
        for activation in (*self._inbox.values(), *self._outbox.values(), *self._to_predict.values()):
            yield from message_tensors(activation)
        for gradient in (*self._gradients.values(), *self._input_gradients.values()):
            yield from message_tensors(gradient)
        yield from self._partial_losses.values()
        yield from self._losses_to_send.values()
        for _, loss in self._losses:
            yield loss
        for loaded in self._loaded.values():
            yield from message_tensors(loaded)

    def _act(self, kind: Kind, unit: Unit) -> None:
        batch = unit[0]
        match kind:
            case Kind.LOAD:
                loaded = self._links.load(batch)
                if self.probe is not None:
                    self.probe.keep_input(loaded, batch)
                if self._guard.keeps_batches:
                    self._loaded[batch] = loaded
                for part in split_batch(loaded, self.program.policy.micro_batches):
                    self._inbox[batch, part.micro_batch] = part
            case Kind.RECEIVE_ACTIVATION:
                self._inbox[unit] = self._links.receive_activation(batch)
            case Kind.FORWARD:
                keep_graph = not self.program.recomputes
                output = self.stage.forward(self._inbox.pop(unit), *unit, keep_graph=keep_graph)
                self._outbox[unit] = output
                if self.stage.synthesizer is not None:
                    self._to_predict[batch] = output
            case Kind.SEND_ACTIVATION:
                output = self._outbox.pop(unit)
                self.bytes_sent += _size(message_tensors(output))
                with self.stage.lane.sending():
                    self._links.send_activation(batch, output)
            case Kind.RECOMPUTE:
                self.stage.recompute(*unit)
            case Kind.RECEIVE_GRADIENT:
                self._gradients[unit] = self._links.receive_gradient(batch)
            case Kind.BACKWARD:
                self._backward(unit)
            case Kind.SEND_GRADIENT:
                gradient = self._input_gradients.pop(unit)
                self.bytes_sent += _size(message_tensors(gradient))
                self._links.send_gradient(batch, gradient)
            case Kind.SYNTHESIZE:
                predicted = self.stage.synthesize(self._to_predict.pop(batch), batch)
                self._gradients[unit] = Gradient(predicted, None)
            case Kind.TRAIN_SYNTHESIZER:
                self.stage.train_synthesizer(self._gradients.pop(unit).values, batch)
            case Kind.SEND_LOSS:
                loss = self._losses_to_send.pop(batch)
                self.bytes_sent += _size([loss])
                self._links.send_loss(batch, loss)
            case Kind.RECEIVE_LOSS:
                self._add_loss(batch, self._links.receive_loss(batch))
            case Kind.SEND_TOKEN:
                self._links.send_token(batch)
            case Kind.RECEIVE_TOKEN:
                self._links.receive_token(batch)

    def _backward(self, unit: Unit) -> None:
        batch, micro_batch = unit
        if self.stage.is_last:
            output = self._outbox.pop(unit)
            loss: Tensor | None = output.values[0] if output.share == 1 else output.values[0] * output.share
            received: list[Tensor | None] | None = None
        else:
            gradient = self._gradients.pop(unit)
            loss, received = gradient.loss, gradient.values
        if batch in self._dropped or self._guard.drops(loss):
            self._dropped.add(batch)
            gradients = self.stage.drop(*unit)
        else:
            gradients = self.stage.backward(received, *unit)
        if not self.stage.is_first:
            self._input_gradients[unit] = Gradient(gradients, None if self._tells_losses else loss, micro_batch)
        if loss is not None:
            partial = self._partial_losses.pop(batch, None)
            loss = loss if partial is None else partial + loss
            if micro_batch in (None, self.program.policy.micro_batches - 1):
                self._complete_batch(batch, loss)
                self._add_loss(batch, loss)
            else:
                self._partial_losses[batch] = loss

    def _complete_batch(self, batch: int, loss: Tensor) -> None:
        """Micro-batches before the one that spoilt the batch have left gradients."""
        dropped = batch in self._dropped or (self.program.policy.micro_batches > 1 and self._guard.drops(loss))
        self._dropped.discard(batch)
        if dropped and self.program.policy.micro_batches > 1:
            self.stage.forget_gradients()

    def _add_loss(self, batch: int, loss: Tensor) -> None:
        if self.stage.is_first:
            self._guard.stop(loss, batch, self.stage.num_stages - 1, self._loaded.pop(batch, None))
        streams = self.stage.streams
        in_host_memory = streams.to_host(loss)
        self._losses.append((batch, in_host_memory))
        if in_host_memory is not loss:
            self._losses_read[batch] = streams.mark()
        if self._tells_losses:
            self._losses_to_send[batch] = loss


def _size(tensors: Iterable[Tensor]) -> int:
    """Bytes of the elements; not of the storages, of which a view may show a part."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def split_batch(activation: Activation, parts: int) -> list[Activation]:
    """A batch as micro-batches, whose sizes differ by at most 1; the batch itself where `parts` is 1.

    Raises:
        ConfigError: where the batch has fewer samples than parts, or tensors of different lengths.
    """
    if parts == 1:
        return [activation]
    targets, target_structure = flatten(activation.target)
    leaves = [*activation.values, *targets]
    lengths = {leaf.shape[0] if leaf.ndim else 0 for leaf in leaves}
    if len(lengths) != 1 or min(lengths) < parts:
        raise ConfigError(
            f"a batch whose tensors have {sorted(lengths)} samples cannot be split into {parts} micro-batches; "
            "each needs at least one sample of every tensor. Use fewer micro-batches, or leave out a smaller last "
            "batch (drop_last)."
        )
    (samples,) = lengths
    pieces = [torch.tensor_split(leaf, parts) for leaf in leaves]
    count = len(activation.values)
    return [
        Activation(
            values=[piece[index] for piece in pieces[:count]],
            structure=activation.structure,
            target=unflatten(target_structure, [piece[index] for piece in pieces[count:]]),
            micro_batch=index,
            share=pieces[0][index].shape[0] / samples,
        )
        for index in range(parts)
    ]
