"""The links of a rank: what its stage exchanges with the ranks above and below, as frames over `link`.

    rank k-1  ── activations ──►  rank k  ── activations ──►  rank k+1
              ◄── gradients ───           ◄── gradients ───

Losses ride with the gradients, tokens go from the last rank to rank 0, and an END ends a session on each of them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from stalewise.engine.messages import Activation, Gradient
from stalewise.engine.streams import streams_of
from stalewise.engine.tree import flatten, unflatten
from stalewise.errors import ReceiveTimeout, TransportError
from stalewise.protocol.actions import Kind
from stalewise.protocol.program import Program, StageProgram
from stalewise.runtime.job import Job
from stalewise.runtime.link import Endpoint, Receiver, Sender
from stalewise.runtime.patience import Patience
from stalewise.runtime.wire import Frame, MessageKind

__all__ = ["StageLinks", "activation_frame", "frame_activation", "frame_gradient", "gradient_frame"]

Message = TypeVar("Message")

_TAGS = {"activation": 1, "gradient": 2, "token": 3}


class StageLinks:
    """Complete when built; receives from the first session on.

    Args:
        program: of all stages.
        job: whose ranks are the stages.
        device: of this rank's stage.
        plan: hash that all ranks share; every message carries it.
        patience: how long to wait for one message.
        payload_groups: NCCL groups by (sender, receiver), where each stage has a GPU of its own.
        load: gives the batch that the data loader gave for this step; rank 0 has no activations to receive.
    """

    def __init__(
        self,
        program: Program,
        job: Job,
        *,
        device: torch.device,
        plan: int,
        patience: Patience,
        payload_groups: Mapping[tuple[int, int], dist.ProcessGroup] | None,
        load: Callable[[], Activation],
    ) -> None:
        groups = payload_groups or {}
        self._load = load
        self._streams = streams_of(device)
        self.on_received: Callable[[Kind, int, int | None, Any], None] | None = None
        """Told of every message of the program that the stage takes: kind, batch, micro-batch, message."""
        self.on_mark: Callable[[int], None] | None = None
        """Told of every MARK that the stage comes to, by its number."""
        self._patience = patience
        neighbours = (rank for rank in (job.rank - 1, job.rank + 1) if 0 <= rank < job.world_size)
        self._neighbours = {rank: str(job.members[rank]) for rank in neighbours}
        self._explain = job.monitor.explain
        self.arrivals = threading.Event()

        def endpoint(what: str, sender: int, receiver: int) -> Endpoint:
            peer = receiver if job.rank == sender else sender
            return Endpoint(
                rank=peer,
                name=str(job.members[peer]),
                what=what,
                tag=len(_TAGS) * len(job.closers) + _TAGS[what],
                plan=plan,
                device=device,
                group=job.group,
                payload_group=groups.get((sender, receiver)),
                streams=self._streams,
                distant=job.members[peer].host != job.members[job.rank].host,
                explain=job.monitor.explain,
            )

        rank, last = job.rank, job.world_size - 1
        sender = partial(Sender, patience=patience)
        receiver = partial(Receiver, patience=patience, arrivals=self.arrivals)
        self.activations_in = self.gradients_in = self.tokens_in = None
        self.activations_out = self.gradients_out = self.tokens_out = None
        if any(slot.kind is Kind.SEND_TOKEN for slot in program.stages[last].slots):
            if rank == 0:
                self.tokens_in = receiver(endpoint("token", last, 0))
            elif rank == last:
                self.tokens_out = sender(endpoint("token", last, 0))
        if rank > 0:
            limit = _most_activations(program.stages[rank - 1])
            self.activations_in = receiver(endpoint("activation", rank - 1, rank), limit=limit)
            self.gradients_out = sender(endpoint("gradient", rank, rank - 1))
        if rank < last:
            self.activations_out = sender(endpoint("activation", rank, rank + 1))
            self.gradients_in = receiver(endpoint("gradient", rank + 1, rank))

    @property
    def receivers(self) -> list[Receiver]:
        """Of this rank."""
        receivers = (self.activations_in, self.gradients_in, self.tokens_in)
        return [receiver for receiver in receivers if receiver is not None]

    @property
    def senders(self) -> list[Sender]:
        """Of this rank."""
        senders = (self.activations_out, self.gradients_out, self.tokens_out)
        return [sender for sender in senders if sender is not None]

    def held(self) -> Iterator[Tensor]:
        """The tensors in the queues."""
        links: list[Receiver | Sender] = [*self.receivers, *self.senders]
        for link in links:
            yield from link.held()

    def waiting(self) -> dict[str, int]:
        """Messages in the queues of the stage's inputs."""
        return {
            "activations_waiting": len(self.activations_in or ()),
            "gradients_waiting": len(self.gradients_in or ()),
        }

    # -- what the interpreter asks for ---------------------------------------------------------------------------

    def load(self, batch: int) -> Activation:
        """The batch of this step (rank 0)."""
        return self._load()

    def receive_activation(self, batch: int) -> Activation:
        """From the rank above."""
        assert self.activations_in is not None
        activation = frame_activation(self.activations_in.get(batch))
        return self._told(Kind.RECEIVE_ACTIVATION, batch, activation.micro_batch, activation)

    def send_activation(self, batch: int, activation: Activation) -> None:
        """To the rank below."""
        assert self.activations_out is not None
        self.activations_out.put(activation_frame(batch, activation))

    def receive_gradient(self, batch: int) -> Gradient:
        """From the rank below."""
        gradient = frame_gradient(_in_flight(self.gradients_in, MessageKind.GRADIENT, batch, self.on_mark))
        return self._told(Kind.RECEIVE_GRADIENT, batch, gradient.micro_batch, gradient)

    def send_gradient(self, batch: int, gradient: Gradient) -> None:
        """To the rank above."""
        assert self.gradients_out is not None
        if gradient.loss is not None:
            # Nobody computes with it on the way: it goes through host memory, where its readers are.
            gradient = gradient._replace(loss=self._streams.to_host(gradient.loss))
        self.gradients_out.put(gradient_frame(batch, gradient))

    def receive_loss(self, batch: int) -> Tensor:
        """From the rank below."""
        (loss,) = _in_flight(self.gradients_in, MessageKind.LOSS, batch).leaves
        assert loss is not None
        return self._told(Kind.RECEIVE_LOSS, batch, None, loss)

    def send_loss(self, batch: int, loss: Tensor) -> None:
        """To the rank above."""
        assert self.gradients_out is not None
        self.gradients_out.put(Frame(MessageKind.LOSS, batch, [self._streams.to_host(loss)]))

    def receive_token(self, batch: int) -> None:
        """From the last rank."""
        _in_flight(self.tokens_in, MessageKind.TOKEN, batch)
        self._told(Kind.RECEIVE_TOKEN, batch, None, None)

    def send_token(self, batch: int) -> None:
        """To rank 0."""
        assert self.tokens_out is not None
        self.tokens_out.put(Frame(MessageKind.TOKEN, batch, []))

    def _told(self, kind: Kind, batch: int, micro_batch: int | None, message: Message) -> Message:
        if self.on_received is not None:
            self.on_received(kind, batch, micro_batch, message)
        return message

    # -- the rest ------------------------------------------------------------------------------------------------

    def exchange_probe(self, batch: int, output: Activation, *, ends_session: bool) -> list[Tensor | None] | None:
        """Send an activation outside the program; the gradients that come back, None on the last rank."""
        if self.activations_out is None or self.gradients_in is None:
            return None
        self.activations_out.put(activation_frame(batch, output))
        if ends_session:
            self.activations_out.put(Frame(MessageKind.END, batch, []))
        return self.gradients_in.get_of_kind(MessageKind.PROBE, batch).leaves

    def send_probe(self, batch: int, gradients: list[Tensor | None]) -> None:
        """Answer the rank above."""
        if self.gradients_out is not None:
            self.gradients_out.put(Frame(MessageKind.PROBE, batch, gradients))

    def send_end(self, batch: int, *, flags: int = 0) -> None:
        """END after the last activation; the rank below goes on as the flags say."""
        if self.activations_out is not None:
            self.activations_out.put(Frame(MessageKind.END, batch, [], flags=flags))

    def answer_end(self, batch: int) -> None:
        """END after the last gradient and token of a session."""
        for sender in (self.gradients_out, self.tokens_out):
            if sender is not None:
                sender.put(Frame(MessageKind.END, batch, []))

    def mark(self, number: int) -> None:
        """Tell the rank above that the gradients sent so far are those before this stage's cut."""
        if self.gradients_out is not None:
            self.gradients_out.put(Frame(MessageKind.MARK, number, []))

    def gradients_here(self) -> list[Frame]:
        """What came from the rank below and was not taken yet, after the END of the session has come.

        Raises:
            ReceiveTimeout: where that END does not come.
        """
        return [] if self.gradients_in is None else self.gradients_in.after_end()

    def next_activation(self, batch: int) -> Activation | None:
        """The activation of a batch; None where the session ends instead."""
        assert self.activations_in is not None
        frame = self.activations_in.get(batch)
        return None if frame.kind is MessageKind.END else frame_activation(frame)

    # -- for stages that decide at run time ----------------------------------------------------------------------

    def next_in_line(self, batch: int) -> MessageKind | None:
        """What the rank above sent next, an activation or the END; None while nothing is there."""
        assert self.activations_in is not None
        return self.activations_in.peek(batch).kind if self.activations_in.has_any() else None

    def gradients_waiting(self) -> int:
        """Gradients that came and were not received yet; 0 on the last rank."""
        return 0 if self.gradients_in is None else self.gradients_in.count(MessageKind.GRADIENT)

    def wait_for_arrival(self, batch: int) -> None:
        """Wait until something comes after `arrivals` was cleared.

        Raises:
            ReceiveTimeout: where nothing came in time.
            PeerLost: where a peer is gone.
            WorkerError: where another worker failed.
        """
        for receiver in self.receivers:
            receiver.check(batch)
        allowed_s = self._patience.message_s
        came = any(self.arrivals.wait(slice_s) for slice_s in self._patience.waits())
        for receiver in self.receivers:
            receiver.check(batch)
        if not came:
            known = "".join(
                f" {who}:{explained}" for rank, who in self._neighbours.items() if (explained := self._explain(rank))
            )
            raise ReceiveTimeout(
                f"neither an activation of batch {batch} nor a gradient came in {allowed_s:.4g} s.{known} Look at the "
                "logs of the neighbouring ranks first; raise recv_timeout_s only if a step really takes that long."
            )

    def flush(self) -> None:
        """Wait until everything is sent."""
        for sender in self.senders:
            sender.flush()


