"""Plans for runs: predictions, links as typed, the command, and what a run's timeline says of its stages."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from stalewise.cli.main import app
from stalewise.errors import ConfigError
from stalewise.experiments import profiling
from stalewise.experiments.config import TrainConfig
from stalewise.experiments.link_options import parse_bandwidth, parse_seconds
from stalewise.experiments.profiling import ModelProfile, profile_run
from stalewise.experiments.run_plan import plan_run
from stalewise.experiments.run_speeds import read_run_speeds
from stalewise.experiments.run_writer import write_json, write_timeline
from stalewise.methods import DSP, build_method
from stalewise.plan.partition import LayerCost
from stalewise.plan.planner import Link
from stalewise.protocol.actions import Kind
from stalewise.protocol.trace import KIND_CODES, Trace


def layer(forward_s: float = 0.010, backward_s: float = 0.020) -> LayerCost:
    return LayerCost(
        forward_s=forward_s,
        backward_s=backward_s,
        output_bytes=1000,
        graph_bytes=5000,
        unsaved_output_bytes=0,
        saved_input_bytes=1000,
        changes_input=False,
        weight_bytes=400,
        gradient_bytes=400,
        saved_weight_bytes=400,
        parameters=100,
        name="fc",
        type="Linear",
    )


def profile(count: int = 9, **changes: Any) -> ModelProfile:
    made = ModelProfile(
        layers=(layer(),) * count,
        slowdowns=(1.0, 1.0, 1.0),
        inputs=1000,
        targets=8,
        optimizer_copies=1.0,
        threads=1,
        link_bytes_per_s=1e9,
        link_latency_s=0.0,
        one_process_s=0.090,
        data_parallel_s=0.080,
        batch_size=64,
        passes=(((0.030, 0.030, 0.030),) * count,) * 3,
    )
    return replace(made, **changes)


class TestPredictions:
    def test_the_slowest_stage_sets_the_pace(self) -> None:
        planned = plan_run(profile(), DSP.minimal(3, activations="stored"))
        assert planned.plan.partition.cuts == (3, 6)
        assert planned.step_s == pytest.approx(0.090)
        assert "its own work" in planned.pace
        assert planned.utilisation == pytest.approx((1, 1, 1))
        assert planned.as_dict()["samples_per_s"] == pytest.approx(64 / 0.090)

    def test_stages_that_take_turns_take_all_of_their_times(self) -> None:
        planned = plan_run(profile(), build_method("bp", num_stages=3))
        assert planned.step_s == pytest.approx(0.270, rel=1e-3)
        assert "wait for each other" in planned.pace

    def test_latency_costs_backpropagation_each_way_and_dsp_nothing(self) -> None:
        link = Link(latency_s=0.020)
        bp = plan_run(profile(), build_method("bp", num_stages=3), link=link)
        assert bp.step_s == pytest.approx(0.270 + 4 * 0.020)
        # A link of slack d hides latency up to d steps.
        assert plan_run(profile(), DSP.minimal(3, activations="stored"), link=link).step_s == pytest.approx(0.090)

    def test_the_alternatives_are_told(self) -> None:
        planned = plan_run(profile(), DSP.minimal(3, activations="stored"), link=Link(bytes_per_s=3600 / 0.006))
        # 3,600 bytes of gradients: 2 (K-1)/K of them cross each link of the ring.
        assert planned.data_parallel_s == pytest.approx(0.080 + 0.008)
        one, several = planned.advice()
        assert one.startswith("one process")
        assert "1.00x" in one
        assert several.startswith("data parallelism over 3 processes: 88.0 ms a batch, 1.02x faster than this plan")

    def test_one_stage(self) -> None:
        planned = plan_run(
            profile(slowdowns=(1.0,), data_parallel_s=None, link_bytes_per_s=float("inf")), DSP.minimal(1)
        )
        assert planned.step_s == pytest.approx(0.270)
        assert [name.split()[0] for name, _ in planned.alternatives] == ["one"]
        json.dumps(planned.as_dict(), allow_nan=False)


def write_run(path: Path, cuts: tuple[int, ...], factors: tuple[float, ...], found: ModelProfile) -> None:
    path.mkdir()
    write_json(path / "config.json", TrainConfig(stages=len(factors), options={"activations": "stored"}).as_dict())
    write_json(path / "partition.json", {"cuts": list(cuts)})
    bounds = (0, *cuts, len(found.layers))
    traces = []
    for stage, factor in enumerate(factors):
        count = bounds[stage + 1] - bounds[stage]
        columns: dict[str, list[int]] = {name: [] for name in ("kind", "batch", "micro_batch", "start_ns", "end_ns")}
        now = 0
        for batch in range(9):
            for kind, each_s in ((Kind.FORWARD, 0.010), (Kind.BACKWARD, 0.020), (Kind.UPDATE, 0.0)):
                # Slow steps now and then are no slow device.
                length = round(1e9 * each_s * count * factor * (5 if batch % 4 == 3 else 1))
                values = (KIND_CODES.index(kind), batch, -1, now, now + length)
                for name, value in zip(columns, values, strict=True):
                    columns[name].append(value)
                now += length
        traces.append(Trace.from_columns(stage, columns))
    write_timeline(path, traces)


class TestSpeedsOfARun:
    def test_a_slow_stage_is_found_and_gets_less(self, tmp_path: Path) -> None:
        found = profile(12)
        write_run(tmp_path / "run", (4, 8), (1.0, 2.0, 1.05), found)
        speeds = read_run_speeds(tmp_path / "run", found)
        assert speeds.cuts == (4, 8)
        assert speeds.slowdowns == pytest.approx((1.05, 2.0, 1.05), rel=0.06)
        planned = plan_run(found, DSP.minimal(3, activations="stored"), slowdowns=speeds.slowdowns)
        assert planned.plan.partition.cuts == (5, 7)

    def test_the_jitter_of_its_steps_is_what_a_staleness_is_chosen_by(self, tmp_path: Path) -> None:
        found = profile(12)
        write_run(tmp_path / "run", (4, 8), (1.0, 1.0, 1.0), found)
        speeds = read_run_speeds(tmp_path / "run", found)
        assert speeds.jitter.in_order
        assert {round(factor, 6) for factor in speeds.jitter.factors[0]} == {1.0, 5.0}
        auto = DSP(staleness="auto", num_stages=3, activations="stored")
        calm = plan_run(found, auto)
        assert calm.plan.depth is not None
        assert calm.plan.depth.staleness == (2, 1, 0), "the passes of the profile are all alike"
        slow = replace(speeds.jitter, factors=(speeds.jitter.factors[0], *[(1.0, 1.0, 1.0, 5.0, 1.0)] * 2))
        deep = plan_run(found, auto, jitter=slow)
        assert deep.plan.depth is not None
        assert sum(deep.plan.depth.staleness) > 3
        assert deep.plan.memory is not None
        assert calm.plan.memory is not None
        assert deep.plan.memory[0].total > calm.plan.memory[0].total, "memory is that of the staleness that was chosen"
        assert deep.as_dict()["staleness"]["staleness"] == list(deep.plan.method.staleness)

    def test_a_folder_without_a_run(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="holds no finished run"):
            read_run_speeds(tmp_path, profile())


@pytest.mark.parametrize(
    ("text", "expected"), [("1Gbit/s", 1.25e8), ("100 Mbps", 1.25e7), ("2.5GB/s", 2.5e9), ("8bit/s", 1.0)]
)
def test_bandwidths(text: str, expected: float) -> None:
    assert parse_bandwidth(text) == expected


@pytest.mark.parametrize(("text", "expected"), [("20ms", 0.020), ("0.5 s", 0.5), ("50us", 5e-5)])
def test_seconds(text: str, expected: float) -> None:
    assert parse_seconds(text) == pytest.approx(expected)


@pytest.mark.parametrize("text", ["", "fast", "0Gbit/s", "-1Gbit/s", "1 G", "1Gbit"])
def test_what_is_no_bandwidth(text: str) -> None:
    with pytest.raises(ConfigError, match="such as 1Gbit/s"):
        parse_bandwidth(text)


@pytest.mark.parametrize("text", ["", "20", "-1ms", "1 hour"])
def test_what_is_no_time(text: str) -> None:
    with pytest.raises(ConfigError, match="such as 20ms"):
        parse_seconds(text)


class TestCommand:
    @pytest.fixture(autouse=True)
    def _cache(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("STALEWISE_CACHE", str(tmp_path / "cache"))

    def test_it_measures_once_and_prints_a_plan(self, tmp_path: Path) -> None:
        words = ["plan", "--model", "resnet8", "--stages", "2", "--batch-size", "8", "--json"]
        first = CliRunner().invoke(app, words)
        assert first.exit_code == 0, first.output
        planned = json.loads(first.stdout)
        assert len(planned["stages"]) == 2
        assert planned["step_s"] > 0
        assert all(stage["memory"]["total"] > 0 for stage in planned["stages"])
        assert planned["one_process_s"] > 0
        assert planned["data_parallel_s"] > 0
        again = CliRunner().invoke(app, words)
        assert json.loads(again.stdout) == planned
        text = CliRunner().invoke(app, words[:-1])
        assert "profile from the cache" in text.stdout
        cuts = ",".join(map(str, planned["cuts"]))
        assert f"--partition {cuts}" in text.stdout

    def test_a_damaged_profile_is_measured_again(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def measured(main: object, *, num_workers: int, args: list[str]) -> None:
            write_json(Path(args[0]) / "profile.json", profile().as_dict())

        monkeypatch.setattr(profiling, "launch", measured)
        config = TrainConfig()
        found, path, fresh = profile_run(config)
        assert (found, fresh) == (profile(), True)
        assert profile_run(config) == (found, path, False)
        path.write_text("{")
        assert profile_run(config) == (found, path, True)
        assert profile_run(replace(config, batch_size=32))[1] != path

    def test_a_run_is_planned_again(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        found = profile(12)
        monkeypatch.setattr("stalewise.cli.plan.profile_run", lambda config, refresh: (found, tmp_path, True))
        write_run(tmp_path / "run", (4, 8), (1.0, 2.0, 1.0), found)
        result = CliRunner().invoke(app, ["plan", "--from", str(tmp_path / "run"), "--json"])
        assert result.exit_code == 0, result.output
        planned = json.loads(result.stdout)
        assert (planned["before"]["cuts"], planned["cuts"]) == ([4, 8], [5, 7])
        assert planned["before"]["step_s"] / planned["step_s"] == pytest.approx(240 / 150)
        text = CliRunner().invoke(app, ["plan", "--from", str(tmp_path / "run")]).stdout
        assert "gain 60%" in text.replace("\n", " ")
