"""One process per stage: this rank's stage, its links, and the same programs as the sequential engine.

Rank 0 reads the batches. An END message follows the last activation down the stages and says how to go on
(pause, drain); each stage answers the one above with an END of its own after its last gradient.
"""

from __future__ import annotations

import enum
import itertools
import time
import weakref
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from stalewise.engine.brake import Brake
from stalewise.engine.engine import Batches, Cut, Engine, TakeSnapshot
from stalewise.engine.feed import Feed
from stalewise.engine.gradient_probe import GradientProbe
from stalewise.engine.interpreter import Interpreter
from stalewise.engine.memory import MemoryMeter, StageUsage
from stalewise.engine.messages import Activation
from stalewise.engine.nonfinite import GO_ON, LossGuard
from stalewise.engine.score import Score, mean
from stalewise.engine.snapshot import (
    check_course,
    check_stage,
    restore_interpreter,
    restore_stage,
    snapshot_interpreter,
    snapshot_stage,
)
from stalewise.engine.stage import Metric, Stage
from stalewise.engine.state import (
    load_optimizer_state,
    load_stage_state,
    merge_optimizer_states,
    optimizer_state,
    stage_state,
)
from stalewise.errors import ConfigError
from stalewise.protocol.course import Orders, courses_of
from stalewise.protocol.program import Program
from stalewise.protocol.stragglers import NO_STRAGGLERS, Stragglers
from stalewise.protocol.trace import Trace
from stalewise.runtime.elastic_rank import ElasticRank
from stalewise.runtime.elastic_snapshot import ElasticSnapshot, restore_elastic_links
from stalewise.runtime.exchange import all_gather_json, all_gather_tensors, broadcast_json
from stalewise.runtime.job import Job
from stalewise.runtime.link import Receiver, Sender
from stalewise.runtime.link_snapshot import LinkSnapshot, restore_links
from stalewise.runtime.monitor import WAITING
from stalewise.runtime.optimizer_exchange import share_optimizer_state
from stalewise.runtime.patience import Patience
from stalewise.runtime.place import Place
from stalewise.runtime.stage_links import StageLinks
from stalewise.runtime.wire import MessageKind

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
        recv_timeout_s: how long a stage waits for one message; None: see `runtime.patience`.
        payload_groups: NCCL groups of the links above and below this rank, where each stage has a GPU of its own.
        gradient_difference_every: see `Engine`.
        measure_memory: whether to measure what this rank's stage holds; see `engine.memory`.
        stragglers: steps that are slow on purpose.
        replay: the order of each stage of an elastic program, to be repeated; None: the rule decides.
        guard: what becomes of batches whose loss is not finite.
    """

    def __init__(
        self,
        program: Program,
        stage: Stage,
        job: Job,
        *,
        plan: int,
        recv_timeout_s: float | None,
        payload_groups: Mapping[tuple[int, int], dist.ProcessGroup] | None = None,
        gradient_difference_every: int | None = None,
        measure_memory: bool = False,
        stragglers: Stragglers = NO_STRAGGLERS,
        replay: Orders | None = None,
        guard: LossGuard = GO_ON,
    ) -> None:
        super().__init__(program, gradient_difference_every=gradient_difference_every)
        self.stage = stage
        self._job = job
        self._patience = Patience(recv_timeout_s)
        self._step_end: float | None = None
        self._doing: tuple[str | None, int | None] | None = None
        self._place = Place(job.rank)
        self._feed = Feed((), stage.device)
        self._links = StageLinks(
            program,
            job,
            device=stage.device,
            plan=plan,
            patience=self._patience,
            payload_groups=payload_groups,
            load=lambda: self._feed.take(),
        )
        every = gradient_difference_every
        self._probe = None if every is None else GradientProbe(stage, every=every)
        self._meter = MemoryMeter(stage, max_lag=program.max_lag) if measure_memory else None
        self._interpreter = Interpreter(
            stage,
            program.stages[job.rank],
            self._links,
            clock=job.clock,
            probe=self._probe,
            meter=self._meter,
            waiting=self._links.held,
            brake=Brake(stragglers, job.rank, stage.device) if stragglers else None,
            guard=guard,
            tell=self._place.at,
        )
        courses = courses_of(program, replay)
        self._elastic: ElasticRank | None = None
        if courses:
            self._elastic = ElasticRank(courses[job.rank], self._interpreter, self._links, wait=self._wait_for_arrival)
        self._drain = True
        self._draining = False
        ends: list[Receiver | Sender] = [*self._links.receivers, *self._links.senders]
        for end in ends:
            job.monitor.on_failure(end.wake)
        job.monitor.publish(self._status, self._patience)
        self._left: Generator[Tensor, None, None] | None = None
        self._snapshot_under_way: LinkSnapshot | ElasticSnapshot | None = None
        self._num_snapshots = 0
        job.closers.append(
            partial(_see_last_messages, weakref.WeakMethod(self._end_left_session), self._links.receivers)
        )
        for sender in self._links.senders:
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
        self._begin_session()
        with self._failures_reported("begin of a session"):
            if self.stage.is_first:
                self._feed = Feed(batches, self.stage.device)
            for receiver in self._links.receivers:
                receiver.open()
        if self._elastic is not None:
            self._elastic.course.begin_session()

    def _begin_session(self) -> None:
        self._patience.begin_session()
        self._step_end = None

    def _another_batch(self) -> bool:
        if self._elastic is not None:
            return self._another_elastic_batch(self._elastic)
        if self._links.activations_in is None:
            return self._load_another()
        with self._failures_reported("receive activation", self.num_batches):
            return self._links.activations_in.peek(self.num_batches).kind is MessageKind.ACTIVATION

    def _load_another(self) -> bool:
        with self._failures_reported("load", self.num_batches):
            return not self._leaving and self._feed.another()

    def _wait_for_arrival(self, batch: int) -> None:
        with self._failures_reported(WAITING, batch):
            self._links.wait_for_arrival(batch)

    def _another_elastic_batch(self, elastic: ElasticRank) -> bool:
        try:
            with self._failures_reported():
                return elastic.until_forward(self.num_batches, self._first_batch, self._load_another)
        except BaseException:
            self._failed = True
            raise

    def _close(self) -> bool:
        with self._failures_reported("end of a session"):
            if self._links.activations_in is None:
                go_on = _GoOn.LEAVE if self._leaving else _GoOn.DRAIN if self._drain else _GoOn.PAUSE
            else:
                go_on = _GoOn(self._links.activations_in.get(self.num_batches).flags)
            self._links.send_end(self.num_batches, flags=go_on)
            if not self._leaving and go_on is not _GoOn.LEAVE and bool(go_on) != self._drain:
                raise ConfigError(
                    f"rank 0 trains with drain={bool(go_on)}, rank {self._job.rank} with drain={self._drain}; give "
                    "the same on all ranks."
                )
            self._draining = go_on is not _GoOn.PAUSE
            return self._draining

    def _finish(self) -> None:
        with self._failures_reported("end of a session"):
            self._links.answer_end(self.num_batches)
            self._links.flush()
            self.complete_snapshots()
            if not self.batches_in_flight:
                # The peers' ENDs are about to come; once they are here, this process may leave the group at any time.
                for receiver in self._links.receivers:
                    receiver.join(self._patience.message_s)

    def _execute_step(self, step: int, num_batches: int | None) -> None:
        if self._meter is not None:
            self._meter.begin_step(step)
        with self._failures_reported():
            if self._elastic is not None:
                self._elastic.round(step, num_batches, self._first_batch)
            else:
                for action in self.program.stages[self._job.rank].step(
                    step, num_batches, first_batch=self._first_batch
                ):
                    self._interpreter.execute(action, self._first_batch)
        before, self._step_end = self._step_end, time.monotonic()
        if before is not None:
            self._patience.saw_step(self._step_end - before)

    def _losses_until(self, batch: int) -> list[Tensor]:
        return self._interpreter.take_losses(batch)

    def _gradient_difference(self, batch: int) -> list[float | None]:
        """A batch through the kept weights, forward and back, over the same links.

        Every stage is between the same two local steps, so the only messages that lie on the links are gradients of
        later batches, which stay there. In a drain the END of the activations has passed, so they get one more session.
        """
        assert self._probe is not None
        with self._failures_reported("gradient difference", batch):
            activation = self._receive_probe(batch)
            output = self._probe.forward(activation, batch)
            gradients = self._links.exchange_probe(batch, output, ends_session=self._draining)
            self._links.send_probe(batch, self._probe.backward(gradients))
            return all_gather_json(self._probe.difference(batch), self._job.group)

    def _receive_probe(self, batch: int) -> Activation:
        assert self._probe is not None
        incoming = self._links.activations_in
        if incoming is None:
            return self._probe.take_input(batch)
        if self._draining:
            incoming.open()
        activation = self._links.receive_activation(batch)
        if self._draining:
            incoming.get(batch)
        return activation

    # -- evaluation and state ------------------------------------------------------------------------------------

    def _evaluate(self, batches: Batches | None, metric: Metric) -> float:
        total, samples = self._evaluate_stage(batches, metric)
        with self._failures_reported("evaluation"):
            total, samples = broadcast_json([total, samples], self._job.world_size - 1, self._job.group)
        return mean(total, samples)

    def _evaluate_stage(self, batches: Batches | None, metric: Metric) -> tuple[float, int]:
        score = Score(metric, self.stage.precision)
        self._begin_session()
        with self._failures_reported("evaluation"):
            feed = Feed(batches, self.stage.device) if self.stage.is_first else None
            if self._links.activations_in is not None:
                self._links.activations_in.open()
        with self.stage.evaluation_mode():
            for batch in itertools.count():
                with self._failures_reported("evaluation", batch):
                    activation = self._next_to_evaluate(feed, batch)
                    if activation is None:
                        break
                    activation = self.stage.infer(activation, batch)
                    if self._links.activations_out is None:
                        score.add(activation, self.stage.device)
                    else:
                        self._links.activations_out.flush()
                        self._links.send_activation(batch, activation)
        with self._failures_reported("evaluation"):
            self._links.send_end(batch)
            self._links.flush()
            return score.totals()

    def _next_to_evaluate(self, feed: Feed | None, batch: int) -> Activation | None:
        """The activation of a batch; None after the last."""
        if feed is not None:
            return feed.take() if feed.another() else None
        return self._links.next_activation(batch)

    @property
    def held_stages(self) -> Sequence[Stage]:
        return [self.stage]

    def snapshot(self, take: TakeSnapshot) -> Cut:
        self._end_left_session()
        return super().snapshot(take)

    def _snapshot(self, take: TakeSnapshot) -> None:
        self.complete_snapshots()
        probe = None if self._probe is None else self._probe.snapshot()
        add_messages = take(
            self._job.rank,
            {
                "stage": snapshot_stage(self.stage),
                "interpreter": snapshot_interpreter(self._interpreter),
                "probe": probe,
                "course": None if self._elastic is None else self._elastic.course.snapshot(),
            },
        )
        if self._elastic is not None:
            self._num_snapshots += 1
            self._snapshot_under_way = ElasticSnapshot(
                self._links,
                number=self._num_snapshots,
                batch=self.num_batches,
                in_session=self._running,
                finished=add_messages,
            )
            return
        self._snapshot_under_way = LinkSnapshot(
            self.program,
            self._job.rank,
            self._links,
            step=self._steps,
            num_batches=self._entered if self._is_draining else None,
            first_batch=self._first_batch,
            finished=add_messages,
        )

    def complete_snapshots(self) -> None:
        if self._snapshot_under_way is not None:
            with self._failures_reported("save"):
                self._snapshot_under_way.complete()
            self._snapshot_under_way = None

    def check(self, stages: Mapping[int, Mapping[str, Any]]) -> None:
        snapshot = stages[self.stage.index]
        check_stage(self.stage, snapshot["stage"])
        if self._elastic is not None:
            check_course(self._elastic.course, snapshot["course"])

    def _restore(self, cut: Cut, stages: Mapping[int, Mapping[str, Any]]) -> None:
        snapshot = stages[self.stage.index]
        restore_stage(self.stage, snapshot["stage"])
        restore_interpreter(self._interpreter, snapshot["interpreter"])
        if self._probe is not None and snapshot["probe"] is not None:
            self._probe.restore(snapshot["probe"])
        if self._elastic is not None:
            self._elastic.course.restore(snapshot["course"])
            restore_elastic_links(self._links, snapshot["messages"])
            return
        restore_links(
            self.program,
            self._job.rank,
            self._links,
            snapshot["messages"],
            step=cut.steps,
            num_batches=cut.entered if cut.steps > cut.entered else None,
            first_batch=cut.first_batch,
        )

    def state_dict(self) -> dict[str, Tensor]:
        self._end_left_session()
        own = stage_state(self.stage)
        with self._failures_reported("state_dict"):
            states = all_gather_tensors(own, self._job.group)
            return {name: value for state in states for name, value in state.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self._end_left_session()
        load_stage_state(self.stage, state)

    def optimizer_state_dict(self) -> dict[str, Any]:
        self._end_left_session()
        own = optimizer_state(self.stage)
        with self._failures_reported("optimizer_state_dict"):
            return merge_optimizer_states(
                [share_optimizer_state(own, rank, self._job) for rank in range(self._job.world_size)]
            )

    def load_optimizer_state_dict(self, state: Mapping[str, Any]) -> None:
        self._end_left_session()
        load_optimizer_state(self.stage, state)

    @property
    def learning_rate(self) -> float | None:
        return self.stage.learning_rate

    def traces(self) -> list[Trace]:
        self._end_left_session()
        own = {name: torch.tensor(values) for name, values in self._interpreter.trace.columns().items()}
        with self._failures_reported():
            columns = all_gather_tensors(own, self._job.group)
            return [
                Trace.from_columns(rank, {name: values.tolist() for name, values in of_rank.items()})
                for rank, of_rank in enumerate(columns)
            ]

    def usages(self) -> list[StageUsage]:
        self._end_left_session()
        own = self._interpreter.usage().as_json()
        with self._failures_reported("usages"):
            return [StageUsage.from_json(usage) for usage in all_gather_json(own, self._job.group)]

    def orders(self) -> Orders:
        self._end_left_session()
        if self._elastic is None:
            return ()
        with self._failures_reported("orders"):
            everyone = all_gather_json(list(self._elastic.course.orders), self._job.group)
            return tuple(tuple(cycles) for cycles in everyone)

    # -- failures ------------------------------------------------------------------------------------------------

    @contextmanager
    def _failures_reported(self, action: str | None = None, batch: int | None = None) -> Iterator[None]:
        """Tell the other ranks of an error, or say which other rank's error ended this one.

        Args:
            action: what goes on, in words; None: what the interpreter says.
            batch: of the action, where it has one.
        """
        monitor = self._job.monitor
        around, self._doing = self._doing, (action, batch)
        self._place.enter(action, batch)
        try:
            yield
        except Exception as error:
            action, batch = self._described(action, batch)
            cause = monitor.report(error, batch=batch, action=action)
            if cause is not None:
                raise cause from None
            raise
        self._doing = around
        if around is None or around[0] is None:
            self._place.leave()
        else:
            self._place.enter(*around)

    def _described(self, action: str | None, batch: int | None) -> tuple[str | None, int | None]:
        """What goes on: as given, or what the interpreter does."""
        if action is None and self._interpreter.action is not None:
            return self._interpreter.action.name.lower().replace("_", " "), self._interpreter.batch
        return action, batch

    def statuses(self) -> list[dict[str, Any]]:
        shown = self._job.monitor.statuses()
        return [shown[rank] for rank in sorted(shown) if shown[rank]]

    def _status(self) -> dict[str, Any]:
        doing = None if self._doing is None else self._described(*self._doing)
        status = {**self._interpreter.status(), **self._links.waiting(), "doing": doing}
        if self._elastic is not None:
            status["staleness_counts"] = self._elastic.course.staleness_counts
        return status


def _see_last_messages(
    end_left_session: Callable[[], Callable[[], None] | None], receivers: Sequence[Receiver]
) -> None:
    """Before the ranks part: end what was left, and wait for the last END of every peer, so that nothing is cut off."""
    end = end_left_session()
    if end is not None:
        end()
    for receiver in receivers:
        receiver.join(CLOSE_S)
