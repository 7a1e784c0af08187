"""What lies on the links to an elastic stage at a cut.

The cut is after the same number of forwards on every stage, so no activation lies on a link. How many gradients do
depends on timing, so each stage tells the one above where its cut is: a MARK follows the last gradient before it.

    stage k+1    .. B 5  SEND_G 5 | MARK  B 6  SEND_G 6
                              ╲        ╲
    stage k      .. B 3          |  RECV_G 4  RECV_G 5  MARK      part of the cut: gradients 4 and 5

No gradient from after the cut of stage k+1 is used before that of stage k: what stage k is forced to backward before
its cut, stage k+1 is forced to backward before its own, because its bound is no larger; and what stage k backwards of
its own accord before it forwards batch n - 1, came before stage k+1 had that batch. Between sessions no MARK is needed:
the END of the gradients has come, and all that is there belongs to the cut.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from stalewise.engine.messages import Gradient, messages_value
from stalewise.protocol.actions import Kind
from stalewise.runtime.stage_links import StageLinks, frame_gradient, gradient_frame
from stalewise.runtime.wire import Frame, MessageKind

__all__ = ["ElasticSnapshot", "restore_elastic_links"]


class ElasticSnapshot:
    """Collects the gradients of one cut.

    Args:
        links: to and from the stage; no other snapshot of them is under way.
        number: of the snapshot in this pipeline, the same on all ranks.
        batch: global index of the next batch, for errors.
        in_session: whether messages of a session may still come.
        finished: told of the messages, as `messages_value` has them, as soon as the last one is known.
    """

    def __init__(
        self,
        links: StageLinks,
        *,
        number: int,
        batch: int,
        in_session: bool,
        finished: Callable[[dict[str, Any]], None],
    ) -> None:
        self._links = links
        self._batch = batch
        self._number = number
        self._finished = finished
        self._gradients: dict[int, Gradient] = {}
        self._complete = False
        if not in_session:
            self._take(links.gradients_here())
            self._finish()
            return
        links.mark(number)
        if links.gradients_in is None:
            self._finish()
            return
        links.on_received = self._note
        links.on_mark = self._marked

    def complete(self) -> None:
        """Wait for the messages that are missing; they stay in their queues."""
        if self._complete:
            return
        assert self._links.gradients_in is not None
        for frame in self._links.gradients_in.ahead(self._batch):
            self._take([frame])
            if frame.kind is MessageKind.MARK and frame.batch == self._number:
                self._finish()
                return

    def _take(self, frames: Iterable[Frame]) -> None:
        for frame in frames:
            if frame.kind is MessageKind.GRADIENT:
                self._gradients[frame.batch] = frame_gradient(frame)

    def _note(self, kind: Kind, batch: int, micro_batch: int | None, message: Any) -> None:
        if kind is Kind.RECEIVE_GRADIENT:
            self._gradients[batch] = message

    def _marked(self, number: int) -> None:
        if number == self._number:
            self._finish()

    def _finish(self) -> None:
        self._complete = True
        self._links.on_received = self._links.on_mark = None
        gradients, self._gradients = sorted(self._gradients.items()), {}
        self._finished(messages_value(activations=(), gradients=gradients, losses=(), tokens=()))


def restore_elastic_links(links: StageLinks, messages: Mapping[str, Any]) -> None:
    """Put the gradients of a cut back into the queue of the link to a stage.

    Args:
        links: that nothing came over yet.
        messages: of `messages_value`.
    """
    if links.gradients_in is not None:
        links.gradients_in.preload(gradient_frame(batch, Gradient(**value)) for batch, value in messages["gradients"])
