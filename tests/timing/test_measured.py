"""Costs and latencies come back from the trace that they made."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from timing.walk import methods

from stalewise.errors import ConfigError
from stalewise.methods import BP, DSP, GPipe, Method
from stalewise.protocol.actions import Kind
from stalewise.protocol.trace import KIND_CODES, Trace
from stalewise.report.timeline import Timeline
from stalewise.timing import LinkCost, Links, StepCosts, TimedProgram
from stalewise.timing.measured import by_kind, measure

RECEIVES = {Kind.RECEIVE_ACTIVATION, Kind.RECEIVE_GRADIENT, Kind.RECEIVE_LOSS, Kind.RECEIVE_TOKEN}


def timeline_of(timed: TimedProgram, num_batches: int) -> Timeline:
    return Timeline.from_traces(timed.run(num_batches, record_actions=True).traces())


@given(method=methods(4), seed=st.integers(0, 1000))
@settings(max_examples=60)
def test_costs_come_back(method: Method, seed: int) -> None:
    """And simulating with them takes as long as the run did, wherever every receive is once there at once."""
    program = method.program()
    random = np.random.default_rng(seed)
    tables = []
    for stage in program.stages:
        times = random.integers(1, 100, len(stage.slots))
        tables.append(np.where([slot.kind in RECEIVES for slot in stage.slots], 0, times)[None])
    timed = TimedProgram(program, StepCosts(tuple(tables)))
    measured = measure(program, timeline_of(timed, 60).stages)
    for stage, (table, truth) in enumerate(zip(measured.costs.tables, tables, strict=True)):
        for place, slot in enumerate(program.stages[stage].slots):
            if slot.kind not in RECEIVES:
                assert (table[:, place] == truth[0, place]).all(), (stage, slot)


def test_latency_shows_where_somebody_waits() -> None:
    """Backpropagation waits for every message."""
    program = BP(3).program()
    costs = StepCosts.of_kinds(program, {Kind.FORWARD: 100, Kind.BACKWARD: 200, Kind.RECEIVE_GRADIENT: 3})
    truth = Links(
        activations=(LinkCost(latency_ns=11), LinkCost(latency_ns=13)),
        gradients=(LinkCost(latency_ns=17), LinkCost(latency_ns=19)),
    )
    timed = TimedProgram(program, costs, truth)
    measured = measure(program, timeline_of(timed, 20).stages)
    # What a receive costs cannot be told from the latency where nothing ever lies ready; their sum can.
    assert [link.latency_ns for link in measured.links.activations] == [11, 13]
    assert [link.latency_ns for link in measured.links.gradients] == [17 + 3, 19 + 3]
    again = TimedProgram(program, measured.costs.mean(), measured.links)
    assert again.cycle().step_ns == timed.cycle().step_ns == 900 + 11 + 13 + 17 + 19 + 6


def test_a_receive_costs_what_it_takes_where_its_message_lies_ready() -> None:
    program = DSP(staleness=(6, 3, 0)).program()
    receives = {Kind.RECEIVE_ACTIVATION: 4, Kind.RECEIVE_GRADIENT: 5}
    times = {Kind.FORWARD: 100, Kind.RECOMPUTE: 100, Kind.BACKWARD: [200, 150, 200], **receives}
    timed = TimedProgram(program, StepCosts.of_kinds(program, times), Links.equal(3, LinkCost(latency_ns=30)))
    measured = measure(program, timeline_of(timed, 80).stages)
    for stage, table in zip(program.stages, measured.costs.tables, strict=True):
        for place, slot in enumerate(stage.slots):
            # Stage 1 is quicker than stage 0: it waits for every activation, and its link's latency shows.
            if slot.kind in receives and (slot.kind, stage) != (Kind.RECEIVE_ACTIVATION, program.stages[1]):
                assert (table[:, place] <= receives[slot.kind]).all()
    again = TimedProgram(program, measured.costs.mean(), measured.links)
    assert again.cycle().step_ns == timed.cycle().step_ns


def test_pauses_between_steps_are_left_out() -> None:
    program = DSP(staleness=(2, 0)).program()
    timed = TimedProgram(program, StepCosts.of_kinds(program, {Kind.FORWARD: 10, Kind.BACKWARD: 20, Kind.LOAD: 1}))
    traces = timed.run(40, record_actions=True).traces()
    paused = []
    for trace in traces:
        columns = {name: np.array(column) for name, column in trace.columns().items()}
        late = np.arange(len(trace)) > np.flatnonzero(columns["kind"] == KIND_CODES.index(Kind.UPDATE))[20]
        columns["start_ns"], columns["end_ns"] = (columns[name] + 5000 * late for name in ("start_ns", "end_ns"))
        paused.append(Trace.from_columns(trace.stage, {name: column.tolist() for name, column in columns.items()}))
    measured = measure(program, Timeline.from_traces(paused).stages)
    assert max(table.max() for table in measured.costs.tables) == 20


def test_costs_by_kind_time_another_method() -> None:
    program = GPipe(2, micro_batches=2, activations="stored").program()
    costs = StepCosts.of_kinds(program, {Kind.FORWARD: [30, 50], Kind.BACKWARD: [60, 70], Kind.UPDATE: 9})
    times = by_kind(program, costs)
    assert times[Kind.FORWARD] == times[Kind.RECOMPUTE] == [30, 50]
    assert (times[Kind.BACKWARD], times[Kind.UPDATE]) == ([60, 70], [9, 9])
    other = BP(2).program()
    assert TimedProgram(other, StepCosts.of_kinds(other, times)).cycle().step_ns == 30 + 50 + 60 + 70 + 9


def test_what_cannot_be_measured_is_refused() -> None:
    program = DSP(staleness=(2, 0)).program()
    timeline = timeline_of(TimedProgram(program, StepCosts.of_kinds(program, {Kind.FORWARD: 10})), 20)
    with pytest.raises(ConfigError, match="of 2 stages and the program of 3"):
        measure(BP(3).program(), timeline.stages)
    with pytest.raises(ConfigError, match="no complete step"):
        measure(GPipe(2).program(), timeline.stages)
    with pytest.raises(ConfigError, match="no complete step"):
        measure(program, timeline_of(TimedProgram(program, StepCosts.of_kinds(program, {})), 1).stages)
