"""One period of a program as a graph: which part of a step waits for which.

A *processor* does things one after another: a stage, or one direction of a link whose messages occupy it. Its local
step is cut where it waits for a message; a part between two such places is a *segment*:

    stage k     ┌ RECV_A n   F n   SEND_A n   R j ┐┌ RECV_G j   B j   SEND_G j   U ┐     j = n - m_k
                └────────── segment 0 ────────────┘└────────── segment 1 ──────────┘

A segment begins when the one before has ended, and its message, if it waits for one, is there. So each segment has
at most two arcs into it: from its predecessor on the processor (of this local step, or the last one of the step
before) and from the sender. An arc says how many local steps lie between its ends.

Sends do not wait and receives are posted ahead, as in both engines; so nothing else holds a segment up.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from stalewise.errors import ProgramError
from stalewise.protocol.actions import Kind
from stalewise.protocol.program import Program, Slot
from stalewise.timing.costs import IntArray, LinkCost, Links, share

__all__ = ["RECEIVES", "Period", "Processor", "Segment", "period_of"]

RECEIVES = {
    Kind.SEND_ACTIVATION: Kind.RECEIVE_ACTIVATION,
    Kind.SEND_GRADIENT: Kind.RECEIVE_GRADIENT,
    Kind.SEND_LOSS: Kind.RECEIVE_LOSS,
    Kind.SEND_TOKEN: Kind.RECEIVE_TOKEN,
}
"""What a message is received as."""


@dataclass(frozen=True, kw_only=True)
class Processor:
    """What does one thing after another.

    Args:
        name: such as "stage 1" or "link 0 -> 1".
        stage: its index, or None for a link.
        slots: its local step.
        accumulate: batches per update.
        transfers_ns: of a link, per slot; None for a stage, whose times are in its `StepCosts`.
    """

    name: str
    stage: int | None
    slots: tuple[Slot, ...]
    accumulate: int = 1
    transfers_ns: tuple[int, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class Segment:
    """A part of a processor's local step that waits at most at its begin.

    Args:
        processor: index.
        begin: index of its first slot.
        end: index after its last slot.
        previous: segment that ends where this one begins.
        previous_steps: 0, or 1 where that is the last segment of the step before.
        source: segment that sends what this one waits for; None where it waits for nothing.
        source_slot: place of the send in the local step of the source's processor.
        source_steps: local steps by which the send's step comes before this segment's.
        latency_ns: from the end of that slot to the arrival.
    """

    processor: int
    begin: int
    end: int
    previous: int
    previous_steps: int
    source: int | None = None
    source_slot: int = 0
    source_steps: int = 0
    latency_ns: int = 0


@dataclass(frozen=True, kw_only=True)
class Period:
    """All processors and segments of a program.

    Args:
        program: which it is of.
        processors: the stages first, in order.
        segments: those of one processor stand together, in order.
    """

    program: Program
    processors: tuple[Processor, ...]
    segments: tuple[Segment, ...]

    def costs_of(self, rows: tuple[IntArray, ...]) -> list[IntArray]:
        """Nanoseconds of every slot of every processor, with one row of costs per stage."""
        return [
            rows[processor.stage] if processor.stage is not None else np.array(processor.transfers_ns, np.int64)
            for processor in self.processors
        ]


Message = tuple[int, Kind, int | None]
"""Receiving stage, kind of the receive, micro-batch."""


def period_of(program: Program, links: Links) -> Period:
    """The period graph of a program.

    Raises:
        ProgramError: where a message has no sender or no receiver, or two.
    """
    if len(links.activations) != program.num_stages - 1 or len(links.gradients) != program.num_stages - 1:
        raise ProgramError(
            f"there are costs of {len(links.activations)} and {len(links.gradients)} links for {program.num_stages} "
            "stages; give one per link and direction."
        )
    processors = [
        Processor(name=f"stage {index}", stage=index, slots=stage.slots, accumulate=stage.policy.accumulate)
        for index, stage in enumerate(program.stages)
    ]
    receives: dict[Message, tuple[int, int]] = {}
    for index, stage in enumerate(program.stages):
        for place, slot in enumerate(stage.slots):
            if slot.kind in RECEIVES.values():
                message = (index, slot.kind, slot.micro_batch)
                if message in receives:
                    raise ProgramError(f"V6: stage {index} receives {slot.kind.value} twice in a step.")
                receives[message] = (index, place)
    sources: dict[tuple[int, int], tuple[int, int, int]] = {}
    for index in range(program.num_stages):
        _connect(program, index, links, processors, receives, sources)
    missing = set(receives.values()) - set(sources)
    if missing:
        stage_index, place = min(missing)
        raise ProgramError(f"V6: nobody sends what stage {stage_index} waits for in slot {place} of its step.")
    return Period(program=program, processors=tuple(processors), segments=_segments(processors, sources))


def _connect(
    program: Program,
    sender: int,
    links: Links,
    processors: list[Processor],
    receives: Mapping[Message, tuple[int, int]],
    sources: dict[tuple[int, int], tuple[int, int, int]],
) -> None:
    """Give every send of a stage its receive; with a link between them where messages occupy it.

    Args:
        program: all stages.
        sender: the stage.
        links: their costs.
        processors: to which the links are added.
        receives: the place of each, by what it waits for.
        sources: filled: from (processor, slot) of a receive to (processor, slot, latency) of what it waits for.
    """
    micro_batches = program.stages[sender].policy.micro_batches
    by_link: dict[int, list[tuple[int, tuple[int, int], int]]] = {}
    costs: dict[int, LinkCost] = {}
    for place, slot in enumerate(program.stages[sender].slots):
        if slot.kind not in RECEIVES:
            continue
        peer = {Kind.SEND_ACTIVATION: sender + 1, Kind.SEND_TOKEN: 0}.get(slot.kind, sender - 1)
        receive = receives.get((peer, RECEIVES[slot.kind], slot.micro_batch))
        if receive is None or receive in sources:
            raise ProgramError(f"V6: nobody, or somebody else too, receives what slot {place} of stage {sender} sends.")
        if slot.kind is Kind.SEND_TOKEN:
            sources[receive] = (sender, place, links.token.latency_ns)
            continue
        costs[peer] = links.activations[sender] if peer > sender else links.gradients[peer]
        bulky = slot.kind is not Kind.SEND_LOSS
        transfer = share(costs[peer].transfer_ns, slot, micro_batches) if bulky else 0
        by_link.setdefault(peer, []).append((place, receive, transfer))
        sources[receive] = (sender, place, costs[peer].latency_ns)
    for peer, sends in by_link.items():
        if not any(transfer for *_, transfer in sends):
            continue
        link = len(processors)
        slots = tuple(program.stages[sender].slots[place] for place, *_ in sends)
        transfers = tuple(transfer for *_, transfer in sends)
        name = f"link {sender} -> {peer}"
        processors.append(Processor(name=name, stage=None, slots=slots, transfers_ns=transfers))
        for index, (place, receive, _) in enumerate(sends):
            sources[link, index] = (sender, place, 0)
            sources[receive] = (link, index, costs[peer].latency_ns)


def _segments(
    processors: list[Processor], sources: Mapping[tuple[int, int], tuple[int, int, int]]
) -> tuple[Segment, ...]:
    bounds: list[tuple[int, int, int]] = []
    owner: dict[tuple[int, int], int] = {}
    firsts = []
    for index, processor in enumerate(processors):
        firsts.append(len(bounds))
        begins = [place for place in range(len(processor.slots)) if place == 0 or (index, place) in sources]
        for begin, end in zip(begins, [*begins[1:], len(processor.slots)], strict=True):
            owner.update({(index, place): len(bounds) for place in range(begin, end)})
            bounds.append((index, begin, end))
    firsts.append(len(bounds))
    segments = []
    for number, (index, begin, end) in enumerate(bounds):
        wraps = number == firsts[index]
        plain = Segment(
            processor=index,
            begin=begin,
            end=end,
            previous=firsts[index + 1] - 1 if wraps else number - 1,
            previous_steps=int(wraps),
        )
        if (index, begin) in sources:
            sender, place, latency = sources[index, begin]
            steps = processors[index].slots[begin].lag - processors[sender].slots[place].lag
            plain = Segment(
                processor=index,
                begin=begin,
                end=end,
                previous=plain.previous,
                previous_steps=plain.previous_steps,
                source=owner[sender, place],
                source_slot=place,
                source_steps=steps,
                latency_ns=latency,
            )
        segments.append(plain)
    return tuple(segments)
