"""Time that only actions move: the logical clock of the sequential engine.

Each stage has a clock of its own. An action begins where the stage's last one ended, takes the time it is given, and
a receive ends no earlier than its message arrives:

    stage 0   |F0|s|F1|s|F2|s|R0|.......|B0|         s: send; its end + latency is the arrival
    stage 1        |F0|R.. ..|B0|s|

So a run in one process, one stage after another, leaves the trace that K processes with exactly these times would.
"""

from __future__ import annotations

from collections.abc import Callable

from stalewise.protocol.actions import Action, Kind

__all__ = ["LogicalTime"]

_ARRIVES_AS = {
    Kind.SEND_ACTIVATION: (1, Kind.RECEIVE_ACTIVATION),
    Kind.SEND_GRADIENT: (-1, Kind.RECEIVE_GRADIENT),
    Kind.SEND_LOSS: (-1, Kind.RECEIVE_LOSS),
    Kind.SEND_TOKEN: (None, Kind.RECEIVE_TOKEN),
}


class LogicalTime:
    """The clocks of all stages.

    Args:
        num_stages: K.
        duration: nanoseconds that an action of a stage takes.
        latency_ns: from the end of a send to the arrival of its message.
    """

    def __init__(self, num_stages: int, duration: Callable[[int, Action], int], *, latency_ns: int = 0) -> None:
        self._duration, self._latency_ns = duration, latency_ns
        self._now = [0] * num_stages
        self._began: list[int | None] = [None] * num_stages
        self._arrivals: dict[tuple[int, Action], int] = {}

    def clock(self, stage: int) -> Callable[[], int]:
        """Of one stage. Within an action it shows the begin once, and then the end."""

        def read() -> int:
            began, self._began[stage] = self._began[stage], None
            return self._now[stage] if began is None else began

        return read

    def act(self, stage: int, action: Action) -> None:
        """A stage is about to act; whoever sends what it receives has done so."""
        begin = self._now[stage]
        arrival = self._arrivals.pop((stage, action), begin)
        end = max(begin, arrival) + self._duration(stage, action)
        if action.kind in _ARRIVES_AS:
            to, kind = _ARRIVES_AS[action.kind]
            receiver = 0 if to is None else stage + to
            self._arrivals[receiver, Action(kind, action.batch, action.micro_batch)] = end + self._latency_ns
        self._began[stage], self._now[stage] = begin, end
