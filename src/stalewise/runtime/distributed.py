"""One process per stage: this rank's stage, its two links, and the same programs as the sequential engine.

    rank k-1  ── activations ──►  rank k  ── activations ──►  rank k+1
              ◄── gradients ───           ◄── gradients ───

Rank 0 reads the batches. An END message follows the last activation down the stages and says how to go on
(pause, drain); each stage answers the one above with an END of its own after its last gradient.
"""

from __future__ import annotations

import enum
import itertools
import weakref
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from stalewise.engine.engine import Batches, Engine
from stalewise.engine.feed import Feed
from stalewise.engine.gradient_probe import GradientProbe
from stalewise.engine.interpreter import Interpreter
from stalewise.engine.memory import MemoryMeter, StageUsage
from stalewise.engine.messages import Activation, Gradient
from stalewise.engine.score import Score, mean
from stalewise.engine.stage import Metric, Stage
from stalewise.engine.state import (
    load_optimizer_state,
    load_stage_state,
    merge_optimizer_states,
    optimizer_state,
    stage_state,
)
from stalewise.engine.tree import flatten, unflatten
from stalewise.errors import ConfigError, PeerLost, StalewiseError, TransportError
from stalewise.protocol.actions import Kind
from stalewise.protocol.program import Program, StageProgram
from stalewise.protocol.trace import Trace
from stalewise.runtime.exchange import all_gather_json, broadcast_json, broadcast_tensors
from stalewise.runtime.job import Job
from stalewise.runtime.link import Endpoint, Receiver, Sender
from stalewise.runtime.wire import Frame, MessageKind

__all__ = ["DistributedEngine"]


CLOSE_S = 5.0


class _GoOn(enum.IntEnum):
    """What follows the last batch of a session."""

    PAUSE = 0
    DRAIN = 1
    LEAVE = 2
    """Drain, because the reading rank left its loop."""


