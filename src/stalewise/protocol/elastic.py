"""Elastic staleness: a stage decides at run time whether to forward or to backward, by what it can see itself.

    in flight   batches forwarded here and not backwarded yet
    below       of these, the batches whose gradient has not come: the stages below work on them, or have them waiting
    least       K-1-k: a batch in each stage below keeps them all busy

The rule:

    1  While no more than K-1-k batches are below, the next stage is about to starve: forward before anything else.
       Otherwise backward what has its gradient, and forward only where there is nothing to backward.
    2  Forward only while the batches in flight are at most m_k: the bound while something is slow, `least` otherwise.
    3  Something is slow while the mean duration of the last 64 updates is more than 7% above their 33rd percentile.

So a calm pipeline is DSP(m_k = K-1-k), the shallowest that runs at full rate. When a step is slow here, or holds this
stage up from elsewhere, the stage runs ahead up to its bound, and when calm is back it backwards without forwarding
until only `least` batches are left in flight. While nothing else can be done, the next batch is recomputed ahead of its
gradient: the weights for that are those after the update before it, and no forward changes them.

Everything here is a count or the end of an own update: no message carries more than before. No clock is read; whoever
uses this says when an update ended. What was tried besides, and how the numbers were chosen: docs/elastic.md.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from stalewise.errors import ConfigError
from stalewise.protocol.actions import Kind
from stalewise.protocol.staleness import Staleness

__all__ = ["Elastic", "ElasticStage", "SlowSteps"]

_FEWEST = 8
"""Updates from which on something may be slow."""


@dataclass(frozen=True, kw_only=True)
class Elastic:
    """The bounds and constants of the rule.

    Args:
        bound: m_k, the largest staleness that each stage may realise.
        least: staleness of a calm pipeline, at most the bound; None: K-1-k, or the bound where that is less. Links with
            a latency may need more.
        recompute: whether stages above the last one forward without a graph and recompute.
        slow_share: part by which the mean duration of the last updates must be above their 33rd percentile, for
            something to be slow: what jitter may cost.
        memory: how many updates are the last ones. So long a stage that ran ahead may stay ahead of a single slow step.

    Raises:
        ConfigError: where `least` exceeds the bound, or a constant is out of its range.
    """

    bound: Staleness
    least: Staleness | None = None
    recompute: bool = True
    slow_share: float = 0.07
    memory: int = 64

    def __post_init__(self) -> None:
        least = self.bound if self.least is None else self.least
        if len(least) != len(self.bound) or any(a > b for a, b in zip(least, self.bound, strict=True)):
            raise ConfigError(
                f"least staleness {least} must have an entry per stage, each at most that of the bound {self.bound}."
            )
        if not self.slow_share > 0 or self.memory < 1:
            raise ConfigError(f"slow_share {self.slow_share} must be above 0, and memory {self.memory} at least 1.")

    @property
    def num_stages(self) -> int:
        """K."""
        return len(self.bound)

    def least_of(self, stage: int) -> int:
        """The staleness of a stage in a calm pipeline."""
        least = self.num_stages - 1 - stage if self.least is None else int(self.least[stage])
        return min(least, int(self.bound[stage]))


class SlowSteps:
    """Tells from the ends of a stage's updates whether something is slow.

    A mean counts and no single update: a long step once in a while costs less than the staleness that would absorb it.

    Args:
        share: see `Elastic.slow_share`.
        memory: see `Elastic`.
    """

    def __init__(self, *, share: float, memory: int) -> None:
        self._share = share
        self._times: deque[int] = deque(maxlen=memory)
        self._last: int | None = None
        self._slow = False

    @property
    def slow(self) -> bool:
        """Whether the last updates took longer than usual."""
        return self._slow

    @property
    def state(self) -> tuple[list[int], int]:
        """Durations of the last updates, and whether (1) or not (0) something is slow: plain values."""
        return list(self._times), int(self._slow)

    def restore(self, times: Sequence[int], slow: int) -> None:
        """Go on with the `state` of another one; the clock may be another, so the next update has no duration."""
        self._times.extend(times)
        self._slow = bool(slow)

    def updated(self, time_ns: int, *, counts: bool = True) -> None:
        """An update ended at `time_ns`, on any clock that only goes forward.

        Args:
            time_ns: its end.
            counts: whether its duration says anything of the pace.
        """
        if self._last is not None and counts:
            self._times.append(time_ns - self._last)
            count = len(self._times)
            # Few say little: the first updates of a pipeline that fills differ anyway.
            if count >= min(_FEWEST, self._times.maxlen or _FEWEST):
                usual = sorted(self._times)[(count - 1) // 3]
                self._slow = sum(self._times) > (1 + self._share) * usual * count
        self._last = time_ns

    def pause(self) -> None:
        """The stage stands still on purpose, so the time until its next update says nothing."""
        self._last = None


class ElasticStage:
    """The counts of one stage, and what it does next.

    Args:
        rule: of the pipeline.
        stage: k.

    Attributes:
        forwarded: batches forwarded so far.
        received: gradients that have come; on the last stage equal to `forwarded`.
        backwarded: batches backwarded so far.
        slow_steps: whether something is slow.
    """

    def __init__(self, rule: Elastic, stage: int) -> None:
        self._bound, self._least = rule.bound[stage], rule.least_of(stage)
        self._below = rule.num_stages - 1 - stage
        self._recomputes = rule.recompute and self._below > 0
        self._graph = False
        self.forwarded = self.received = self.backwarded = self._forwarded_before = 0
        self.slow_steps = SlowSteps(share=rule.slow_share, memory=rule.memory)

    @property
    def in_flight(self) -> int:
        """Batches forwarded and not backwarded: what the next backward's staleness is, plus one."""
        return self.forwarded - self.backwarded

    def next_action(self, activation_ready: bool) -> Kind | None:
        """`FORWARD`, `RECOMPUTE` or `BACKWARD`; None: wait for a message.

        Args:
            activation_ready: whether the next batch's activation (on the first stage, the batch) is there.
        """
        may_forward = activation_ready and self.in_flight <= (self._bound if self.slow_steps.slow else self._least)
        starving = self.forwarded - self.received <= self._below and self._below > 0
        if may_forward and starving:
            return Kind.FORWARD
        if self.received > self.backwarded:
            return Kind.BACKWARD if self._graph or not self._recomputes else Kind.RECOMPUTE
        if may_forward:
            return Kind.FORWARD
        if self._recomputes and self.in_flight and not self._graph:
            return Kind.RECOMPUTE
        return None

    def state(self) -> tuple[list[int], int]:
        """What is remembered of the times of updates; see `SlowSteps.state`."""
        return self.slow_steps.state

    def restore(self, letters: str, rule: tuple[Sequence[int], int] | None) -> None:
        """Go on where another one stood.

        Args:
            letters: what was done in this cycle, as in `protocol.course`.
            rule: its `state`; None: nothing is known of the times.
        """
        self.forwarded, self.backwarded = letters.count("F"), letters.count("B")
        self.received = self.forwarded if self._below == 0 else self.backwarded
        self._forwarded_before = letters[: letters.rfind("B") + 1].count("F")
        self._graph = letters.rfind("R") > letters.rfind("B")
        if rule is not None:
            self.slow_steps.restore(*rule)

    def gradient_came(self) -> None:
        """The gradient of the next batch to backward without one is here."""
        self.received += 1

    def did(self, kind: Kind, time_ns: int) -> None:
        """An action of `next_action` is done; a backward with its update.

        Args:
            kind: the action.
            time_ns: when it ended.
        """
        if kind is Kind.FORWARD:
            self.forwarded += 1
            self.received += self._below == 0
        elif kind is Kind.RECOMPUTE:
            self._graph = True
        else:
            self.backwarded += 1
            self._graph = False
            # A stage that comes back from running ahead does not forward; such updates are quick, and no measure.
            self.slow_steps.updated(time_ns, counts=self.forwarded > self._forwarded_before)
            self._forwarded_before = self.forwarded
