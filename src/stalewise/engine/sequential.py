"""All stages in one process, one after another: the executable reference.

In every round each stage completes one local step. A stage is left as soon as it needs a message that is not there
yet, and taken up again in the next sweep over the stages:

    round n, m = (2,1,0):   stage 0: F n .. waits?  no: gradient n-2 came in round n-1   -> done
                            stage 1: F n, B n-1 ..                                        -> done
    round n, m = (0,0):     stage 0: F n, then RECV_G n is missing -> stage 1: F n, B n -> stage 0: B n
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, TypeVar

from torch import Tensor

from stalewise.engine.brake import Brake
from stalewise.engine.engine import Batches, Cut, Engine, TakeSnapshot
from stalewise.engine.feed import Feed
from stalewise.engine.gradient_probe import GradientProbe
from stalewise.engine.interpreter import Interpreter
from stalewise.engine.logical_time import LogicalTime
from stalewise.engine.memory import MemoryMeter, StageUsage
from stalewise.engine.messages import Activation, Gradient, message_tensors, messages_value
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
    check_stage_state,
    load_optimizer_state,
    load_stage_state,
    merge_optimizer_states,
    optimizer_state,
    stage_state,
)
from stalewise.errors import ProgramError
from stalewise.protocol.actions import Action, Kind
from stalewise.protocol.course import Course, Orders, courses_of
from stalewise.protocol.program import Program
from stalewise.protocol.stragglers import NO_STRAGGLERS, Stragglers
from stalewise.protocol.trace import Trace

__all__ = ["SequentialEngine"]


_RECEIVE = Action(Kind.RECEIVE_ACTIVATION, 0)


class SequentialEngine(Engine):
    """Executes the program of every stage in this process.

    Args:
        program: of the method.
        stages: all K of them, on one device.
        gradient_difference_every: see `Engine`.
        measure_memory: whether to measure what the stages hold; see `engine.memory`.
        stragglers: steps that are slow on purpose.
        logical_time: by which traces are kept instead of real time; None: real time.
        replay: the order of each stage of an elastic program, to be repeated; None: the rule decides.
        guard: what becomes of batches whose loss is not finite.
    """

    def __init__(
        self,
        program: Program,
        stages: Sequence[Stage],
        *,
        gradient_difference_every: int | None = None,
        measure_memory: bool = False,
        stragglers: Stragglers = NO_STRAGGLERS,
        logical_time: LogicalTime | None = None,
        replay: Orders | None = None,
        guard: LossGuard = GO_ON,
    ) -> None:
        super().__init__(program, gradient_difference_every=gradient_difference_every)
        every = gradient_difference_every
        self._probes = [] if every is None else [GradientProbe(stage, every=every) for stage in stages]
        self.stages = tuple(stages)
        self._feed = Feed((), self.stages[0].device)
        self._drain = True
        self._logical_time = logical_time
        self._courses = courses_of(program, replay)
        for stage, _ in zip(stages, self._courses, strict=False):
            stage.keep_buffers_of_recomputes()
        self._links = [_LocalLinks(self) for _ in stages]
        for upper, lower in zip(self._links, self._links[1:], strict=False):
            upper.after, lower.before = lower, upper
        self._meters = [MemoryMeter(stage, max_lag=program.max_lag) for stage in stages] if measure_memory else []
        self._interpreters = [
            Interpreter(
                stage,
                program.stages[stage.index],
                links,
                clock=time.perf_counter_ns if logical_time is None else logical_time.clock(stage.index),
                probe=self._probes[stage.index] if every else None,
                meter=self._meters[stage.index] if measure_memory else None,
                waiting=links.waiting,
                brake=Brake(stragglers, stage.index, stage.device) if stragglers else None,
                guard=guard,
            )
            for stage, links in zip(stages, self._links, strict=True)
        ]

    @property
    def held_stages(self) -> Sequence[Stage]:
        return self.stages

    @property
    def first_links(self) -> _LocalLinks:
        """Of stage 0."""
        return self._links[0]

    def next_batch(self) -> Activation:
        """The batch that the data loader gave for this round."""
        return self._feed.take()

    def _open(self, batches: Batches | None, drain: bool) -> None:
        self._feed = Feed(batches, self.stages[0].device)
        self._drain = drain

    def _another_batch(self) -> bool:
        return not self._leaving and self._feed.another()

    def _close(self) -> bool:
        return self._drain or self._leaving

    def _finish(self) -> None:
        pass

    def _execute_step(self, step: int, num_batches: int | None) -> None:
        for meter in self._meters:
            meter.begin_step(step)
        if self._courses:
            self._execute_round(step, num_batches)
            return
        streams = [deque(stage.step(step, num_batches, first_batch=self._first_batch)) for stage in self.program.stages]
        while any(streams):
            progress = False
            for interpreter, links, stream in zip(self._interpreters, self._links, streams, strict=True):
                while stream and links.has_what_it_needs(stream[0]):
                    self._act(interpreter.stage.index, stream.popleft())
                    progress = True
            if not progress:
                waiting = ", ".join(f"stage {k} at {stream[0]}" for k, stream in enumerate(streams) if stream)
                raise ProgramError(f"V9: deadlock in step {step}: {waiting}. Check the program with validate.check.")

    def _execute_round(self, step: int, num_batches: int | None) -> None:
        """A round of elastic stages, each as far as it can get; real time has no say in what they choose."""
        draining = num_batches is not None and step >= num_batches
        if step == 0:
            for course in self._courses:
                course.begin_cycle()
        to_forward = [not draining] * len(self._courses)
        while True:
            progress = waiting = False
            for stage, course in enumerate(self._courses):
                while to_forward[stage] or course.must_backward or (draining and course.is_due(step, self._entered)):
                    kind = self._choice(stage, course, forwards=to_forward[stage])
                    if kind is None:
                        waiting = True
                        break
                    for action in course.actions(kind):
                        self._act(stage, action)
                    course.did(kind, self.stages[stage].num_updates)
                    to_forward[stage] = to_forward[stage] and kind is not Kind.FORWARD
                    progress = True
            if not waiting:
                return
            if not progress:
                raise ProgramError(f"V9: deadlock in round {step}; the order of no stage can go on.")

    def _choice(self, stage: int, course: Course, *, forwards: bool) -> Kind | None:
        links = self._links[stage]
        kind = course.choose(
            activation_ready=forwards and (stage == 0 or links.has_what_it_needs(_RECEIVE)),
            gradients_waiting=links.gradients_waiting,
        )
        if kind is None and not forwards:
            # Nothing to decide any more: what is left is to backward, as soon as the gradient is there.
            kind = course.next_backward()
            if kind is Kind.BACKWARD and not course.has_gradient:
                return None
        return kind

    def _act(self, stage: int, action: Action) -> None:
        if self._logical_time is not None:
            self._logical_time.act(stage, action)
        self._interpreters[stage].execute(action, self._first_batch)

    def _losses_until(self, batch: int) -> list[Tensor]:
        # Of the last stage, which has computed them the longest ago: on a GPU they are in host memory by now.
        *_, last = [interpreter.take_losses(batch) for interpreter in self._interpreters]
        return last

    def _gradient_difference(self, batch: int) -> list[float | None]:
        activation = self._probes[0].take_input(batch)
        for probe in self._probes:
            activation = probe.forward(activation, batch)
        gradients = None
        for probe in reversed(self._probes):
            gradients = probe.backward(gradients)
        return [probe.difference(batch) for probe in self._probes]

    def _evaluate(self, batches: Batches | None, metric: Metric) -> float:
        feed = Feed(batches, self.stages[0].device)
        score = Score(metric, self.stages[-1].precision)
        index = 0
        with ExitStack() as modes:
            for stage in self.stages:
                modes.enter_context(stage.evaluation_mode())
            while feed.another():
                activation = feed.take()
                for stage in self.stages:
                    activation = stage.infer(activation, index)
                score.add(activation, self.stages[-1].device)
                index += 1
        return mean(*score.totals())

    def _snapshot(self, take: TakeSnapshot) -> None:
        for stage, interpreter, links in zip(self.stages, self._interpreters, self._links, strict=True):
            probe = self._probes[stage.index].snapshot() if self._probes else None
            add_messages = take(
                stage.index,
                {
                    "stage": snapshot_stage(stage),
                    "interpreter": snapshot_interpreter(interpreter),
                    "probe": probe,
                    "course": self._courses[stage.index].snapshot() if self._courses else None,
                },
            )
            add_messages(links.snapshot())

    def complete_snapshots(self) -> None:
        pass

    def check(self, stages: Mapping[int, Mapping[str, Any]]) -> None:
        for stage in self.stages:
            check_stage(stage, stages[stage.index]["stage"])
            if self._courses:
                check_course(self._courses[stage.index], stages[stage.index]["course"])

    def _restore(self, cut: Cut, stages: Mapping[int, Mapping[str, Any]]) -> None:
        for stage, interpreter, links in zip(self.stages, self._interpreters, self._links, strict=True):
            snapshot = stages[stage.index]
            restore_stage(stage, snapshot["stage"])
            restore_interpreter(interpreter, snapshot["interpreter"])
            links.restore(snapshot["messages"])
            if self._probes and snapshot["probe"] is not None:
                self._probes[stage.index].restore(snapshot["probe"])
            if self._courses:
                self._courses[stage.index].restore(snapshot["course"])

    def state_dict(self) -> dict[str, Tensor]:
        return {name: value for stage in self.stages for name, value in stage_state(stage).items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        for stage in self.stages:
            check_stage_state(stage, state)
        for stage in self.stages:
            load_stage_state(stage, state)

    def optimizer_state_dict(self) -> dict[str, Any]:
        return merge_optimizer_states([optimizer_state(stage) for stage in self.stages])

    def load_optimizer_state_dict(self, state: Mapping[str, Any]) -> None:
        for stage in self.stages:
            load_optimizer_state(stage, state)

    def usages(self) -> list[StageUsage]:
        return [interpreter.usage() for interpreter in self._interpreters]

    def statuses(self) -> list[dict[str, Any]]:
        statuses = [interpreter.status() for interpreter in self._interpreters]
        for status, course in zip(statuses, self._courses, strict=False):
            status["staleness_counts"] = course.staleness_counts
        return statuses

    def orders(self) -> Orders:
        return tuple(course.orders for course in self._courses)

    @property
    def learning_rate(self) -> float | None:
        return next((stage.learning_rate for stage in self.stages if stage.learning_rate is not None), None)

    def traces(self) -> list[Trace]:
        return [interpreter.trace for interpreter in self._interpreters]


class _LocalLinks:
    """The four queues that a stage sees, within one process."""

    def __init__(self, engine: SequentialEngine) -> None:
        self.before: _LocalLinks | None = None
        self.after: _LocalLinks | None = None
        self._engine = engine
        self._activations: deque[tuple[int, Activation]] = deque()
        self._gradients: deque[tuple[int, Gradient]] = deque()
        self._losses: deque[tuple[int, Tensor]] = deque()
        self._tokens: deque[tuple[int, None]] = deque()

    def has_what_it_needs(self, action: Action) -> bool:
        if action.kind is Kind.RECEIVE_ACTIVATION:
            return bool(self._activations)
        if action.kind is Kind.RECEIVE_GRADIENT:
            return bool(self._gradients)
        if action.kind is Kind.RECEIVE_LOSS:
            return bool(self._losses)
        if action.kind is Kind.RECEIVE_TOKEN:
            return bool(self._tokens)
        return True

    @property
    def gradients_waiting(self) -> int:
        """Gradients that came and were not received yet."""
        return len(self._gradients)

    def waiting(self) -> Iterator[Tensor]:
        """What was sent to this stage and not received yet."""
        for _, activation in self._activations:
            yield from message_tensors(activation)
        for _, gradient in self._gradients:
            yield from message_tensors(gradient)
        for _, loss in self._losses:
            yield loss

    def snapshot(self) -> dict[str, Any]:
        """The same as plain values; see `messages_value`."""
        return messages_value(
            activations=self._activations, gradients=self._gradients, losses=self._losses, tokens=self._tokens
        )

    def restore(self, snapshot: Mapping[str, Any]) -> None:
        """The inverse of `snapshot`."""
        self._activations.extend((batch, Activation(**value)) for batch, value in snapshot["activations"])
        self._gradients.extend((batch, Gradient(**value)) for batch, value in snapshot["gradients"])
        self._losses.extend((batch, loss) for batch, loss in snapshot["losses"])
        self._tokens.extend((batch, None) for batch in snapshot["tokens"])

    def load(self, batch: int) -> Activation:
        return self._engine.next_batch()

    def receive_activation(self, batch: int) -> Activation:
        return _expect(batch, *self._activations.popleft())

    def send_activation(self, batch: int, activation: Activation) -> None:
        assert self.after is not None, "the last stage sends no activation (V1)"
        self.after._activations.append((batch, activation))

    def receive_gradient(self, batch: int) -> Gradient:
        return _expect(batch, *self._gradients.popleft())

    def send_gradient(self, batch: int, gradient: Gradient) -> None:
        assert self.before is not None, "the first stage sends no gradient (V1)"
        self.before._gradients.append((batch, gradient))

    def receive_loss(self, batch: int) -> Tensor:
        return _expect(batch, *self._losses.popleft())

    def send_loss(self, batch: int, loss: Tensor) -> None:
        assert self.before is not None, "the first stage sends no loss (V1)"
        self.before._losses.append((batch, loss))

    def receive_token(self, batch: int) -> None:
        _expect(batch, *self._tokens.popleft())

    def send_token(self, batch: int) -> None:
        self._engine.first_links._tokens.append((batch, None))


Message = TypeVar("Message")


def _expect(batch: int, arrived: int, message: Message) -> Message:
    assert arrived == batch, f"batch {arrived} at the head of a link where {batch} is due (V6)"
    return message
