"""Which messages lie on a link between two local steps.

A checkpoint cuts a run between local step n - 1 and n of every stage, each at its own time. What one stage sends in a
step before n and another receives in step n or later belongs to the cut:

    stage k+1    .. SEND_G n-1-m_{k+1} | n
                                        ╲
    stage k      .. RECV_G n-1-m_k     |  n: RECV_G n-m_k ..      on the link: gradients n-m_k .. n-1-m_{k+1}

Which they are follows from the programs alone, so no stage has to be asked where it stands.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from types import MappingProxyType

from stalewise.protocol.actions import Action, Kind
from stalewise.protocol.program import StageProgram

__all__ = ["RECEIVED_AS", "in_flight"]

RECEIVED_AS: Mapping[Kind, Kind] = MappingProxyType(
    {
        Kind.SEND_ACTIVATION: Kind.RECEIVE_ACTIVATION,
        Kind.SEND_GRADIENT: Kind.RECEIVE_GRADIENT,
        Kind.SEND_LOSS: Kind.RECEIVE_LOSS,
        Kind.SEND_TOKEN: Kind.RECEIVE_TOKEN,
    }
)
"""What is sent by an action is received by which."""


def in_flight(
    sender: StageProgram,
    receiver: StageProgram,
    kinds: Collection[Kind],
    *,
    step: int,
    num_batches: int | None = None,
) -> list[Action]:
    """Messages that were sent before local step `step` and are received from it on, in the order of sending.

    Args:
        sender: program of the stage that sends.
        receiver: program of the stage that receives.
        kinds: of receiving actions that share the link's queue.
        step: the cut, in local steps since the last drain.
        num_batches: batches of this cycle where their end has come, as in `StageProgram.step`.

    Returns:
        The actions that receive them, with batches counted from the start of the cycle.
    """
    due = {
        action
        for index in range(step, step + receiver.max_lag + 1)
        for action in receiver.step(index, num_batches)
        if action.kind in kinds
    }
    sent = (
        Action(RECEIVED_AS[action.kind], action.batch, action.micro_batch)
        for index in range(max(0, step - receiver.max_lag), step)
        for action in sender.step(index, num_batches)
        if action.kind in RECEIVED_AS
    )
    return [action for action in sent if action in due]
