"""An elastic stage on its own process: asks its course what to do, does it, and waits where there is nothing to do."""

from __future__ import annotations

import time
from collections.abc import Callable

from stalewise.engine.interpreter import Interpreter
from stalewise.protocol.actions import Kind
from stalewise.protocol.course import Course
from stalewise.runtime.stage_links import StageLinks
from stalewise.runtime.wire import MessageKind

__all__ = ["ElasticRank"]


class ElasticRank:
    """Rounds of one stage; see `protocol.course`.

    Args:
        course: decides, or repeats.
        interpreter: executes.
        links: where messages come from.
        wait: `links.wait_for_arrival`, as the engine calls it.
    """

    def __init__(
        self, course: Course, interpreter: Interpreter, links: StageLinks, *, wait: Callable[[int], None]
    ) -> None:
        self.course = course
        self._interpreter = interpreter
        self._links = links
        self._wait = wait
        interpreter.stage.keep_buffers_of_recomputes()

    def until_forward(self, batch: int, first_batch: int, another: Callable[[], bool]) -> bool:
        """Backward as long as the rule says so; blocks until the next batch is there, or the session ends.

        Args:
            batch: global index of the next batch to forward.
            first_batch: global index of the first batch of the cycle.
            another: whether the loader has another batch (first stage); waits for it.

        Returns:
            Whether the next batch is there and to be forwarded now; False: the session ends.
        """
        if batch == first_batch:
            self.course.begin_cycle()
        loads = self._links.activations_in is None
        while True:
            # Cleared before anything is looked at, so that nothing that comes meanwhile is slept over.
            self._links.arrivals.clear()
            head = MessageKind.ACTIVATION if loads else self._links.next_in_line(batch)
            if head is MessageKind.END:
                return False
            kind = self.course.choose(
                activation_ready=head is MessageKind.ACTIVATION, gradients_waiting=self._links.gradients_waiting()
            )
            if kind is None:
                self._wait(batch)
            elif kind is Kind.FORWARD:
                return another() if loads else True
            else:
                self._act(kind, first_batch)

    def round(self, step: int, num_batches: int | None, first_batch: int) -> None:
        """Forward a batch, and backward while too many are in flight; in a drain, backward what is due."""
        if num_batches is None or step < num_batches:
            self._act(Kind.FORWARD, first_batch)
            while self.course.must_backward:
                self._act(self.course.next_backward(), first_batch)
        else:
            while self.course.is_due(step, num_batches):
                self._act(self.course.next_backward(), first_batch)

    def _act(self, kind: Kind, first_batch: int) -> None:
        for action in self.course.actions(kind):
            self._interpreter.execute(action, first_batch)
        self.course.did(kind, time.perf_counter_ns())
