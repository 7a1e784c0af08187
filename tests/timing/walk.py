"""The scalar reference: walk the streams of actions one by one, in exact fractions."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from fractions import Fraction
from typing import NamedTuple

from hypothesis import strategies as st

from stalewise.methods import METHOD_NAMES, Method, build_method
from stalewise.protocol.actions import Action, Kind
from stalewise.protocol.program import Program

SENDS = {
    Kind.SEND_ACTIVATION: Kind.RECEIVE_ACTIVATION,
    Kind.SEND_GRADIENT: Kind.RECEIVE_GRADIENT,
    Kind.SEND_LOSS: Kind.RECEIVE_LOSS,
    Kind.SEND_TOKEN: Kind.RECEIVE_TOKEN,
}


class Record(NamedTuple):
    action: Action
    step: int
    begin: Fraction
    end: Fraction


class Wire(NamedTuple):
    """What a message costs: latency, and how long it occupies its direction of the link."""

    latency: int
    transfer: int


def walk(
    program: Program,
    num_batches: int,
    cost: Callable[[int, int, Action], Fraction | int],
    wire: Callable[[int, int], Wire],
    token_latency: int = 0,
) -> list[list[Record]]:
    """The records of every stage.

    Args:
        program: what is executed.
        num_batches: before the drain.
        cost: of (stage, local step, action).
        wire: of (sender, receiver), for a whole batch.
        token_latency: of the way from the last stage to the first.
    """
    streams = [
        [
            (step, action)
            for step in range(num_batches + program.drain_steps)
            for action in stage.step(step, num_batches)
        ]
        for stage in program.stages
    ]
    records: list[list[Record]] = [[] for _ in streams]
    arrived: dict[tuple[int, Action], Fraction] = {}
    free_from: defaultdict[tuple[int, int], Fraction] = defaultdict(Fraction)
    places = [0] * len(streams)
    while any(place < len(stream) for place, stream in zip(places, streams, strict=True)):
        before = list(places)
        for stage, stream in enumerate(streams):
            while places[stage] < len(stream):
                step, action = stream[places[stage]]
                begin = records[stage][-1].end if records[stage] else Fraction(0)
                ready = begin
                if action.kind in SENDS.values():
                    if (stage, action) not in arrived:
                        break
                    ready = max(begin, arrived.pop((stage, action)))
                end = ready + Fraction(cost(stage, step, action))
                if action.kind in SENDS:
                    receiver = {Kind.SEND_ACTIVATION: stage + 1, Kind.SEND_TOKEN: 0}.get(action.kind, stage - 1)
                    message = Action(SENDS[action.kind], action.batch, action.micro_batch)
                    if action.kind is Kind.SEND_TOKEN:
                        arrived[receiver, message] = end + token_latency
                    else:
                        link = wire(stage, receiver)
                        parts = program.stages[stage].policy.micro_batches
                        part = action.micro_batch
                        transfer = link.transfer
                        if part is not None:
                            transfer = link.transfer * (part + 1) // parts - link.transfer * part // parts
                        if action.kind is Kind.SEND_LOSS:
                            transfer = 0
                        sent = max(end, free_from[stage, receiver]) + transfer
                        free_from[stage, receiver] = sent
                        arrived[receiver, message] = sent + link.latency
                records[stage].append(Record(action, step, begin, end))
                places[stage] += 1
        assert places != before, "deadlock"
    assert not arrived, "messages that nobody took"
    return records


@st.composite
def methods(draw: st.DrawFn, most_stages: int = 5) -> Method:
    """Any method with any of its options that matter to time."""
    name = draw(st.sampled_from(METHOD_NAMES))
    stages = draw(st.integers(1, most_stages))
    options: dict[str, object] = {}
    if name in ("dsp", "dsp-stored"):
        slack = draw(st.lists(st.integers(0, 4), min_size=stages - 1, max_size=stages - 1))
        options["staleness"] = tuple(sum(slack[stage:]) for stage in range(stages))
    if name in ("dsp", "dsp-stored", "bp"):
        options["accumulate"] = draw(st.integers(1, 3))
    if name in ("gpipe", "1f1b"):
        options["micro_batches"] = draw(st.integers(1, 4))
    if name == "dni":
        options["target_delay"] = draw(st.integers(1, 3))
    return build_method(name, num_stages=stages, **options)
