"""What lies on the links to a stage at a cut, collected without stopping anybody.

Stage k may be some steps ahead of stage k+1, so the gradients that k+1 sends before the cut may not be here yet when k
reaches it. Which they are is known (`protocol.in_flight`); each is noted when the stage takes it in one of its next
steps, and the checkpoint waits for the last of them. Where a session ends before, they lie in the queue by then.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from stalewise.engine.messages import Activation, Gradient, messages_value
from stalewise.protocol.actions import Action, Kind
from stalewise.protocol.in_flight import in_flight
from stalewise.protocol.program import Program
from stalewise.runtime.link import Receiver
from stalewise.runtime.stage_links import (
    StageLinks,
    activation_frame,
    frame_activation,
    frame_gradient,
    gradient_frame,
)
from stalewise.runtime.wire import Frame, MessageKind

__all__ = ["LinkSnapshot", "restore_links"]

_FRAME_KINDS = {
    MessageKind.ACTIVATION: Kind.RECEIVE_ACTIVATION,
    MessageKind.GRADIENT: Kind.RECEIVE_GRADIENT,
    MessageKind.LOSS: Kind.RECEIVE_LOSS,
    MessageKind.TOKEN: Kind.RECEIVE_TOKEN,
}
_Key = tuple[Kind, int, int | None]


class LinkSnapshot:
    """Collects the messages of one cut.

    Args:
        program: of all stages.
        rank: of this stage.
        links: to and from it; no other snapshot of them is under way.
        step: the cut, in local steps since the last drain.
        num_batches: batches since the last drain where the pipeline drains, else None.
        first_batch: global index of the first of them.
        finished: told of the messages, as `messages_value` has them, as soon as the last one is known.
    """

    def __init__(
        self,
        program: Program,
        rank: int,
        links: StageLinks,
        *,
        step: int,
        num_batches: int | None,
        first_batch: int,
        finished: Callable[[dict[str, Any]], None],
    ) -> None:
        self._links = links
        self._finished = finished
        self._expected: list[tuple[Receiver, list[_Key]]] = [
            (
                receiver,
                [
                    _key(action, first_batch)
                    for action in in_flight(
                        program.stages[sender], program.stages[rank], kinds, step=step, num_batches=num_batches
                    )
                ],
            )
            for receiver, sender, kinds in _inputs(program, rank, links)
        ]
        self._missing = {key for _, keys in self._expected for key in keys}
        self._messages: dict[_Key, Any] = {}
        links.on_received = self._note
        self._finish_if_complete()

    def complete(self) -> None:
        """Wait for the messages that are missing; they stay in their queues."""
        for receiver, keys in self._expected:
            left = [key for key in keys if key in self._missing]
            if not left:
                continue
            for frame in receiver.ahead(left[0][1]):
                if frame.kind in _FRAME_KINDS:
                    self._note(_FRAME_KINDS[frame.kind], frame.batch, frame.micro_batch, _message(frame))
                    if left[-1] not in self._missing:
                        break

    def _note(self, kind: Kind, batch: int, micro_batch: int | None, message: Any) -> None:
        key = (kind, batch, micro_batch)
        if key in self._missing:
            self._missing.discard(key)
            self._messages[key] = message
            self._finish_if_complete()

    def _finish_if_complete(self) -> None:
        if self._missing:
            return
        self._links.on_received = None
        ordered = [(key, self._messages[key]) for _, keys in self._expected for key in keys]

        def of(wanted: Kind) -> list[tuple[int, Any]]:
            return [(batch, message) for (kind, batch, _), message in ordered if kind is wanted]

        self._messages = {}
        self._finished(
            messages_value(
                activations=of(Kind.RECEIVE_ACTIVATION),
                gradients=of(Kind.RECEIVE_GRADIENT),
                losses=of(Kind.RECEIVE_LOSS),
                tokens=of(Kind.RECEIVE_TOKEN),
            )
        )


def restore_links(
    program: Program,
    rank: int,
    links: StageLinks,
    messages: Mapping[str, Any],
    *,
    step: int,
    num_batches: int | None,
    first_batch: int,
) -> None:
    """Put the messages of a cut back into the queues of the links to a stage, in the order in which they were sent.

    Args:
        program: see `LinkSnapshot`, as for the rest.
        rank: of this stage.
        links: that nothing came over yet.
        messages: of `messages_value`.
        step: the cut.
        num_batches: where the pipeline drains.
        first_batch: of the cycle.
    """
    frames: dict[_Key, Frame] = {}
    for batch, value in messages["activations"]:
        activation = Activation(**value)
        frames[Kind.RECEIVE_ACTIVATION, batch, activation.micro_batch] = activation_frame(batch, activation)
    for batch, value in messages["gradients"]:
        gradient = Gradient(**value)
        frames[Kind.RECEIVE_GRADIENT, batch, gradient.micro_batch] = gradient_frame(batch, gradient)
    for batch, loss in messages["losses"]:
        frames[Kind.RECEIVE_LOSS, batch, None] = Frame(MessageKind.LOSS, batch, [loss])
    for batch in messages["tokens"]:
        frames[Kind.RECEIVE_TOKEN, batch, None] = Frame(MessageKind.TOKEN, batch, [])
    for receiver, sender, kinds in _inputs(program, rank, links):
        sent = in_flight(program.stages[sender], program.stages[rank], kinds, step=step, num_batches=num_batches)
        receiver.preload(frames[_key(action, first_batch)] for action in sent)


def _inputs(program: Program, rank: int, links: StageLinks) -> list[tuple[Receiver, int, frozenset[Kind]]]:
    """The queues of a stage: the receiver, whose messages come over it, and what receives them."""
    inputs = [
        (links.activations_in, rank - 1, frozenset({Kind.RECEIVE_ACTIVATION})),
        (links.gradients_in, rank + 1, frozenset({Kind.RECEIVE_GRADIENT, Kind.RECEIVE_LOSS})),
        (links.tokens_in, program.num_stages - 1, frozenset({Kind.RECEIVE_TOKEN})),
    ]
    return [(receiver, sender, kinds) for receiver, sender, kinds in inputs if receiver is not None]


def _key(action: Action, first_batch: int) -> _Key:
    assert action.batch is not None, "messages are of batches"
    return action.kind, first_batch + action.batch, action.micro_batch


def _message(frame: Frame) -> Any:
    match frame.kind:
        case MessageKind.ACTIVATION:
            return frame_activation(frame)
        case MessageKind.GRADIENT:
            return frame_gradient(frame)
        case MessageKind.LOSS:
            return frame.leaves[0]
    return None