def activation_frame(batch: int, activation: Activation) -> Frame:
    """An activation as it travels."""
    targets, target_structure = flatten(activation.target)
    structure = [len(activation.values), activation.structure, target_structure]
    return Frame(
        MessageKind.ACTIVATION,
        batch,
        [*activation.values, *targets],
        structure,
        micro_batch=activation.micro_batch,
        share=activation.share,
    )


def gradient_frame(batch: int, gradient: Gradient) -> Frame:
    """A gradient, and the loss that rides with it, as they travel."""
    leaves = [*gradient.values, gradient.loss]
    return Frame(MessageKind.GRADIENT, batch, leaves, micro_batch=gradient.micro_batch)


def frame_gradient(frame: Frame) -> Gradient:
    """The inverse of `gradient_frame`."""
    *values, loss = frame.leaves
    return Gradient(values, loss, frame.micro_batch)


def frame_activation(frame: Frame) -> Activation:
    """The inverse of `activation_frame`.

    Raises:
        TransportError: where the tensors do not fit the structure.
    """
    leaves = [leaf for leaf in frame.leaves if leaf is not None]
    try:
        count, structure, target_structure = frame.structure
        unflatten(structure, leaves[:count])
        target = unflatten(target_structure, leaves[count:])
        return Activation(leaves[:count], structure, target, frame.micro_batch, frame.share)
    except (TypeError, ValueError, RuntimeError, StopIteration) as error:
        raise TransportError(
            f"the activation of batch {frame.batch} came as {len(leaves)} tensors that do not fit the structure "
            f"{frame.structure!r}."
        ) from error


def _in_flight(
    receiver: Receiver | None, kind: MessageKind, batch: int, on_mark: Callable[[int], None] | None = None
) -> Frame:
    """The message of a batch; ENDs of earlier sessions, and MARKs, lie between messages that stayed in flight."""
    assert receiver is not None
    while (head := receiver.peek(batch)).kind in (MessageKind.END, MessageKind.MARK):
        receiver.skip()
        if head.kind is MessageKind.MARK and on_mark is not None:
            on_mark(head.batch)
    frame = receiver.get(batch)
    if frame.kind is not kind:
        raise TransportError(
            f"a {frame.kind.name.lower()} of batch {batch} came where its {kind.name.lower()} is due; start all ranks "
            "with the same method."
        )
    return frame


def _most_activations(sender: StageProgram) -> int:
    """Activations of a stage that can wait at the next one in training, and an END."""
    ahead = max((slot.lag for slot in sender.slots if slot.kind is Kind.RECEIVE_GRADIENT), default=0)
    return (ahead + 1) * sender.policy.micro_batches + 1
