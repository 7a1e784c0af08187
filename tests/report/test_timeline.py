"""Shares, waits, step times and the choice of the window."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from report.synthetic import simulate

from stalewise.errors import ConfigError
from stalewise.protocol.actions import Action
from stalewise.protocol.trace import Trace
from stalewise.report.timeline import Activity, Timeline, Window


def trace_of(stage: int, *records: tuple[str, int, int], offset: int = 0) -> Trace:
    """A trace from (action, start, end)."""
    trace = Trace(stage)
    for text, start, end in records:
        action = Action.parse(text)
        trace.add(action, -1 if action.batch is None else action.batch, offset + start, offset + end)
    return trace


def span(start_ns: int, end_ns: int) -> Window:
    return Window(start_ns=start_ns, end_ns=end_ns, num_steps=0, steady=False)


def test_every_instant_belongs_to_one_activity() -> None:
    timeline = Timeline.from_traces(
        [
            trace_of(
                0,
                ("LOAD4", 0, 5),
                ("F4", 5, 25),
                ("SEND_A4", 25, 30),
                ("R0", 30, 50),
                ("RECV_G0", 50, 62),
                ("B0", 62, 90),
                ("U", 90, 95),
            ),
            trace_of(1, ("RECV_A0", 0, 40), ("F0", 40, 60), ("B0", 60, 100)),
        ]
    )
    first, second = timeline.usage(span(0, 100)).stages
    assert {activity: round(share, 9) for activity, share in first.shares.items()} == {
        Activity.WAIT_LOADER: 0.05,
        Activity.FORWARD: 0.20,
        Activity.SEND: 0.05,
        Activity.RECOMPUTE: 0.20,
        Activity.WAIT_GRADIENT: 0.12,
        Activity.BACKWARD: 0.28,
        Activity.UPDATE: 0.05,
        Activity.UNRECORDED: 0.05,
        Activity.WAIT_ACTIVATION: 0.0,
        Activity.SYNTHESIZE: 0.0,
    }
    assert first.utilisation == pytest.approx(0.73)
    assert first.bubble == pytest.approx(0.27)
    assert first.waiting == pytest.approx(0.17)
    assert second.shares[Activity.WAIT_ACTIVATION] == pytest.approx(0.4)
    assert second.utilisation == pytest.approx(0.6)
    assert timeline.usage(span(0, 100)).bottleneck == 0
    assert timeline.usage(span(50, 100)).bottleneck == 1


def test_overlapping_records_count_once_and_computing_wins() -> None:
    timeline = Timeline.from_traces(
        [trace_of(0, ("F1", 0, 60), ("R0", 40, 80), ("RECV_G0", 20, 90), ("SEND_A1", 85, 95))]
    )
    shares = timeline.usage(span(0, 100)).stages[0].shares
    assert shares[Activity.RECOMPUTE] == pytest.approx(0.4)
    assert shares[Activity.FORWARD] == pytest.approx(0.4)
    assert shares[Activity.WAIT_GRADIENT] == pytest.approx(0.05)
    assert shares[Activity.SEND] == pytest.approx(0.1)
    assert shares[Activity.UNRECORDED] == pytest.approx(0.05)
    assert sum(shares.values()) == pytest.approx(1.0)


def test_records_are_clipped_to_the_window() -> None:
    timeline = Timeline.from_traces([trace_of(0, ("F0", 0, 60), ("B0", 60, 200))])
    shares = timeline.usage(span(50, 100)).stages[0].shares
    assert shares[Activity.FORWARD] == pytest.approx(0.2)
    assert shares[Activity.BACKWARD] == pytest.approx(0.8)


def test_step_times_are_intervals_between_update_ends() -> None:
    ends = [100, 200, 300, 410, 600]
    timeline = Timeline.from_traces([trace_of(0, *(("U", end - 10, end) for end in ends))])
    usage = timeline.usage(span(100, 600)).stages[0]
    assert usage.step_s == pytest.approx(105e-9)
    assert usage.step_p10_s == pytest.approx(np.percentile([100, 100, 110, 190], 10) * 1e-9)
    assert usage.step_p90_s == pytest.approx(np.percentile([100, 100, 110, 190], 90) * 1e-9)
    assert timeline.usage(span(0, 150)).stages[0].step_s is None


def test_window_leaves_out_warm_up_drain_and_evaluation() -> None:
    epochs, batches = 4, 20
    traces = simulate(epochs=epochs, batches=batches, jitter=0.0)
    timeline = Timeline.from_traces(traces)
    window = timeline.window(1000)
    # Steps 4..19 of an epoch update stage 0 with a forward beside it: 16 updates make 15 intervals.
    assert window.steady
    assert window.num_steps == batches - 4 - 1
    inside = [
        [record for record in trace if window.start_ns <= record.start_ns and record.end_ns <= window.end_ns]
        for trace in traces
    ]
    forwards = {record.batch for record in inside[0] if record.kind.value == "F"}
    assert len({batch // batches for batch in forwards}) == 1, "the window spans an evaluation"
    assert min(forwards) // batches in (1, 2), "the window is not in the middle of the run"
    for trace in traces:
        usage = timeline.usage(window).stages[trace.stage]
        assert usage.shares[Activity.UNRECORDED] < 0.02


def test_window_is_cut_from_the_middle_of_its_stretch() -> None:
    timeline = Timeline.from_traces(simulate(epochs=1, batches=105, jitter=0.0))
    whole, short = timeline.window(1000), timeline.window(8)
    assert (whole.num_steps, short.num_steps) == (100, 8)
    middle = (whole.start_ns + whole.end_ns) / 2
    assert (short.start_ns + short.end_ns) / 2 == pytest.approx(middle, abs=short.end_ns - short.start_ns)


def test_evaluation_splits_a_run_without_warm_up() -> None:
    timeline = Timeline.from_traces(simulate(staleness=(0, 0, 0), epochs=4, batches=10, jitter=0.0))
    window = timeline.window(1000)
    assert window.num_steps == 9
    # An evaluation of 400 ms would be a third; what is left is a last stage that ends before the first does.
    assert all(stage.shares[Activity.UNRECORDED] < 0.08 for stage in timeline.usage(window).stages)


def test_drain_is_not_taken_for_steady_state_where_it_is_the_longer() -> None:
    # Of an epoch of 6 batches one interval of stage 0 is steady and 4 are the drain.
    timeline = Timeline.from_traces(simulate(epochs=5, batches=6, jitter=0.0))
    window = timeline.window(8)
    assert (window.steady, window.num_steps) == (True, 1)
    assert timeline.usage(window).stages[0].staleness == 4


def test_run_without_steady_step_falls_back_to_the_whole() -> None:
    timeline = Timeline.from_traces(simulate(epochs=1, batches=3))
    window = timeline.window(8)
    assert (window.steady, window.num_steps) == (False, 0)
    assert window == timeline.whole


@settings(max_examples=20, deadline=None)
@given(
    slack=st.lists(st.integers(0, 3), min_size=1, max_size=3),
    jitter=st.sampled_from([0.0, 0.4]),
    seed=st.integers(0, 100),
)
def test_measured_staleness_is_the_declared_one(slack: list[int], jitter: float, seed: int) -> None:
    staleness = [sum(slack[stage:]) for stage in range(len(slack) + 1)]
    traces = simulate(
        staleness=staleness,
        epochs=2,
        batches=staleness[0] + 12,
        scale=[1.0] * len(staleness),
        jitter=jitter,
        seed=seed,
    )
    timeline = Timeline.from_traces(traces[::-1])
    usage = timeline.usage(timeline.window(8))
    assert usage.window.steady
    assert [stage.staleness for stage in usage.stages] == staleness
    for stage in usage.stages:
        assert sum(stage.shares.values()) == pytest.approx(1.0)


def test_slowest_stage_is_the_bottleneck() -> None:
    for slow in range(3):
        scale = [1.0, 1.0, 1.2]
        scale[slow] *= 2
        timeline = Timeline.from_traces(simulate(epochs=1, batches=60, scale=scale))
        usage = timeline.usage(timeline.window(40))
        assert usage.bottleneck == slow
        assert usage.stages[slow].utilisation > 0.9
        assert usage.step_s == pytest.approx(usage.stages[slow].step_s)


def test_stage_that_catches_up_is_not_the_bottleneck() -> None:
    # Stage 1 works through its queue without a pause, but in shorter steps than stage 0 can deliver.
    busy = [(f"B{step}", 80 * step, 80 * step + 80) for step in range(10)]
    slow = [(f"B{step}", 100 * step, 100 * step + 98) for step in range(8)]
    records = [
        [record for name, start, end in each for record in ((name, start, end - 1), ("U", end - 1, end))]
        for each in (slow, busy)
    ]
    usage = Timeline.from_traces([trace_of(stage, *each) for stage, each in enumerate(records)]).usage(span(0, 800))
    assert usage.stages[1].utilisation > usage.stages[0].utilisation
    assert usage.bottleneck == 0
    assert usage.step_s == pytest.approx(100e-9)


def test_file_and_traces_give_the_same_timeline(finished_run: Path) -> None:
    from_file, from_traces = Timeline.load(finished_run), Timeline.from_traces(simulate())
    assert from_file.num_stages == 3
    assert from_file.window(8) == from_traces.window(8)
    assert from_file.usage(from_file.window(50)) == from_traces.usage(from_traces.window(50))


def test_missing_stage_is_named(run_dir: Path) -> None:
    (run_dir / "timeline/stage1.npz").unlink()
    with pytest.raises(ConfigError, match=r"stage1\.npz does not exist.*Copy the missing file"):
        Timeline.load(run_dir)


def columns_of(path: Path) -> dict[str, np.ndarray]:
    with np.load(path) as archive:
        return {name: archive[name].copy() for name in archive.files}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda columns: columns.pop("batch"), r"stage2\.npz lacks the array 'batch'.*numpy\.savez"),
        (lambda columns: columns["kind"].__setitem__(2, 99), "record 2 is kind=99.*from 0 to 14"),
        (lambda columns: columns["end_ns"].__setitem__(3, 0), "record 3 is .*must not end before it starts"),
        (lambda columns: columns.update(batch=columns["batch"][:-1]), "entries and 'kind' has"),
        (lambda columns: columns.update(start_ns=columns["start_ns"] * 0.5), "'start_ns' is float64"),
    ],
)
def test_malformed_arrays_are_named(run_dir: Path, change, message: str) -> None:
    path = run_dir / "timeline/stage2.npz"
    columns = columns_of(path)
    change(columns)
    np.savez(path, allow_pickle=False, **columns)
    with pytest.raises(ConfigError, match=message):
        Timeline.load(run_dir)


@pytest.mark.parametrize("content", [b"", b"no archive", b"PK\x03\x04 cut off"])
def test_unreadable_archive_is_named(run_dir: Path, content: bytes) -> None:
    (run_dir / "timeline/stage0.npz").write_bytes(content)
    with pytest.raises(ConfigError, match=r"stage0\.npz is not a readable \.npz file"):
        Timeline.load(run_dir)


def test_pickled_arrays_are_refused(run_dir: Path) -> None:
    path = run_dir / "timeline/stage0.npz"
    columns = columns_of(path) | {"kind": np.array([{}], dtype=object)}
    np.savez(path, **columns)
    with pytest.raises(ConfigError, match=r"stage0\.npz is not a readable"):
        Timeline.load(run_dir)


def test_empty_timelines_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="without any record"):
        Timeline.from_traces([Trace(0), Trace(1)])
    with pytest.raises(ConfigError, match=r"holds no stage0\.npz"):
        Timeline.load(tmp_path)
    with pytest.raises(ConfigError, match="num_steps is 0"):
        Timeline.from_traces(simulate(epochs=1, batches=9)).window(0)
