"""The sentences say what the numbers say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from report.synthetic import simulate, write_run
from report.test_run_folder import edit

from stalewise.report.findings import Finding, findings, summary_sentence
from stalewise.report.run_folder import RunFolder
from stalewise.report.timeline import Activity, StageUsage, Usage, Window


def usage_of(*shares: dict[Activity, float], steady: bool = True) -> Usage:
    """A usage with these shares, the rest of each stage not recorded."""
    stages = []
    for index, given in enumerate(shares):
        full = dict.fromkeys(Activity, 0.0) | given
        full[Activity.UNRECORDED] += 1 - sum(full.values())
        stages.append(StageUsage(stage=index, shares=full, step_s=0.1, step_p10_s=0.1, step_p90_s=0.1, staleness=None))
    window = Window(start_ns=0, end_ns=10**9, num_steps=10, steady=steady)
    return Usage(window=window, stages=tuple(stages))


def busy(share: float, **rest: float) -> dict[Activity, float]:
    return {Activity.BACKWARD: share} | {Activity[name]: value for name, value in rest.items()}


def speed(run_dir: Path, usage: Usage, **config: Any) -> Finding:
    edit(run_dir / "config.json", **config)
    return findings(RunFolder.read(run_dir), usage)[0]


def test_bottleneck_names_stage_share_and_gain(run_dir: Path) -> None:
    found = speed(run_dir, usage_of(busy(0.5), busy(0.96), busy(0.7)))
    assert found.title == "stage 1 is the bottleneck"
    assert found.detail == "it computes 96% of the time, the others 50% to 70%"
    assert "chosen from a profile" in found.advice
    assert f"up to {0.96 * 3 / 2.16:.2f} times faster" in found.advice
    edit(run_dir / "partition.json", method="fixed")
    assert "stage 0 holds more of the layers" in speed(run_dir, usage_of(busy(0.5), busy(0.96), busy(0.7))).advice


def test_two_busy_stages_share_the_blame(run_dir: Path) -> None:
    found = speed(run_dir, usage_of(busy(0.3), busy(0.99), busy(1.0)))
    assert found.title == "stages 1 and 2 are the bottleneck"
    assert found.detail == "they compute 99% to 100% of the time, stage 0 30%"


def test_many_busy_stages_are_a_full_pipeline(run_dir: Path) -> None:
    found = speed(run_dir, usage_of(busy(1.0), *[busy(0.9)] * 40))
    assert found.title == "the pipeline is nearly full"


def test_single_layers_cannot_be_moved(run_dir: Path) -> None:
    stages = [{"stage": stage, "layers": [stage + 3, stage + 4]} for stage in range(3)]
    edit(run_dir / "partition.json", stages=stages)
    assert "It holds a single layer" in speed(run_dir, usage_of(busy(0.5), busy(0.96), busy(0.7))).advice
    assert "Each holds a single layer" in speed(run_dir, usage_of(busy(0.3), busy(0.96), busy(0.95))).advice


def test_full_pipeline(run_dir: Path) -> None:
    found = speed(run_dir, usage_of(busy(0.97), busy(0.95), busy(0.9)))
    assert found.title == "the pipeline is nearly full"
    assert "94% of the time on average, stage 2 the least with 90%" in found.detail


def test_locked_links(run_dir: Path) -> None:
    found = speed(run_dir, usage_of(busy(0.3), busy(0.4), busy(0.35)), staleness=[1, 1, 0])
    assert found.title == "the stages wait for each other"
    assert "link 0\u00a0→\u00a01 has no slack" in found.detail
    assert "(4,2,0)" in found.advice


@pytest.mark.parametrize(
    ("rest", "title", "advice"),
    [
        ({"WAIT_LOADER": 0.3}, "the data loader is the limit", "loader workers"),
        ({"SEND": 0.3}, "sending takes much of the time", "output is small"),
        ({}, "much time passes between the actions", "Larger batches"),
        ({"WAIT_GRADIENT": 0.3}, "messages arrive late", "(6,3,0)"),
        ({"WAIT_ACTIVATION": 0.3}, "messages arrive late", "(6,3,0)"),
    ],
)
def test_what_the_busiest_stage_does_instead(run_dir: Path, rest: dict[str, float], title: str, advice: str) -> None:
    found = speed(run_dir, usage_of(busy(0.6, **rest), busy(0.4), busy(0.4)))
    assert found.title == title
    assert "computes 60% of the time" in found.detail
    assert "30%" in found.detail or not rest
    assert advice in found.advice


def test_one_process_and_short_runs_blame_no_stage(run_dir: Path) -> None:
    shares = (busy(0.5), busy(0.96), busy(0.7))
    assert "too short" in speed(run_dir, usage_of(*shares, steady=False)).title
    assert "took turns" in speed(run_dir, usage_of(*shares), engine="sequential").title


def test_divergence_comes_first(run_dir: Path) -> None:
    lines = '{"event":"batch","batch":0,"loss":2.0}\n{"event":"batch","batch":1,"loss":NaN,"lr":9.5}\n'
    (run_dir / "metrics.jsonl").write_text(lines, encoding="utf-8")
    first, second = findings(RunFolder.read(run_dir), usage_of(busy(0.5), busy(0.96), busy(0.7)))
    assert (first.title, "from batch 1 on" in first.detail) == ("training diverged", True)
    assert "9.5" in first.advice
    assert "bottleneck" in second.title


def test_side_issues(run_dir: Path) -> None:
    edit(run_dir / "environment.json", cores=4, threads_per_stage=2)
    shares = usage_of(busy(0.5, WAIT_LOADER=0.2), busy(0.96), busy(0.7))
    titles = [found.title for found in findings(RunFolder.read(run_dir), shares)]
    assert titles == ["stage 1 is the bottleneck", "stage 0 waits for data", "the stages share cores"]
    edit(run_dir / "environment.json", threads_per_stage=1)
    assert len(findings(RunFolder.read(run_dir), shares)) == 2


def test_summary_sentence(finished_run: Path) -> None:
    run = RunFolder.read(finished_run)
    found = findings(run, run.timeline.usage(run.timeline.window(100)))
    assert summary_sentence(run, found).startswith(
        "ResNet-20 on digits reached 98.0% test accuracy after 10 epochs in 11.0 s at 1,320 samples/s "
        "on 3 stages; stage 1 is the bottleneck: it computes 96% of the time"
    )


def test_summary_sentence_of_a_stopped_run(run_dir: Path) -> None:
    (run_dir / "summary.json").unlink()
    edit(run_dir / "config.json", epochs=40)
    sentence = summary_sentence(RunFolder.read(run_dir), ())
    assert "had reached 98.0% test accuracy after 10 of 40 epochs" in sentence
    assert sentence.endswith("when its record ends.")


def test_summary_sentence_says_only_what_is_known(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    (tmp_path / "metrics.jsonl").write_text("", encoding="utf-8")
    run = RunFolder.read(tmp_path)
    assert summary_sentence(run, ()) == "The model was being trained when its record ends."
    (tmp_path / "summary.json").write_text('{"train_loss": 0.25}', encoding="utf-8")
    assert summary_sentence(RunFolder.read(tmp_path), ()) == "The model reached a training loss of 0.25."


def test_single_stage_has_no_bottleneck(tmp_path: Path) -> None:
    run = RunFolder.read(write_run(tmp_path, staleness=(0,), epochs=1, batches=12, scale=(1.0,)))
    assert findings(run, run.timeline.usage(run.timeline.window(8))) == ()
    assert len(simulate(staleness=(0,), epochs=1, batches=12, scale=(1.0,))) == 1
