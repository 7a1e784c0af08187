"""Array arithmetic gives the ends that a walk over single actions gives, exactly, for every method."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from timing.walk import Wire, methods, walk

from stalewise.errors import ConfigError, ProgramError
from stalewise.methods import DSP, METHOD_NAMES, Method, build_method
from stalewise.protocol.actions import Action, Kind
from stalewise.protocol.program import Program, Slot, StageProgram
from stalewise.protocol.staleness import Staleness
from stalewise.timing import LinkCost, Links, StepCosts, TimedProgram


def random_costs(program: Program, rows: int, seed: int) -> StepCosts:
    """A different number for every slot, some of them 0."""
    random = np.random.default_rng(seed)
    return StepCosts(tuple(random.integers(0, 9, (rows, len(stage.slots))) for stage in program.stages))


def random_links(num_stages: int, seed: int) -> Links:
    random = np.random.default_rng(seed)
    costs = [
        LinkCost(latency_ns=int(latency), transfer_ns=int(transfer) * int(occupied))
        for latency, transfer, occupied in random.integers((0, 0, 0), (20, 9, 2), (2 * num_stages - 2, 3))
    ]
    half = num_stages - 1
    return Links(activations=tuple(costs[:half]), gradients=tuple(costs[half:]), token=LinkCost(latency_ns=7))


@given(
    method=methods(),
    num_batches=st.integers(1, 12),
    rows=st.integers(1, 3),
    replicas=st.integers(1, 3),
    seed=st.integers(0, 10_000),
)
@settings(max_examples=300)
def test_every_action_ends_when_the_walk_says(
    method: Method, num_batches: int, rows: int, replicas: int, seed: int
) -> None:
    program = method.program()
    costs, links = random_costs(program, rows, seed), random_links(method.num_stages, seed + 1)
    timed = TimedProgram(program, costs, links)
    drawn = None
    if rows > 1:
        shape = (method.num_stages, timed.num_steps(num_batches), replicas)
        drawn = np.random.default_rng(seed + 2).integers(0, rows, shape)
    timetable = timed.run(num_batches, rows=drawn, record_actions=True)
    plain = timed.run(num_batches, rows=drawn)
    np.testing.assert_array_equal(plain.step_ends, timetable.step_ends)
    slots = [
        {(slot.kind, slot.lag, slot.micro_batch): place for place, slot in enumerate(stage.slots)}
        for stage in program.stages
    ]

    for replica in range(timetable.replicas):

        def cost(stage: int, step: int, action: Action, replica: int = replica) -> int:
            lags = {slot.lag for slot in program.stages[stage].slots if slot.kind is action.kind}
            lag = min(lags) if action.batch is None else step - action.batch
            row = 0 if drawn is None else drawn[stage, step, replica]
            return int(costs.tables[stage][row, slots[stage][action.kind, lag, action.micro_batch]])

        def wire(sender: int, receiver: int) -> Wire:
            link = links.activations[sender] if receiver > sender else links.gradients[receiver]
            return Wire(link.latency_ns, link.transfer_ns)

        truth = walk(program, num_batches, cost, wire, links.token.latency_ns)
        traces = timetable.traces(replica)
        for stage, (records, trace) in enumerate(zip(truth, traces, strict=True)):
            assert [action.kind for action, *_ in records] == [span.kind for span in trace]
            assert [(begin, end) for _, _, begin, end in records] == [(span.start_ns, span.end_ns) for span in trace]
            assert [record.action for record in records] == list(program.stages[stage].actions(num_batches))
            for record, span in zip(records, trace, strict=True):
                assert record.action.batch in (None, span.batch)
        assert timetable.total_ns[replica] == max((records[-1].end for records in truth if records), default=0)


@pytest.mark.parametrize("name", METHOD_NAMES)
def test_the_order_of_actions_is_the_programs(name: str) -> None:
    program = build_method(name, num_stages=4).program()
    timed = TimedProgram(program, StepCosts.of_kinds(program, {Kind.FORWARD: 3, Kind.BACKWARD: 5}))
    for stage, trace in enumerate(timed.run(9, record_actions=True).traces()):
        shown = [(span.kind, span.batch) for span in trace if span.kind is not Kind.UPDATE]
        actions = program.stages[stage].actions(9)
        assert shown == [(action.kind, action.batch) for action in actions if action.kind is not Kind.UPDATE]
        starts = [span.start_ns for span in trace]
        assert starts == sorted(starts)


def test_a_thousand_stages_in_closed_form() -> None:
    """Minimal DSP with forward = recompute = 1, backward = 2: a batch enters every 4, and passes a stage in 2 first."""
    program = DSP.minimal(1024).program()
    costs = StepCosts.of_kinds(program, {Kind.FORWARD: 1, Kind.RECOMPUTE: 1, Kind.BACKWARD: 2})
    small = DSP.minimal(5).program()
    for plan, table in ((program, costs), (small, StepCosts.of_kinds(small, {Kind.FORWARD: 1, Kind.BACKWARD: 2}))):
        ends = TimedProgram(plan, table).run(40).step_ends[:, :, 0]
        last = plan.num_stages - 1
        # The first batch goes down at the speed of forwards; the last stage then forwards and backwards it.
        assert ends[last, 0] == last + 3
    assert TimedProgram(program, costs).cycle().step_ns == 4


def test_micro_batches_share_the_time_of_their_batch() -> None:
    program = build_method("gpipe", num_stages=2, micro_batches=3, activations="stored").program()
    costs = StepCosts.of_kinds(program, {Kind.FORWARD: 10, Kind.BACKWARD: [20, 31]})
    of_kind = [
        [
            int(sum(cost for cost, slot in zip(table[0], stage.slots, strict=True) if slot.kind is kind))
            for kind in (Kind.FORWARD, Kind.BACKWARD)
        ]
        for table, stage in zip(costs.tables, program.stages, strict=True)
    ]
    assert of_kind == [[10, 20], [10, 31]]


def test_utilisation_is_work_over_step_time() -> None:
    program = DSP(staleness=(4, 2, 0), activations="stored").program()
    costs = StepCosts.of_kinds(program, {Kind.FORWARD: [1000, 2000, 500], Kind.BACKWARD: [1500, 2000, 500]})
    timetable = TimedProgram(program, costs).run(200)
    assert timetable.step_ns.tolist() == [4000]
    assert timetable.utilisation[:, 0].tolist() == [0.625, 1.0, 0.25]


def test_transfers_occupy_the_link_and_latency_does_not() -> None:
    program = DSP(staleness=(8, 0)).program()
    costs = StepCosts.of_kinds(program, {Kind.FORWARD: 10, Kind.RECOMPUTE: 10, Kind.BACKWARD: 20})
    busy = Links.equal(2, LinkCost(transfer_ns=55))
    late = Links.equal(2, LinkCost(latency_ns=55))
    assert TimedProgram(program, costs, busy).run(300).step_ns.tolist() == [55]
    assert TimedProgram(program, costs, late).run(300).step_ns.tolist() == [40]
    timed = TimedProgram(program, costs, busy)
    assert timed.describe(timed.cycle()) == "link 0 -> 1: its own work fills every step"


def test_what_does_not_fit_is_refused() -> None:
    program = DSP(staleness=(2, 0)).program()
    costs = StepCosts.of_kinds(program, {Kind.FORWARD: 1})
    with pytest.raises(ConfigError, match="3 times for 2 stages"):
        StepCosts.of_kinds(program, {Kind.FORWARD: [1, 2, 3]})
    with pytest.raises(ConfigError, match="slots per stage"):
        TimedProgram(DSP(staleness=(0, 0)).program(), costs)
    with pytest.raises(ProgramError, match="give one per link"):
        TimedProgram(program, costs, Links.equal(3))
    with pytest.raises(ConfigError, match="nothing to time"):
        TimedProgram(program, costs).run(0)
    with pytest.raises(ConfigError, match=r"\(stages, steps, replicas\)"):
        TimedProgram(program, costs).run(5, rows=np.zeros((2, 4, 1), np.int64))
    with pytest.raises(ConfigError, match="record_actions"):
        TimedProgram(program, costs).run(5).traces()
    with pytest.raises(ConfigError, match="whole number"):
        LinkCost(latency_ns=-1)
    with pytest.raises(ConfigError, match="maximum cycle mean needs constant costs"):
        TimedProgram(program, StepCosts(tuple(np.tile(table, (2, 1)) for table in costs.tables))).cycle()


def test_a_program_that_deadlocks_is_refused() -> None:
    first = (Slot(Kind.LOAD), Slot(Kind.FORWARD), Slot(Kind.RECEIVE_GRADIENT), Slot(Kind.SEND_ACTIVATION))
    second = (Slot(Kind.RECEIVE_ACTIVATION), Slot(Kind.BACKWARD), Slot(Kind.SEND_GRADIENT))
    program = Program(stages=(StageProgram(first), StageProgram(second)), staleness=Staleness((0, 0)))
    with pytest.raises(ProgramError, match="deadlock"):
        TimedProgram(program, StepCosts.of_kinds(program, {}))
    lonely = Program(stages=(StageProgram(first[:2]), StageProgram(second[:2])), staleness=Staleness((0, 0)))
    with pytest.raises(ProgramError, match="nobody sends"):
        TimedProgram(lonely, StepCosts.of_kinds(lonely, {}))


def test_costs_of_bytes() -> None:
    assert LinkCost.of_bytes(1e6, latency_s=0.02, bytes_per_s=125e6) == LinkCost(
        latency_ns=20_000_000, transfer_ns=8_000_000
    )
    assert Fraction(LinkCost.of_bytes(3, latency_s=0, bytes_per_s=1e9).transfer_ns) == 3
