"""From run folders to rows: every number is checked against one that was worked out by hand."""

from __future__ import annotations

import json
import math
import statistics
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from comparison_folders import config, no_training, write_run
from report.synthetic import simulate

from stalewise.experiments.compare import compare
from stalewise.experiments.comparison_table import default_target, measure, realised_staleness, time_to
from stalewise.protocol.stragglers import Straggler
from stalewise.report import Timeline
from stalewise.report.comparison_columns import columns
from stalewise.report.comparison_data import Comparison, Curve, Spread, TableRow

__all__ = ["no_training"]


@pytest.fixture
def compared(no_training: list[str], tmp_path: Path) -> Comparison:
    return compare(config(("bp", "dni", "dsp"), seeds=3, baselines=("one-process", "data-parallel")), tmp_path)


def row(comparison: Comparison, name: str) -> TableRow:
    return next(row for row in comparison.rows if row.name == name)


def test_a_spread_tells_mean_range_and_deviation() -> None:
    spread = Spread((0.70, 0.71, 0.75))
    assert spread.mean == pytest.approx(0.72)
    assert (spread.low, spread.high) == (0.70, 0.75)
    assert spread.deviation == pytest.approx(statistics.stdev((0.70, 0.71, 0.75)))
    assert Spread((0.5,)).deviation is None
    assert Spread.of([None, 2.0, None, 4.0]) == Spread((2.0, 4.0))
    assert Spread.of([None]) is None
    wild = Spread((1.0, math.nan))
    assert (math.isnan(wild.mean), wild.deviation) == (True, None)
    assert wild.as_dict()["mean"] is None, "JSON has no NaN"


def test_accuracy_speed_and_time_over_seeds(compared: Comparison) -> None:
    """Backpropagation ends at 0.80, 0.81 and 0.82, with 100, 110 and 120 samples/s."""
    bp = row(compared, "bp")
    assert bp.test_accuracy == Spread((0.80, 0.81, 0.82))
    assert bp.best_accuracy == bp.test_accuracy
    assert bp.samples_per_s == Spread((100.0, 110.0, 120.0))
    assert bp.epoch_s is not None
    assert bp.epoch_s.values == pytest.approx((160 / 100, 160 / 110, 160 / 120))
    assert bp.speed_up is not None
    assert bp.speed_up.values == pytest.approx((100 / 110, 1.0, 120 / 110))
    dsp = row(compared, "dsp")
    assert dsp.speed_up is not None
    assert dsp.speed_up.values == pytest.approx((200 / 110, 210 / 110, 220 / 110))
    assert dsp.bytes_per_batch == Spread((3000.0,) * 3), "60,000 bytes in 20 batches"
    assert dsp.title == "DSP(1,1,0;4,2,0)"
    assert (dsp.baseline, row(compared, "one-process").baseline) == (False, True)


def test_the_target_is_95_percent_of_the_worst_rounded_down(compared: Comparison) -> None:
    """DSP ends worst with 0.71 on average; 0.95 of it is 0.6745. All runs reach that in their last epoch."""
    assert (compared.target_accuracy, compared.target_given) == (0.67, False)
    bp, dsp = row(compared, "bp"), row(compared, "dsp")
    assert bp.target_s is not None
    assert bp.target_s.values == pytest.approx([2 * (160 / rate + 0.5) for rate in (100, 110, 120)])
    assert (bp.target_reached, dsp.target_reached) == (3, 3)


def test_a_given_target_may_be_missed(no_training: list[str], tmp_path: Path) -> None:
    found = compare(config(seeds=3), tmp_path, target_accuracy=0.715)
    assert (row(found, "bp").target_reached, row(found, "dsp").target_reached) == (3, 1)
    assert found.target_given


@pytest.mark.parametrize(("finals", "target"), [((0.8, 0.4), 0.38), ((1.0,), 0.95), ((0.2,), 0.19), ((), None)])
def test_whole_percents_survive_the_arithmetic(finals: tuple[float, ...], target: float | None) -> None:
    """0.95 x 0.4 is 0.38 and not 0.37, whatever floats say."""
    rows = [TableRow(name=str(at), title="", baseline=False, runs=(), test_accuracy=Spread((at,))) for at in finals]
    assert default_target(rows) == target


def test_time_to_an_accuracy_is_that_of_the_first_epoch() -> None:
    curve = Curve(epoch=(1, 2, 3, 4), time_s=(1.0, 2.0, 3.0, 4.0), loss=(None,) * 4, accuracy=(0.5, None, 0.9, 0.7))
    assert [time_to(curve, target) for target in (0.5, 0.6, 0.9, 0.91)] == [1.0, 3.0, 3.0, None]


def test_realised_staleness_counts_warm_up_and_drain() -> None:
    """10 batches, m = (4,2,0): batch j comes back when min(m, 9 - j) later ones were forwarded."""
    timeline = Timeline.from_traces(simulate(staleness=(4, 2, 0), epochs=1, batches=10))
    expected = [(sum(min(lag, 9 - batch) for batch in range(10)) / 10, lag) for lag in (4, 2, 0)]
    assert [realised_staleness(spans) for spans in timeline.stages] == [(3.0, 4), (1.7, 2), (0.0, 0)] == expected
    nothing = timeline.stages[0].where(np.zeros(len(timeline.stages[0]), np.bool_))
    assert realised_staleness(nothing) is None


