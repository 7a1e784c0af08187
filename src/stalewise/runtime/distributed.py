"""One process per stage: this rank's stage, its two links, and the same programs as the sequential engine.

    rank k-1  ── activations ──►  rank k  ── activations ──►  rank k+1
              ◄── gradients ───           ◄── gradients ───

Rank 0 reads the batches. An END message follows the last activation down the stages and says how to go on
(pause, drain); each stage answers the one above with an END of its own after its last gradient.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from torch import Tensor

from stalewise.engine.engine import Batches, Engine
from stalewise.engine.feed import Feed
from stalewise.engine.interpreter import Interpreter
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
from stalewise.errors import ConfigError, PeerLost, StalewiseError
from stalewise.protocol.program import Program
from stalewise.protocol.trace import Trace
from stalewise.runtime.exchange import broadcast_json, broadcast_tensors
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
    ) -> None:
        super().__init__(program)
        self.stage = stage
        self._job = job
        groups = payload_groups or {}

        def endpoint(peer: int, what: str, direction: tuple[int, int]) -> Endpoint:
            return Endpoint(
                rank=peer,
                name=str(job.members[peer]),
                what=what,
                tag=2 * len(job.closers) + (1 if what == "activation" else 2),
                plan=plan,
                device=stage.device,
                group=job.group,
                payload_group=groups.get(direction),
            )

        rank, last = job.rank, job.world_size - 1
        self._activations_in = self._gradients_in = None
        self._activations_out = self._gradients_out = None
        if rank > 0:
            self._activations_in = Receiver(
                endpoint(rank - 1, "activation", (rank - 1, rank)), timeout_s=recv_timeout_s
            )
            self._gradients_out = Sender(endpoint(rank - 1, "gradient", (rank, rank - 1)))
        if rank < last:
            self._activations_out = Sender(endpoint(rank + 1, "activation", (rank, rank + 1)))
            self._gradients_in = Receiver(endpoint(rank + 1, "gradient", (rank + 1, rank)), timeout_s=recv_timeout_s)
        self._interpreter = Interpreter(stage, program.stages[rank], self, clock=job.clock)
        self._feed = Feed((), stage.device)
        self._drain = True
        for receiver in self._receivers:
            job.monitor.on_failure(receiver.wake)
        job.monitor.publish(self._status, watch=range(job.world_size if rank == 0 else 0))
        job.closers.append(self._close_links)

    # -- sessions ------------------------------------------------------------------------------------------------

    def _open(self, batches: Batches | None, drain: bool) -> None:
        self._drain = drain
        if self.stage.is_first:
            self._feed = Feed(batches, self.stage.device)
        for receiver in self._receivers:
            receiver.open()

    def _another_batch(self) -> bool:
        with self._failures_reported():
            if self._activations_in is None:
                return not self._leaving and self._feed.another()
            return self._activations_in.peek(self.num_batches).kind is MessageKind.ACTIVATION

    def _close(self) -> bool:
        with self._failures_reported():
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
            return go_on is not _GoOn.PAUSE

    def _finish(self) -> None:
        with self._failures_reported():
            if self._gradients_out is not None:
                self._gradients_out.put(Frame(MessageKind.END, self.num_batches, []))
            for sender in self._senders:
                sender.flush()

    def _execute_step(self, step: int, num_batches: int | None) -> None:
        with self._failures_reported():
            for action in self.program.stages[self._job.rank].step(step, num_batches):
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
        """From the rank below; ENDs of earlier sessions lie between gradients that stayed in flight."""
        assert self._gradients_in is not None
        while self._gradients_in.peek(batch).kind is MessageKind.END:
            self._gradients_in.skip()
        *values, loss = self._gradients_in.get(batch).leaves
        assert loss is not None
        return Gradient(values, loss)

    def send_gradient(self, batch: int, gradient: Gradient) -> None:
        """To the rank above."""
        assert self._gradients_out is not None
        self._gradients_out.put(Frame(MessageKind.GRADIENT, batch, [*gradient.values, gradient.loss]))

    # -- evaluation and state ------------------------------------------------------------------------------------

    def _evaluate(self, batches: Batches | None, metric: Metric) -> float:
        with self._failures_reported():
            total, samples = self._evaluate_stage(batches, metric)
            total, samples = broadcast_json([total, samples], self._job.world_size - 1, self._job.group)
        return mean(total, samples)

    def _evaluate_stage(self, batches: Batches | None, metric: Metric) -> tuple[float, int]:
        feed = Feed(batches, self.stage.device) if self.stage.is_first else None
        score = Score(metric)
        if self._activations_in is not None:
            self._activations_in.open()
        batch = 0
        with self.stage.evaluation_mode():
            while True:
                if feed is not None:
                    if not feed.another():
                        break
                    activation = feed.take()
                else:
                    assert self._activations_in is not None
                    frame = self._activations_in.get(batch)
                    if frame.kind is MessageKind.END:
                        break
                    activation = _activation(frame)
                activation = self.stage.infer(activation, batch)
                if self._activations_out is None:
                    score.add(activation, self.stage.device)
                else:
                    self._activations_out.put(_frame(batch, activation))
                batch += 1
        if self._activations_out is not None:
            self._activations_out.put(Frame(MessageKind.END, batch, []))
            self._activations_out.flush()
        return score.totals()

    def state_dict(self) -> dict[str, Tensor]:
        own = stage_state(self.stage)
        with self._failures_reported():
            return {
                name: value
                for rank in range(self._job.world_size)
                for name, value in broadcast_tensors(
                    own if rank == self._job.rank else None, rank, self._job.group
                ).items()
            }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        load_stage_state(self.stage, state)

    def optimizer_state_dict(self) -> dict[str, Any]:
        own = optimizer_state(self.stage)
        with self._failures_reported():
            return merge_optimizer_states(
                [self._shared_optimizer_state(own, rank) for rank in range(self._job.world_size)]
            )

    def load_optimizer_state_dict(self, state: Mapping[str, Any]) -> None:
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
        for joined, value in broadcast_tensors(tensors if mine else None, rank, self._job.group).items():
            name, key = joined.split("\n")
            shared["state"][name][key] = value
        return shared

    @property
    def learning_rate(self) -> float | None:
        return self.stage.learning_rate

    @property
    def traces(self) -> list[Trace]:
        return [self._interpreter.trace]

    # -- failures ------------------------------------------------------------------------------------------------

    @contextmanager
    def _failures_reported(self) -> Iterator[None]:
        """Tell the other ranks of an error, or say which other rank's error ended this one."""
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
            monitor.report(error, batch=self._current_batch(), action=self._current_action())
            raise

    def _current_batch(self) -> int | None:
        return None if self._interpreter.batch < 0 else self._interpreter.batch

    def _current_action(self) -> str | None:
        return None if self._interpreter.action is None else self._interpreter.action.name.lower().replace("_", " ")

    def statuses(self) -> list[dict[str, Any]]:
        shown = self._job.monitor.statuses()
        return [shown[rank] for rank in sorted(shown) if shown[rank]]

    def _status(self) -> dict[str, Any]:
        return {
            **self._interpreter.status(),
            "activations_waiting": len(self._activations_in or ()),
            "gradients_waiting": len(self._gradients_in or ()),
        }

    def _close_links(self) -> None:
        """Before the ranks part: see the last END of every peer, so that no message is cut off."""
        for receiver in self._receivers:
            receiver.join(CLOSE_S)

    @property
    def _receivers(self) -> list[Receiver]:
        return [receiver for receiver in (self._activations_in, self._gradients_in) if receiver is not None]

    @property
    def _senders(self) -> list[Sender]:
        return [sender for sender in (self._activations_out, self._gradients_out) if sender is not None]


def _frame(batch: int, activation: Activation) -> Frame:
    targets, target_structure = flatten(activation.target)
    structure = [len(activation.values), activation.structure, target_structure]
    return Frame(MessageKind.ACTIVATION, batch, [*activation.values, *targets], structure)


def _activation(frame: Frame) -> Activation:
    count, structure, target_structure = frame.structure
    leaves = [leaf for leaf in frame.leaves if leaf is not None]
    return Activation(leaves[:count], structure, unflatten(target_structure, leaves[count:]))
