"""Costs and link latencies from the timeline of a run.

A stage's complete local steps are found by their kinds; each is a row of its table. An action costs the time since the
record before it ended, so what happens between two records (the loop over batches, say) counts for the one that
follows. The wait for a message is not a cost: a receive costs what the shortest one took whose message was sent before
it began, and nothing where there is none. A message's latency shows where its receiver was idle when it was sent:

    sender    .. B7 |SEND_G7|
    receiver  .. R7 |............RECV_G7|        latency = end of RECV_G7 - end of SEND_G7
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from stalewise.errors import ConfigError
from stalewise.protocol.actions import Kind
from stalewise.protocol.program import Program, StageProgram
from stalewise.protocol.trace import KIND_CODES
from stalewise.timing.costs import LARGEST_NS, IntArray, LinkCost, Links, StepCosts
from stalewise.timing.period import RECEIVES

__all__ = ["Measured", "Records", "by_kind", "measure"]

_CODE = {kind: code for code, kind in enumerate(KIND_CODES)}


class Records(Protocol):
    """The records of one stage as equally long columns, in the order of their start."""

    @property
    def kind(self) -> IntArray:
        """Codes into `KIND_CODES`."""

    @property
    def batch(self) -> IntArray:
        """Index over the whole run."""

    @property
    def start_ns(self) -> IntArray:
        """On the clock that all stages share."""

    @property
    def end_ns(self) -> IntArray:
        """On the same clock."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What a run took.

    Args:
        costs: a row per complete step, equally many for all stages: the last ones.
        links: latencies, where they showed; transfers are not told apart from them.
    """

    costs: StepCosts
    links: Links


def measure(program: Program, stages: Sequence[Records]) -> Measured:
    """The costs of a run that executed `program`.

    Raises:
        ConfigError: where the records are of another number of stages, or a stage shows no complete step.
    """
    if len(stages) != program.num_stages:
        raise ConfigError(
            f"the timeline is of {len(stages)} stages and the program of {program.num_stages}; give the method that "
            "the run used."
        )
    ways: dict[tuple[int, Kind], _Way] = {}
    for above in range(len(stages) - 1):
        below = above + 1
        ways[below, Kind.RECEIVE_ACTIVATION] = _way(stages[above], Kind.SEND_ACTIVATION, stages[below])
        ways[above, Kind.RECEIVE_GRADIENT] = _way(stages[below], Kind.SEND_GRADIENT, stages[above])
        ways[above, Kind.RECEIVE_LOSS] = _way(stages[below], Kind.SEND_LOSS, stages[above])
    ways[0, Kind.RECEIVE_TOKEN] = _way(stages[-1], Kind.SEND_TOKEN, stages[0])
    tables = []
    for index, (steps, records) in enumerate(zip(program.stages, stages, strict=True)):
        table = _steps(index, steps, records)
        for place, slot in enumerate(steps.slots):
            if slot.kind in RECEIVES.values():
                table[:, place] = ways[index, slot.kind].handling_ns
        tables.append(table)
    length = min(map(len, tables))
    return Measured(
        costs=StepCosts(tuple(table[len(table) - length :] for table in tables)),
        links=Links(
            activations=tuple(ways[stage, Kind.RECEIVE_ACTIVATION].cost for stage in range(1, len(stages))),
            gradients=tuple(ways[stage, Kind.RECEIVE_GRADIENT].cost for stage in range(len(stages) - 1)),
            token=ways[0, Kind.RECEIVE_TOKEN].cost,
        ),
    )


def by_kind(program: Program, costs: StepCosts) -> dict[Kind, list[int]]:
    """What a batch costs on each stage, by kind of action, to time another method with it.

    A stage that does not recompute would take as long for it as for its forward.
    """
    mean = costs.mean()
    times: dict[Kind, list[int]] = {}
    for stage, steps in enumerate(program.stages):
        for slot, cost in zip(steps.slots, mean.tables[stage][0].tolist(), strict=True):
            times.setdefault(slot.kind, [0] * program.num_stages)[stage] += cost
    again = times.setdefault(Kind.RECOMPUTE, [0] * program.num_stages)
    for stage, steps in enumerate(program.stages):
        if not any(slot.kind is Kind.RECOMPUTE for slot in steps.slots):
            again[stage] = times[Kind.FORWARD][stage]
    return times


def _steps(stage: int, program: StageProgram, records: Records) -> IntArray:
    """[complete steps, slots], nanoseconds."""
    rare = program.policy.accumulate > 1
    places = [place for place, slot in enumerate(program.slots) if not (rare and slot.kind is Kind.UPDATE)]
    codes = np.array([_CODE[program.slots[place].kind] for place in places])
    found = np.empty(0, np.int64)
    if len(records.kind) >= len(codes):
        found = np.flatnonzero((sliding_window_view(records.kind, len(codes)) == codes).all(axis=1))
    # The first step of the run has no record before it.
    found = found[found > 0]
    if not len(found):
        raise ConfigError(
            f"the timeline of stage {stage} shows no complete step of this program ({len(records.kind)} records); a "
            "step needs its forward and its backward. Give a run of the same method that got beyond its warm-up."
        )
    within = found[:, None] + np.arange(len(codes))
    times = records.end_ns[within] - records.end_ns[within - 1]
    times = times[_without_pauses(times)]
    table = np.zeros((len(times), len(program.slots)), np.int64)
    table[:, places] = times
    if rare:
        updates = np.flatnonzero(records.kind == _CODE[Kind.UPDATE])
        updates = updates[updates > 0]
        mean = (records.end_ns[updates] - records.end_ns[updates - 1]).mean() if len(updates) else 0
        table[:, [place for place, slot in enumerate(program.slots) if slot.kind is Kind.UPDATE]] = round(mean)
    return np.clip(table, 0, LARGEST_NS)


def _without_pauses(times: IntArray) -> NDArray[np.bool_]:
    """Steps whose first action did not come after an evaluation or the like: a gap longer than all of a step."""
    kept: NDArray[np.bool_] = times[:, 0] <= np.median(times[:, 0]) + np.median(times.sum(axis=1))
    return kept


@dataclass(frozen=True, kw_only=True)
class _Way:
    """What messages of one kind between two stages took."""

    handling_ns: int
    cost: LinkCost


def _way(sender: Records, send: Kind, receiver: Records) -> _Way:
    sends = np.flatnonzero(sender.kind == _CODE[send])
    receives = np.flatnonzero(receiver.kind == _CODE[RECEIVES[send]])
    # First in, first out: equals pair in order; the n-th message of a batch is its n-th micro-batch.
    sent = {key: int(sender.end_ns[row]) for key, row in zip(_keys(sender.batch[sends]), sends, strict=True)}
    ready, apart = [], []
    for key, row in zip(_keys(receiver.batch[receives]), receives, strict=True):
        begin, end = int(receiver.start_ns[row]), int(receiver.end_ns[row])
        if key in sent and sent[key] <= begin:
            ready.append(end - begin)
        if key in sent and row > 0 and receiver.end_ns[row - 1] <= sent[key] <= end:
            apart.append(end - sent[key])
    handling = min(ready, default=0)
    latency = int(np.median(apart)) - handling if apart else 0
    return _Way(handling_ns=handling, cost=LinkCost(latency_ns=min(max(latency, 0), LARGEST_NS)))


def _keys(batches: IntArray) -> list[tuple[int, int]]:
    counts: dict[int, int] = {}
    keys = []
    for batch in batches.tolist():
        keys.append((batch, counts.get(batch, 0)))
        counts[batch] = counts.get(batch, 0) + 1
    return keys