def test_stages_over_seeds(compared: Comparison) -> None:
    dsp = row(compared, "dsp")
    assert [spread and spread.mean for spread in dsp.staleness_mean] == [3.0, 1.7, 0.0]
    assert dsp.staleness_max == (4, 2, 0)
    assert dsp.realised_mean is not None
    assert dsp.realised_mean.mean == pytest.approx((3.0 + 1.7) / 3)
    assert dsp.gradient_difference == (Spread((0.25, 0.5, 0.75)), Spread((0.125,) * 3), Spread((0.0,) * 3))
    assert all(stage is not None and 0 < stage.low <= stage.high <= 1 for stage in dsp.utilisation)
    bp = row(compared, "bp")
    assert bp.gradient_difference == ()
    assert bp.staleness_max == (0, 0, 0)


def test_memory_by_stage_and_category(compared: Comparison) -> None:
    """The runs have no prediction of their own, so that of the comparison's profile stands in."""
    dsp = row(compared, "dsp")
    assert dsp.memory_total == Spread((6 * 28_000.0,) * 3)
    assert dsp.memory_predicted == 6 * 20_000
    assert dsp.resident_total == Spread((3 * 2.0**28,) * 3)
    first = dsp.memory[0]
    assert first.measured["weights"] == Spread((3000.0,) * 3)
    assert first.measured["total"].mean == 84_000
    assert first.predicted == {"graphs": 1, "total": 60_000}
    assert row(compared, "one-process").memory == ()


def test_a_prediction_of_the_run_itself_comes_first(no_training: list[str], tmp_path: Path) -> None:
    compare(config(("bp",), seeds=1), tmp_path)
    path = tmp_path / "runs" / "bp-seed0" / "summary.json"
    summary = json.loads(path.read_text())
    for stage in summary["memory"]:
        stage["predicted"] = {"total": 7}
    path.write_text(json.dumps(summary))
    (found,) = compare(config(("bp",), seeds=1), tmp_path).rows
    assert found.memory_predicted == 21


def test_one_process_counts_once(no_training: list[str], tmp_path: Path) -> None:
    """All stages of the sequential engine are in one process, whose resident memory each of them reports."""
    found = compare(config(seeds=1, engine="sequential"), tmp_path)
    assert row(found, "dsp").resident_total == Spread((2.0**28,))
    assert row(found, "dsp").memory_total == Spread((6 * 28_000.0,))


def test_what_was_not_recorded_is_none(tmp_path: Path) -> None:
    """The least that a run leaves: no timeline, no memory, no field beyond the first ones."""
    write_run(tmp_path, accuracy=[0.5], samples_per_s=10, config={"stages": 3}, memory=False, staleness=None)
    summary = json.loads((tmp_path / "summary.json").read_text())
    kept = {name: summary[name] for name in ("test_accuracy", "samples_per_s")}
    (tmp_path / "summary.json").write_text(json.dumps(kept))
    found = measure(tmp_path)
    assert (found.test_accuracy, found.samples_per_s) == (0.5, 10)
    assert (found.epoch_s, found.bytes_per_batch) == (None, None)
    assert (found.utilisation, found.staleness, found.memory, found.gradient_difference) == ((), (), (), ())


def test_a_failed_row_says_why(compared: Comparison) -> None:
    failed = row(compared, "dni")
    assert failed.remark == "failed with seed 0, 1, 2: ValueError: <no> batch | left"
    assert failed.speed_up is None
    assert row(compared, "bp").remark == ""
    assert "BatchNorm" in row(compared, "data-parallel").remark


def test_a_run_that_cannot_be_read_fails_its_row_alone(no_training: list[str], tmp_path: Path) -> None:
    compare(config(seeds=1), tmp_path)
    (tmp_path / "runs" / "bp-seed0" / "metrics.jsonl").write_text("no JSON\n")
    found = compare(config(seeds=1), tmp_path)
    assert "metrics.jsonl, line 1" in row(found, "bp").remark
    assert row(found, "dsp").done == 1
    assert row(found, "dsp").speed_up is None, "there is no backpropagation to compare with"


def test_rows_are_values(compared: Comparison) -> None:
    assert replace(compared) == compared
    json.dumps(compared.as_dict(), allow_nan=False)


def test_slow_steps_have_calm_twins(tmp_path: Path, no_training: list[str]) -> None:
    """Every method is run twice, baselines are not; the second stage always takes twice as long."""
    slow = (Straggler(stages=(1,), factor=2),)
    found = compare(config(["bp", "dsp"], seeds=2, baselines=("one-process",), stragglers=slow), tmp_path / "out")
    of_a_seed = ["bp-seed{0}", "bp-calm-seed{0}", "dsp-seed{0}", "dsp-calm-seed{0}", "one-process-seed{0}"]
    assert no_training == [name.format(seed) for seed in range(2) for name in of_a_seed]
    kept = json.loads((tmp_path / "out" / "runs" / "bp-calm-seed1" / "config.json").read_text())
    assert kept["stragglers"] == []
    assert row(found, "one-process").slow_down is None
    for name in ("bp", "dsp"):
        assert row(found, name).slow_down == Spread((1.0, 1.0))
    assert found.floor == pytest.approx(1 / 3), "one of three stages, always"
    by_model = [row(found, name).slow_down_model for name in ("bp", "dsp")]
    assert by_model[0] is not None
    assert by_model[1] is not None
    assert 0.2 < by_model[0].mean < by_model[1].mean < 1.2, "stages that take turns feel one of them less"
    heads = [column.head for column in columns(found)]
    assert "Slow-down (floor 33.3%)" in heads
    assert "by the model" in heads


def test_without_slow_steps_nothing_is_said_of_them(compared: Comparison) -> None:
    assert compared.floor is None
    assert not any("low-down" in column.head for column in columns(compared))