class DistributedEngine(Engine):
    """Executes the program of this rank's stage.

    Args:
        program: of the method.
        stage: of this rank.
        job: whose ranks are the stages.
        plan: hash that all ranks share; every message carries it.
        recv_timeout_s: how long a stage waits for one message.
        payload_groups: NCCL groups of the links above and below this rank, where each stage has a GPU of its own.
        gradient_difference_every: see `Engine`.
        measure_memory: whether to measure what this rank's stage holds; see `engine.memory`.
    """

    def __init__(
        self,
        program: Program,
        stage: Stage,
        job: Job,
        *,
        plan: int,
        recv_timeout_s: float,
        payload_groups: Mapping[tuple[int, int], dist.ProcessGroup] | None = None,
        gradient_difference_every: int | None = None,
        measure_memory: bool = False,
    ) -> None:
        super().__init__(program, gradient_difference_every=gradient_difference_every)
        self.stage = stage
        self._job = job
        self._recv_timeout_s = recv_timeout_s
        groups = payload_groups or {}

        tags = {"activation": 1, "gradient": 2, "token": 3}

        def endpoint(peer: int, what: str, direction: tuple[int, int]) -> Endpoint:
            return Endpoint(
                rank=peer,
                name=str(job.members[peer]),
                what=what,
                tag=len(tags) * len(job.closers) + tags[what],
                plan=plan,
                device=stage.device,
                group=job.group,
                payload_group=groups.get(direction),
            )

        rank, last = job.rank, job.world_size - 1
        self._activations_in = self._gradients_in = None
        self._activations_out = self._gradients_out = None
        self._tokens_in = self._tokens_out = None
        if any(slot.kind is Kind.SEND_TOKEN for slot in program.stages[last].slots):
            if rank == 0:
                self._tokens_in = Receiver(endpoint(last, "token", (last, 0)), timeout_s=recv_timeout_s)
            elif rank == last:
                self._tokens_out = Sender(endpoint(0, "token", (last, 0)), timeout_s=recv_timeout_s)
        if rank > 0:
            self._activations_in = Receiver(
                endpoint(rank - 1, "activation", (rank - 1, rank)),
                timeout_s=recv_timeout_s,
                limit=_most_activations(program.stages[rank - 1]),
            )
            self._gradients_out = Sender(endpoint(rank - 1, "gradient", (rank, rank - 1)), timeout_s=recv_timeout_s)
        if rank < last:
            self._activations_out = Sender(endpoint(rank + 1, "activation", (rank, rank + 1)), timeout_s=recv_timeout_s)
            self._gradients_in = Receiver(endpoint(rank + 1, "gradient", (rank + 1, rank)), timeout_s=recv_timeout_s)
        every = gradient_difference_every
        self._probe = None if every is None else GradientProbe(stage, every=every)
        self._meter = MemoryMeter(stage, max_lag=program.max_lag) if measure_memory else None
        self._interpreter = Interpreter(
            stage,
            program.stages[rank],
            self,
            clock=job.clock,
            probe=self._probe,
            meter=self._meter,
            waiting=self._waiting,
        )
        self._feed = Feed((), stage.device)
        self._drain = True
        self._draining = False
        links: list[Receiver | Sender] = [*self._receivers, *self._senders]
        for link in links:
            job.monitor.on_failure(link.wake)
        job.monitor.publish(self._status, watch=range(job.world_size if rank == 0 else 0))
        self._left: Generator[Tensor, None, None] | None = None
        job.closers.append(partial(_see_last_messages, weakref.WeakMethod(self._end_left_session), self._receivers))
        for sender in self._senders:
            weakref.finalize(self, sender.close).atexit = False

    # -- sessions ------------------------------------------------------------------------------------------------

    def train(self, batches: Batches | None, *, drain: bool) -> Generator[Tensor, None, None]:
        """See `Engine.train`. A loop that was left early is drained at the next call, or where the job ends.

        Python closes a generator in the same way where an exception leaves the loop as where `break` does. Were it
        drained then, a rank above 0 would work through the batches of rank 0 to the end before anybody heard of the
        exception.
        """
        self._end_left_session()
        session = super().train(batches, drain=drain)
        try:
            while (loss := next(session, None)) is not None:
                yield loss
        except GeneratorExit:
            self._left = session
            raise

    def evaluate(self, batches: Batches | None, metric: Metric) -> float:
        self._end_left_session()
        return super().evaluate(batches, metric)

    def _end_left_session(self) -> None:
        """Drain a session whose loop was left early."""
        session, self._left = self._left, None
        if session is not None:
            session.close()

    def _open(self, batches: Batches | None, drain: bool) -> None:
        self._drain = drain
        self._draining = False
        with self._failures_reported("begin of a session"):
            if self.stage.is_first:
                self._feed = Feed(batches, self.stage.device)
            for receiver in self._receivers:
                receiver.open()

    def _another_batch(self) -> bool:
        if self._activations_in is None:
            with self._failures_reported("load", self.num_batches):
                return not self._leaving and self._feed.another()
        with self._failures_reported("receive activation", self.num_batches):
            return self._activations_in.peek(self.num_batches).kind is MessageKind.ACTIVATION

    def _close(self) -> bool:
        with self._failures_reported("end of a session"):
            if self._activations_in is None:
                go_on = _GoOn.LEAVE if self._leaving else _GoOn.DRAIN if self._drain else _GoOn.PAUSE
            else:
                go_on = _GoOn(self._activations_in.get(self.num_batches).flags)
            if self._activations_out is not None:
                self._activations_out.put(Frame(MessageKind.END, self.num_batches, [], flags=go_on))
            if not self._leaving and go_on is not _GoOn.LEAVE and bool(go_on) != self._drain:
                raise ConfigError(
                    f"rank 0 trains with drain={bool(go_on)}, rank {self._job.rank} with drain={self._drain}; give "
                    "the same on all ranks."
                )
            self._draining = go_on is not _GoOn.PAUSE
            return self._draining

    def _finish(self) -> None:
        with self._failures_reported("end of a session"):
            for sender in (self._gradients_out, self._tokens_out):
                if sender is not None:
                    sender.put(Frame(MessageKind.END, self.num_batches, []))
            for sender in self._senders:
                sender.flush()
            if not self.batches_in_flight:
                # The peers' ENDs are about to come; once they are here, this process may leave the group at any time.
                for receiver in self._receivers:
                    receiver.join(self._recv_timeout_s)

    def _execute_step(self, step: int, num_batches: int | None) -> None:
        if self._meter is not None:
            self._meter.begin_step(step)
        with self._failures_reported():
            for action in self.program.stages[self._job.rank].step(step, num_batches, first_batch=self._first_batch):
                self._interpreter.execute(action, self._first_batch)

    def _losses_until(self, batch: int) -> list[Tensor]:
        return self._interpreter.take_losses(batch)

    # -- messages ------------------------------------------------------------------------------------------------

    def load(self, batch: int) -> Activation:
        """The batch that the data loader gave for this step (rank 0)."""
        return self._feed.take()

    def receive_activation(self, batch: int) -> Activation:
        """From the rank above."""
        assert self._activations_in is not None
        return _activation(self._activations_in.get(batch))

    def send_activation(self, batch: int, activation: Activation) -> None:
        """To the rank below."""
        assert self._activations_out is not None
        self._activations_out.put(_frame(batch, activation))

    def receive_gradient(self, batch: int) -> Gradient:
        """From the rank below."""
        frame = _in_flight(self._gradients_in, MessageKind.GRADIENT, batch)
        *values, loss = frame.leaves
        return Gradient(values, loss, frame.micro_batch)

    def send_gradient(self, batch: int, gradient: Gradient) -> None:
        """To the rank above."""
        assert self._gradients_out is not None
        leaves = [*gradient.values, gradient.loss]
        self._gradients_out.put(Frame(MessageKind.GRADIENT, batch, leaves, micro_batch=gradient.micro_batch))

    def receive_loss(self, batch: int) -> Tensor:
        """From the rank below."""
        (loss,) = _in_flight(self._gradients_in, MessageKind.LOSS, batch).leaves
        assert loss is not None
        return loss

    def send_loss(self, batch: int, loss: Tensor) -> None:
        """To the rank above."""
        assert self._gradients_out is not None
        self._gradients_out.put(Frame(MessageKind.LOSS, batch, [loss]))

    def receive_token(self, batch: int) -> None:
        """From the last rank."""
        _in_flight(self._tokens_in, MessageKind.TOKEN, batch)

    def send_token(self, batch: int) -> None:
        """To rank 0."""
        assert self._tokens_out is not None
        self._tokens_out.put(Frame(MessageKind.TOKEN, batch, []))

    def _gradient_difference(self, batch: int) -> list[float | None]:
        """A batch through the kept weights, forward and back, over the same links.

        Every stage is between the same two local steps, so the only messages that lie on the links are gradients of
        later batches, which stay there. In a drain the END of the activations has passed, so they get one more session.
        """
        assert self._probe is not None
        with self._failures_reported("gradient difference", batch):
            if self._activations_in is None:
                activation = self._probe.take_input(batch)
            else:
                if self._draining:
                    self._activations_in.open()
                activation = _activation(self._activations_in.get(batch))
                if self._draining:
                    self._activations_in.get(batch)
            output = self._probe.forward(activation, batch)
            gradients = None
            if self._activations_out is not None and self._gradients_in is not None:
                self._activations_out.put(_frame(batch, output))
                if self._draining:
                    self._activations_out.put(Frame(MessageKind.END, batch, []))
                gradients = self._gradients_in.get_of_kind(MessageKind.PROBE, batch).leaves
            passed_on = self._probe.backward(gradients)
            if self._gradients_out is not None:
                self._gradients_out.put(Frame(MessageKind.PROBE, batch, passed_on))
            return all_gather_json(self._probe.difference(batch), self._job.group)

    # -- evaluation and state ------------------------------------------------------------------------------------

    def _evaluate(self, batches: Batches | None, metric: Metric) -> float:
        total, samples = self._evaluate_stage(batches, metric)
        with self._failures_reported("evaluation"):
            total, samples = broadcast_json([total, samples], self._job.world_size - 1, self._job.group)
        return mean(total, samples)

    def _evaluate_stage(self, batches: Batches | None, metric: Metric) -> tuple[float, int]:
        score = Score(metric)
        with self._failures_reported("evaluation"):
            feed = Feed(batches, self.stage.device) if self.stage.is_first else None
            if self._activations_in is not None:
                self._activations_in.open()
        with self.stage.evaluation_mode():
            for batch in itertools.count():
                with self._failures_reported("evaluation", batch):
                    activation = self._next_to_evaluate(feed, batch)
                    if activation is None:
                        break
                    activation = self.stage.infer(activation, batch)
                    if self._activations_out is None:
                        score.add(activation, self.stage.device)
                    else:
                        self._activations_out.flush()
                        self._activations_out.put(_frame(batch, activation))
        with self._failures_reported("evaluation"):
            if self._activations_out is not None:
                self._activations_out.put(Frame(MessageKind.END, batch, []))
                self._activations_out.flush()
            return score.totals()

    def _next_to_evaluate(self, feed: Feed | None, batch: int) -> Activation | None:
        """The activation of a batch; None after the last."""
        if feed is not None:
            return feed.take() if feed.another() else None
        assert self._activations_in is not None
        frame = self._activations_in.get(batch)
        return None if frame.kind is MessageKind.END else _activation(frame)

    def state_dict(self) -> dict[str, Tensor]:
        self._end_left_session()
        own = stage_state(self.stage)
        with self._failures_reported("state_dict"):
            return {
                name: value
                for rank in range(self._job.world_size)
                for name, value in broadcast_tensors(
                    own if rank == self._job.rank else None, rank, self._job.group
                ).items()
            }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self._end_left_session()
        load_stage_state(self.stage, state)

    def optimizer_state_dict(self) -> dict[str, Any]:
        self._end_left_session()
        own = optimizer_state(self.stage)
        with self._failures_reported("optimizer_state_dict"):
            return merge_optimizer_states(
                [self._shared_optimizer_state(own, rank) for rank in range(self._job.world_size)]
            )

    def load_optimizer_state_dict(self, state: Mapping[str, Any]) -> None:
        self._end_left_session()
        load_optimizer_state(self.stage, state)

    def _shared_optimizer_state(self, own: Mapping[str, Any], rank: int) -> dict[str, Any]:
        """The optimizer state of one rank: tensors by name, everything else as JSON."""
        mine = rank == self._job.rank
        tensors = {
            f"{name}\n{key}": value
            for name, values in own["state"].items()
            for key, value in values.items()
            if isinstance(value, Tensor)
        }
        plain = {
            "state": {
                name: {key: value for key, value in values.items() if not isinstance(value, Tensor)}
                for name, values in own["state"].items()
            },
            "param_groups": [
                {key: value.item() if isinstance(value, Tensor) else value for key, value in group.items()}
                for group in own["param_groups"]
            ],
        }
        shared: dict[str, Any] = broadcast_json(plain if mine else None, rank, self._job.group)
        for group in shared["param_groups"]:
            group.update({key: tuple(value) for key, value in group.items() if isinstance(value, list)})
            group["params"] = list(group["params"])
        for joined, value in broadcast_tensors(tensors if mine else None, rank, self._job.group).items():
            name, key = joined.split("\n")
            shared["state"][name][key] = value
        return shared

    @property
    def learning_rate(self) -> float | None:
        return self.stage.learning_rate

    def traces(self) -> list[Trace]:
        self._end_left_session()
        own = {name: torch.tensor(values) for name, values in self._interpreter.trace.columns().items()}
        with self._failures_reported():
            return [
                Trace.from_columns(
                    rank,
                    {
                        name: values.tolist()
                        for name, values in broadcast_tensors(
                            own if rank == self._job.rank else None, rank, self._job.group
                        ).items()
                    },
                )
                for rank in range(self._job.world_size)
            ]

    def usages(self) -> list[StageUsage]:
        self._end_left_session()
        own = self._interpreter.usage().as_json()
        with self._failures_reported("usages"):
            return [StageUsage.from_json(usage) for usage in all_gather_json(own, self._job.group)]

    # -- failures ------------------------------------------------------------------------------------------------

    @contextmanager
    def _failures_reported(self, action: str | None = None, batch: int | None = None) -> Iterator[None]:
        """Tell the other ranks of an error, or say which other rank's error ended this one.

        Args:
            action: what goes on, in words; None: what the interpreter says.
            batch: of the action, where it has one.
        """
        monitor = self._job.monitor
        try:
            yield
        except Exception as error:
            lost = isinstance(error, PeerLost) or (
                isinstance(error, RuntimeError) and not isinstance(error, StalewiseError) and "Connection" in str(error)
            )
            cause = monitor.wait_for_cause() if lost else monitor.cause()
            if cause is not None:
                raise cause from None
            if action is None and self._interpreter.action is not None:
                action, batch = self._interpreter.action.name.lower().replace("_", " "), self._interpreter.batch
            monitor.report(error, batch=batch, action=action)
            raise

    def statuses(self) -> list[dict[str, Any]]:
        shown = self._job.monitor.statuses()
        return [shown[rank] for rank in sorted(shown) if shown[rank]]

    def _status(self) -> dict[str, Any]:
        return {
            **self._interpreter.status(),
            "activations_waiting": len(self._activations_in or ()),
            "gradients_waiting": len(self._gradients_in or ()),
        }

    def _waiting(self) -> Iterator[Tensor]:
        """The tensors in the queues of the links."""
        links: list[Receiver | Sender] = [*self._receivers, *self._senders]
        for link in links:
            yield from link.held()

    @property
    def _receivers(self) -> list[Receiver]:
        receivers = (self._activations_in, self._gradients_in, self._tokens_in)
        return [receiver for receiver in receivers if receiver is not None]

    @property
    def _senders(self) -> list[Sender]:
        senders = (self._activations_out, self._gradients_out, self._tokens_out)
        return [sender for sender in senders if sender is not None]


def _frame(batch: int, activation: Activation) -> Frame:
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


def _activation(frame: Frame) -> Activation:
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


def _in_flight(receiver: Receiver | None, kind: MessageKind, batch: int) -> Frame:
    """The message of a batch; ENDs of earlier sessions lie between messages that stayed in flight."""
    assert receiver is not None
    while receiver.peek(batch).kind is MessageKind.END:
        receiver.skip()
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


def _see_last_messages(
    end_left_session: Callable[[], Callable[[], None] | None], receivers: Sequence[Receiver]
) -> None:
    """Before the ranks part: end what was left, and wait for the last END of every peer, so that nothing is cut off."""
    end = end_left_session()
    if end is not None:
        end()
    for receiver in receivers:
        receiver.join(CLOSE_S)
