"""What a stage can do, as plain values that print and parse.

    LOAD7     take batch 7 from the data loader          (first stage)
    RECV_A7   receive the activation of batch 7          (from the stage before)
    F7        forward batch 7
    SEND_A7   send its output to the next stage
    R3        recompute batch 3: forward again, with a graph, with the current weights
    RECV_G3   receive the gradient of batch 3            (from the stage after)
    B3        backward batch 3
    SEND_G3   send the gradient of its input to the stage before
    U         update the weights with the gradients accumulated since the last update

Some methods need more:

    S7        predict (synthesize) the gradient of the output for batch 7
    T7        train the predictor with the gradient that came for batch 7
    SEND_T7   tell the first stage that batch 7 was forwarded (last stage), and
    RECV_T7   wait for it: the forward dependency of Features Replay and DDG
    SEND_L7   tell the loss of batch 7 to the stage before, where no gradient message carries it, and
    RECV_L7   take it from the stage after

A micro-batch is written after a point: `F7.1` is micro-batch 1 of batch 7.
"""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass

from stalewise.errors import ProgramError

__all__ = ["COMPUTE", "Action", "Kind"]


class Kind(enum.Enum):
    """The kind of an action; its value is how it prints."""

    LOAD = "LOAD"
    RECEIVE_ACTIVATION = "RECV_A"
    FORWARD = "F"
    SEND_ACTIVATION = "SEND_A"
    RECOMPUTE = "R"
    RECEIVE_GRADIENT = "RECV_G"
    BACKWARD = "B"
    SEND_GRADIENT = "SEND_G"
    UPDATE = "U"
    SYNTHESIZE = "S"
    TRAIN_SYNTHESIZER = "T"
    SEND_TOKEN = "SEND_T"
    RECEIVE_TOKEN = "RECV_T"
    SEND_LOSS = "SEND_L"
    RECEIVE_LOSS = "RECV_L"


COMPUTE = frozenset({Kind.FORWARD, Kind.RECOMPUTE, Kind.BACKWARD, Kind.UPDATE, Kind.SYNTHESIZE, Kind.TRAIN_SYNTHESIZER})
"""The kinds that keep the stage's device busy; the others move data."""

_KINDS = {kind.value: kind for kind in Kind}
_NUMBER = "(0|[1-9][0-9]{0,17})"
_PATTERN = re.compile(rf"([A-Z_]+?)(?:{_NUMBER}(?:\.{_NUMBER})?)?")


@dataclass(frozen=True, slots=True)
class Action:
    """One action of one stage.

    Args:
        kind: what is done.
        batch: index of the batch, counted from the start of the program; None for an update.
        micro_batch: index within the batch, or None where a batch is not split.
    """

    kind: Kind
    batch: int | None = None
    micro_batch: int | None = None

    def __str__(self) -> str:
        batch = "" if self.batch is None else str(self.batch)
        return self.kind.value + batch + ("" if self.micro_batch is None else f".{self.micro_batch}")

    @classmethod
    def parse(cls, text: str) -> Action:
        """The action that prints as `text`.

        Raises:
            ProgramError: where no action prints so.
        """
        match = _PATTERN.fullmatch(text.strip())
        kind = _KINDS.get(match[1]) if match else None
        if match is None or kind is None or (match[2] is None) != (kind is Kind.UPDATE):
            raise ProgramError(
                f"{text!r} is not an action; an action is one of {', '.join(_KINDS)} followed by a batch index, "
                "such as F7 or SEND_G3.1, or U alone."
            )
        return cls(kind, *(None if number is None else int(number) for number in match.groups()[1:]))
