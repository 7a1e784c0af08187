"""`stalewise simulate`, as a person uses it and misuses it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from report.synthetic import write_run
from typer.testing import CliRunner, Result

from stalewise.cli.main import app
from stalewise.errors import ConfigError
from stalewise.report import Timeline


def simulate(*arguments: str) -> Result:
    """The command in this process; errors of its own come through."""
    return CliRunner().invoke(app, ["simulate", *arguments], catch_exceptions=False)


def answer(*arguments: str) -> dict[str, object]:
    done = simulate(*arguments, "--json")
    assert done.exit_code == 0
    result: dict[str, object] = json.loads(done.stdout)["result"]
    return result


def test_it_says_how_fast_and_why() -> None:
    text = simulate("--staleness", "4,2,0", "--forward-ms", "10,12,9", "--batches", "200").stdout
    assert "step time      48.000 ms" in text
    assert "throughput     20.833 batches/s" in text
    assert "bottleneck     stage 1: its own work fills every step" in text
    assert "stage 0 83.3%, stage 1 100.0%, stage 2 56.2%" in text
    locked = simulate("--staleness", "2,1,0", "--latency-ms", "0.7").stdout
    assert "bottleneck     stage 0 and stage 1 wait for each other in a cycle" in locked
    assert "steady step    4.200 ms" in locked


def test_links_methods_and_slow_steps() -> None:
    slow_link = answer("--staleness", "6,3,0", "--gbit-per-s", "1", "--message-mib", "1")
    assert slow_link["step_s"] == pytest.approx(8 * 2**20 / 1e9)
    assert slow_link["bottleneck"] == "link 0 -> 1: its own work fills every step"
    assert answer("--method", "bp", "--stages", "5")["step_s"] == pytest.approx(0.015)
    assert answer("--method", "gpipe", "--option", "micro_batches=8", "--option", "activations=stored")[
        "step_s"
    ] == pytest.approx(3e-3 * 10 / 8)
    slowed = answer("--staleness", "4,2,0", "--straggler", "probability=1/3,factor=2", "--replicas", "8")
    assert slowed["slow_down"] == pytest.approx(0.418, abs=0.02)
    assert slowed["step_interval_s"] is not None


def test_it_leaves_what_a_run_leaves(tmp_path: Path) -> None:
    out = tmp_path / "simulated"
    done = simulate("--staleness", "4,2,0", "--batches", "40", "--out", str(out))
    assert {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()} == {
        "simulation.json",
        "timeline/stage0.npz",
        "timeline/stage1.npz",
        "timeline/stage2.npz",
        "timeline.svg",
        "trace.json",
    }
    assert f"written        {out}" in done.stdout
    usage = Timeline.load(out).usage(Timeline.load(out).window(8))
    assert usage.step_s == pytest.approx(0.004)
    assert [stage.staleness for stage in usage.stages] == [4, 2, 0]
    assert len(json.loads((out / "trace.json").read_text())["traceEvents"]) > 600
    with pytest.raises(ConfigError, match="not empty"):
        simulate("--out", str(out))
    assert simulate("--out", str(out), "--overwrite", "--batches", "5").exit_code == 0


def test_a_run_gives_its_method_costs_and_latencies(tmp_path: Path) -> None:
    """The synthetic run's own recurrence takes 36.4 ms a step on its busiest stage, and so must this one."""
    run = write_run(tmp_path / "run", epochs=3, jitter=0.0)
    out = tmp_path / "simulated"
    text = simulate("--from", str(run), "--out", str(out)).stdout
    measured, simulated = (
        Timeline.load(folder).usage(Timeline.load(folder).window(20)).step_s for folder in (run, out)
    )
    assert simulated == pytest.approx(measured, rel=0.01)
    assert "measured" in text
    assert "samples/s" in text
    page = (out / "beside.html").read_text()
    assert page.index("Measured") < page.index("Simulated step")
    assert page.count("<svg") == 2
    resampled = answer("--from", str(run), "--resample", "--replicas", "3")
    assert resampled["step_s"] == pytest.approx(simulated, rel=0.02)
    other = simulate("--from", str(run), "--method", "bp").stdout
    assert "stage 0, stage 1 and stage 2 wait for each other" in other
    with pytest.raises(ConfigError, match="cannot be resampled"):
        simulate("--from", str(run), "--method", "bp", "--resample")
    with pytest.raises(ConfigError, match="the run has 3 stages and the method 2"):
        simulate("--from", str(run), "--staleness", "1,0")


def test_a_run_whose_plan_decided_what_stages_keep(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", epochs=2, jitter=0.0)
    config, plan = (json.loads((run / name).read_text()) for name in ("config.json", "partition.json"))
    config["options"] = {**config.get("options", {}), "activations": "auto"}
    (run / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="does not say what its stages kept"):
        simulate("--from", str(run))
    plan["activations"] = ["recompute", "recompute", "stored"]
    (run / "partition.json").write_text(json.dumps(plan))
    assert "simulated: +0." in (text := simulate("--from", str(run)).stdout) or "simulated: -0." in text


def test_many_stages_are_told_in_few_words() -> None:
    text = simulate("--stages", "64", "--batches", "300").stdout
    assert text.startswith("dsp over 64 stages, staleness 126 .. 0, 300 batches\n")
    assert "utilisation    mean 99.6%, least 75.0% (stage 63)" in text
    assert max(map(len, text.splitlines())) < 120


def test_steps_that_vary_cost_more_than_their_mean() -> None:
    calm, varied = (answer("--staleness", "4,2,0", "--jitter", jitter, "--replicas", "4") for jitter in ("0", "0.4"))
    assert calm["slow_down"] == pytest.approx(0.0, abs=1e-3)
    assert isinstance(varied["slow_down"], float)
    assert varied["slow_down"] > 0.05
    assert varied == answer("--staleness", "4,2,0", "--jitter", "0.4", "--replicas", "4")


def test_mistakes_are_named() -> None:
    with pytest.raises(ConfigError, match="--forward-ms 'x'"):
        simulate("--forward-ms", "x")
    with pytest.raises(ConfigError, match="2 times for 3 stages"):
        simulate("--forward-ms", "1,2")
    with pytest.raises(ConfigError, match="needs --gbit-per-s"):
        simulate("--message-mib", "3")
    with pytest.raises(ConfigError, match="is not the configuration of a run"):
        simulate("--from", "nowhere")
