"""When everything ends where stages decide at run time: an event-driven simulator of `protocol.elastic`.

The order of actions depends on time, so there is no recurrence to vectorise. Events are taken in the order of time;
all events of an instant happen before any stage decides, and stages decide in their order, so a run is a function of
its costs.

Costs are those of whole actions, and messages take a latency; a slow step is keyed as in the engines: everything
between local updates u - 1 and u of a stage is slow together.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from stalewise.errors import ConfigError
from stalewise.protocol.actions import Action, Kind
from stalewise.protocol.elastic import Elastic, ElasticStage
from stalewise.protocol.stragglers import NO_STRAGGLERS, Stragglers
from stalewise.protocol.trace import Trace
from stalewise.timing.costs import IntArray

__all__ = ["ElasticRun", "run_elastic"]


@dataclass(frozen=True, eq=False, kw_only=True)
class ElasticRun:
    """What happened.

    Args:
        staleness: [stages, batches], realised: forwards between a batch's own and its backward.
        update_ns: [stages, batches], when each update ended.
        traces: as a run would leave them.
    """

    staleness: IntArray
    update_ns: IntArray
    traces: tuple[Trace, ...]

    @property
    def window(self) -> slice:
        """The batches that count: the last nine tenths, without those of the drain."""
        batches = self.staleness.shape[1]
        deepest = int(self.staleness.max(initial=0))
        return slice(min(max(batches // 10, deepest), batches - 1), max(batches - deepest, 1))

    @property
    def step_ns(self) -> float:
        """Mean time of a step of the last stage in the window."""
        ends = self.update_ns[-1, self.window]
        return float(ends[-1] - ends[0]) / (len(ends) - 1) if len(ends) > 1 else float(self.update_ns.max())

    @property
    def mean_staleness(self) -> NDArray[np.float64]:
        """[stages], in the window."""
        return np.asarray(self.staleness[:, self.window].mean(axis=1), np.float64)


def run_elastic(
    rule: Elastic,
    times_ns: Mapping[Kind, Sequence[int]],
    *,
    num_batches: int,
    latency_ns: int = 0,
    stragglers: Stragglers = NO_STRAGGLERS,
    factors: NDArray[np.float64] | None = None,
    make_stage: Callable[[Elastic, int], ElasticStage] = ElasticStage,
) -> ElasticRun:
    """Run a pipeline of elastic stages until all batches are backwarded.

    Args:
        rule: of all stages.
        times_ns: per stage, of `FORWARD`, `RECOMPUTE`, `BACKWARD` and `UPDATE`; others take no time.
        num_batches: N.
        latency_ns: of every message.
        stragglers: which steps are slow.
        factors: [stages, updates], by which each step's times are multiplied besides; None: 1.
        make_stage: of the rule and the index; to try other rules.

    Raises:
        ConfigError: where there is no batch, or a time is missing for a stage.
    """
    if num_batches < 1:
        raise ConfigError(f"num_batches is {num_batches}; there is nothing to time below 1.")
    for kind, times in times_ns.items():
        if len(times) != rule.num_stages:
            raise ConfigError(
                f"{kind.name.lower()} has {len(times)} times; give one for each of {rule.num_stages} stages."
            )
    return _Simulation(rule, times_ns, num_batches, latency_ns, stragglers, factors, make_stage).run()


class _Simulation:
    def __init__(
        self,
        rule: Elastic,
        times_ns: Mapping[Kind, Sequence[int]],
        num_batches: int,
        latency_ns: int,
        stragglers: Stragglers,
        factors: NDArray[np.float64] | None,
        make_stage: Callable[[Elastic, int], ElasticStage],
    ) -> None:
        stages = rule.num_stages
        self._times, self._latency = times_ns, latency_ns
        self._num_batches, self._stragglers, self._factors = num_batches, stragglers, factors
        self._stages = [make_stage(rule, stage) for stage in range(stages)]
        self._ready = [num_batches if stage == 0 else 0 for stage in range(stages)]
        self._doing: list[Kind | None] = [None] * stages
        self._free_since = [0] * stages
        self._slowing = [self._slowing_of(stage, 0) for stage in range(stages)]
        self._paused = [False] * stages
        self._events: list[tuple[int, int, int, Kind]] = []
        self._count = 0
        self._traces = tuple(Trace(stage) for stage in range(stages))
        self._staleness = np.zeros((stages, num_batches), np.int64)
        self._updates = np.zeros((stages, num_batches), np.int64)

    def run(self) -> ElasticRun:
        self._decide(0)
        while self._events:
            now = self._events[0][0]
            while self._events and self._events[0][0] == now:
                _, _, stage, kind = heapq.heappop(self._events)
                self._happen(now, stage, kind)
            self._decide(now)
        done = [state.backwarded for state in self._stages]
        assert done == [self._num_batches] * len(done), f"stages stopped after {done} of {self._num_batches} batches"
        return ElasticRun(staleness=self._staleness, update_ns=self._updates, traces=self._traces)

    def _happen(self, now: int, stage: int, kind: Kind) -> None:
        state = self._stages[stage]
        if kind is Kind.RECEIVE_ACTIVATION:
            self._ready[stage] += 1
            return
        if kind is Kind.RECEIVE_GRADIENT:
            state.gradient_came()
            return
        self._doing[stage], self._free_since[stage] = None, now
        if kind is Kind.FORWARD:
            self._ready[stage] -= 1
            if stage + 1 < len(self._stages):
                self._record(stage, Kind.SEND_ACTIVATION, state.forwarded, now, now)
                self._push(now + self._latency, stage + 1, Kind.RECEIVE_ACTIVATION)
        elif kind is Kind.BACKWARD:
            batch = state.backwarded
            if stage > 0:
                self._record(stage, Kind.SEND_GRADIENT, batch, now, now)
                self._push(now + self._latency, stage - 1, Kind.RECEIVE_GRADIENT)
            self._record(stage, Kind.UPDATE, batch, now - self._update_ns(stage), now)
            self._staleness[stage, batch] = state.in_flight - 1
            self._updates[stage, batch] = now
        state.did(kind, now)
        if kind is Kind.BACKWARD:
            self._slowing[stage], self._paused[stage] = self._slowing_of(stage, state.backwarded), False

    def _decide(self, now: int) -> None:
        for stage, state in enumerate(self._stages):
            if self._doing[stage] is not None:
                continue
            kind = state.next_action(self._ready[stage] > 0)
            if kind is not None:
                self._begin(now, stage, kind)

    def _begin(self, now: int, stage: int, kind: Kind) -> None:
        state = self._stages[stage]
        batch = state.forwarded if kind is Kind.FORWARD else state.backwarded
        begin = now
        if kind is Kind.FORWARD:
            waited = Kind.LOAD if stage == 0 else Kind.RECEIVE_ACTIVATION
            self._record(stage, waited, batch, self._free_since[stage], begin)
        elif kind is Kind.BACKWARD and stage + 1 < len(self._stages):
            self._record(stage, Kind.RECEIVE_GRADIENT, batch, self._free_since[stage], begin)
        factor, pause = self._slowing[stage]
        end = begin + round(self._times.get(kind, _NOTHING)[stage] * factor) + (0 if self._paused[stage] else pause)
        self._paused[stage] = True
        self._record(stage, kind, batch, begin, end)
        self._doing[stage] = kind
        self._push(end + (self._update_ns(stage) if kind is Kind.BACKWARD else 0), stage, kind)

    def _update_ns(self, stage: int) -> int:
        return round(self._times.get(Kind.UPDATE, _NOTHING)[stage] * self._slowing[stage][0])

    def _slowing_of(self, stage: int, update: int) -> tuple[float, int]:
        """Factor and pause in nanoseconds of a step."""
        slowing = self._stragglers.slowing(stage, update)
        factor = 1.0
        if self._factors is not None and update < self._factors.shape[1]:
            factor = float(self._factors[stage, update])
        return (factor, 0) if slowing is None else (factor * slowing.factor, round(slowing.pause_s * 1e9))

    def _push(self, time: int, stage: int, kind: Kind) -> None:
        self._count += 1
        heapq.heappush(self._events, (time, self._count, stage, kind))

    def _record(self, stage: int, kind: Kind, batch: int, begin: int, end: int) -> None:
        self._traces[stage].add(Action(kind, None if kind is Kind.UPDATE else batch), batch, begin, end)


class _Zeros(Sequence[int]):
    """No time on any stage."""

    def __getitem__(self, index):  # type: ignore[no-untyped-def]
        return 0

    def __len__(self) -> int:
        return 0


_NOTHING = _Zeros()
