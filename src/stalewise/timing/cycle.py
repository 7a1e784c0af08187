"""The steady step time of a program with constant costs: its maximum cycle mean, exactly.

Every cycle of the period graph is a chain of work that must be done again every so many local steps; the cycle with
the most time per step sets the pace of all stages. A stage's own step is such a cycle. Where a longer one wins, stages
wait for each other: their slack is too small for the links and costs between them.

Newton's iteration (Dinkelbach 1967) in whole numbers: take the ratio of some cycle as a guess, look for a cycle that
has more (a positive one after the guess is taken off every step: Bellman and Ford), and go on with that one's ratio
until there is none. A guess that no cycle beats is the maximum.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from stalewise.errors import ProgramError
from stalewise.timing.costs import IntArray
from stalewise.timing.period import Period

__all__ = ["Cycle", "critical_cycle", "maximum_cycle_ratio"]


@dataclass(frozen=True, kw_only=True)
class Cycle:
    """The cycle that sets the pace.

    Args:
        step_ns: nanoseconds per local step.
        segments: of the period, in the order in which they follow each other.
        processors: indices of those that take part, in the order of the cycle, each run of the same once.
    """

    step_ns: Fraction
    segments: tuple[int, ...]
    processors: tuple[int, ...]

    @property
    def is_one_processor(self) -> bool:
        """Whether a stage or link is the bottleneck by its own work alone."""
        return len(set(self.processors)) == 1


def critical_cycle(period: Period, rows: tuple[IntArray, ...]) -> Cycle:
    """The cycle of most time per local step; a processor's own step where no other has more.

    Args:
        period: the graph.
        rows: nanoseconds of every slot, [slots] per stage.

    Raises:
        ProgramError: where the program deadlocks.
    """
    copies = max(processor.accumulate for processor in period.processors)
    costs = period.costs_of(rows)
    arcs = _arcs(period, costs, copies)
    own = [_own_time(period, index, times, copies) for index, times in enumerate(costs)]
    busiest = max(range(len(own)), key=lambda index: (own[index], -index))
    ratio, nodes = maximum_cycle_ratio(*arcs, at_least=Fraction(own[busiest]))
    if not nodes:
        segments = tuple(number for number, part in enumerate(period.segments) if part.processor == busiest)
        return Cycle(step_ns=ratio / copies, segments=segments, processors=(busiest,))
    segments = tuple(node // copies for node in nodes)
    visited = [period.segments[segment].processor for segment in segments]
    runs = [index for place, index in enumerate(visited) if index != visited[place - 1]] or visited[:1]
    return Cycle(step_ns=ratio / copies, segments=segments, processors=tuple(runs))


def maximum_cycle_ratio(
    sources: IntArray, times: IntArray, steps: IntArray, *, at_least: Fraction
) -> tuple[Fraction, list[int]]:
    """The largest ratio of time to steps over all cycles of a graph.

    Args:
        sources: [A, V], where the A arcs into each node come from; -1 for none.
        times: [A, V], of each arc.
        steps: [A, V], of each arc.
        at_least: ratio of a cycle that is known.

    Returns:
        The ratio, and the nodes of a cycle that has it; no nodes where that is `at_least`.

    Raises:
        ProgramError: where a cycle has no steps: everything in it waits for itself.
    """
    ratio, found = at_least, list[int]()
    while True:
        cycle = _positive_cycle(sources, _excess(times, steps, ratio, sources.shape[1]))
        if not cycle:
            return ratio, found
        time = sum(int(times[arc, node]) for node, arc in cycle)
        count = sum(int(steps[arc, node]) for node, arc in cycle)
        if count <= 0:
            raise ProgramError("V9: the program deadlocks: a chain of actions waits for its own end.")
        ratio, found = Fraction(time, count), [node for node, _ in cycle]


def _excess(times: IntArray, steps: IntArray, ratio: Fraction, num_nodes: int) -> NDArray[np.generic]:
    """What each arc takes beyond `ratio` per step, times its denominator; in Python's integers where 64 bits end."""
    most = ratio.denominator * int(times.max(initial=0)) + ratio.numerator * int(np.abs(steps).max(initial=0))
    kind: type = np.int64 if most * (num_nodes + 2) < 2**62 else object
    excess: NDArray[np.generic] = times.astype(kind) * ratio.denominator - steps.astype(kind) * ratio.numerator
    return excess


