"""How long a rank waits for another before it calls it missing.

A wait ends too early where it is fixed and a step is slow, and too late where steps are quick. So it follows the steps:

    begin of a run, of a session; evaluation     FIRST_S, because data sets, compilers and users take their time there
    later                                        MULTIPLE slowest steps so far, at least FLOOR_S
    no sign of life (see `monitor.Monitor`)      SILENCE_S, whatever goes on

A user's own number replaces the first two, and one and a half times it, at least LEAST_SILENCE_S, the third: a message
that does not come is the better account of who is missing.
"""

from __future__ import annotations

from collections.abc import Iterator

__all__ = ["FIRST_S", "Patience"]

FIRST_S = 600.0
FLOOR_S = 120.0
MULTIPLE = 20.0
STEPS = 20
"""Before the slowest of them says something."""

SILENCE_S = 30.0
LEAST_SILENCE_S = 5.0
"""A busy machine may keep the thread that gives signs of life from running for so long."""

SLICE_S = 0.5


class Patience:
    """Of one rank, in one pipeline.

    Args:
        fixed_s: seconds to wait for a message, whatever the steps take; None: adapt to them.
    """

    def __init__(self, fixed_s: float | None = None) -> None:
        self._fixed_s = fixed_s
        self._slowest_s = 0.0
        self._steps = 0
        self._session_steps = 0

    def begin_session(self) -> None:
        """The next message may take long."""
        self._session_steps = 0

    def saw_step(self, seconds: float) -> None:
        """A local step of this rank is over, with all its waits and what the user did since the one before."""
        self._slowest_s = max(self._slowest_s, seconds)
        self._steps += 1
        self._session_steps += 1

    @property
    def message_s(self) -> float:
        """For a message, now."""
        if self._fixed_s is not None:
            return self._fixed_s
        if self._steps < STEPS or not self._session_steps:
            return max(FIRST_S, MULTIPLE * self._slowest_s)
        return max(FLOOR_S, MULTIPLE * self._slowest_s)

    @property
    def silence_s(self) -> float:
        """For a sign of life."""
        return SILENCE_S if self._fixed_s is None else max(LEAST_SILENCE_S, 1.5 * self._fixed_s)

    def waits(self) -> Iterator[float]:
        """The time for a message in slices; each counts as long as it should take.

        So time in which this process itself stood still (stopped, a machine asleep) is no reason to give up a peer.
        """
        left = self.message_s
        while left > 0:
            yield min(SLICE_S, left)
            left -= SLICE_S