def _positive_cycle(sources: IntArray, excess: NDArray[np.generic]) -> list[tuple[int, int]]:
    """A cycle of positive excess as (node, which of its arcs), or none."""
    num_arcs, num_nodes = sources.shape
    reached = np.zeros(num_nodes, excess.dtype)
    parents = np.full(num_nodes, -1, np.int64)
    look = 4
    for sweep in range(1, num_nodes + 2):
        before = reached
        for arc in range(num_arcs):
            through = before[sources[arc]] + excess[arc]
            better = (sources[arc] >= 0) & (through > reached)
            reached = np.where(better, through, reached)
            parents[better] = arc
        if (reached == before).all():
            return []
        if sweep >= look or sweep > num_nodes:
            look *= 2
            if cycle := _cycle_of_parents(sources, parents):
                return cycle
    raise AssertionError("Bellman and Ford's sweeps neither ended nor left a cycle")


def _cycle_of_parents(sources: IntArray, parents: IntArray) -> list[tuple[int, int]]:
    up: Sequence[int] = np.where(parents < 0, -1, sources[parents, np.arange(len(parents))]).tolist()
    seen = [0] * len(up)
    for start in range(len(up)):
        node = start
        while node >= 0 and not seen[node]:
            seen[node] = start + 1
            node = up[node]
        if node >= 0 and seen[node] == start + 1:
            cycle = [(node, int(parents[node]))]
            while (node := up[node]) != cycle[0][0]:
                cycle.append((node, int(parents[node])))
            return cycle[::-1]
    return []


def _arcs(period: Period, costs: list[IntArray], copies: int) -> tuple[IntArray, IntArray, IntArray]:
    """Arcs between the begins of segments, over `copies` local steps: as many as until everything repeats.

    Node `segment * copies + step`. The first arc comes from the previous segment, the second from the sender.
    """
    num_nodes = len(period.segments) * copies
    sources, times, steps = (np.full((2, num_nodes), fill, np.int64) for fill in (-1, 0, 0))
    for number, part in enumerate(period.segments):
        ways = [(part.previous, period.segments[part.previous].end, part.previous_steps, 0)]
        if part.source is not None:
            ways.append((part.source, part.source_slot + 1, part.source_steps, part.latency_ns))
        for arc, (origin, end, back, latency) in enumerate(ways):
            for copy in range(copies):
                node = number * copies + copy
                turns, from_copy = divmod(copy - back, copies)
                sources[arc, node] = origin * copies + from_copy
                steps[arc, node] = -turns
                begin = period.segments[origin].begin
                times[arc, node] = latency + _time(period, origin, costs, begin, end, from_copy)
    return sources, times, steps


def _own_time(period: Period, processor: int, times: IntArray, copies: int) -> int:
    """What a processor does in `copies` local steps."""
    slots = period.processors[processor].slots
    return sum(
        int(times[place])
        for place in range(len(slots))
        for copy in range(copies)
        if _acts(period, processor, place, copy)
    )


def _time(period: Period, segment: int, costs: list[IntArray], begin: int, end: int, copy: int) -> int:
    processor = period.segments[segment].processor
    times = costs[processor]
    return sum(int(times[place]) for place in range(begin, end) if _acts(period, processor, place, copy))


def _acts(period: Period, processor: int, place: int, step: int) -> bool:
    """Whether a slot acts in a local step of the steady state: an update only where a group of batches is complete."""
    owner = period.processors[processor]
    slot = owner.slots[place]
    return slot.kind.value != "U" or (step - slot.lag + 1) % owner.accumulate == 0
