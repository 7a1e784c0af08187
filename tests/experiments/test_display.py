"""What a person sees of a run, and how rates follow from counters."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from stalewise.experiments.config import TrainConfig
from stalewise.experiments.display import LiveDisplay, StageRates, make_display, stage_table

SECOND = 1_000_000_000


def status(stage: int, time_s: float, busy_s: float, wait_s: float, **more: Any) -> dict[str, Any]:
    return {
        "stage": stage,
        "batch": 7,
        "updates": 3,
        "time_ns": round(time_s * SECOND),
        "busy_ns": round(busy_s * SECOND),
        "wait_ns": round(wait_s * SECOND),
        **more,
    }


def test_rates_are_shares_of_the_time_between_two_statuses() -> None:
    rates = StageRates()
    assert rates.update([status(0, 10.0, 4.0, 1.0)]) == []
    (rate,) = rates.update([status(0, 12.0, 5.0, 1.5)])
    assert rate.utilisation == pytest.approx(0.5)
    assert rate.waiting == pytest.approx(0.25)


def test_a_status_seen_twice_keeps_its_rate() -> None:
    rates = StageRates()
    rates.update([status(0, 10.0, 4.0, 1.0)])
    (first,) = rates.update([status(0, 12.0, 5.0, 1.5)])
    (again,) = rates.update([status(0, 12.0, 5.0, 1.5)])
    assert again.utilisation == first.utilisation


def test_the_stage_table_shows_queues() -> None:
    rates = StageRates()
    for time_s in (1.0, 2.0):
        shown = rates.update([status(1, time_s, time_s / 2, 0.0, activations_waiting=2, gradients_waiting=1)])
    console = Console(file=io.StringIO(), width=100)
    console.print(stage_table(shown))
    assert isinstance(console.file, io.StringIO)
    assert console.file.getvalue().splitlines()[1].split() == ["1", "7", "50%", "0%", "2", "1"]


def test_output_that_is_no_terminal_is_plain_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with make_display("auto", tmp_path) as display:
        assert not isinstance(display, LiveDisplay)
        display.begin(TrainConfig(epochs=2), 23, 1437)
        display.show({"event": "batch", "loss": 1.0, "lr": 0.1, "batch": 0, "epoch": 1}, [])
        display.show(
            {
                "event": "epoch",
                "epoch": 1,
                "train_loss": 0.5,
                "test_accuracy": 0.9812,
                "samples_per_s": 450.0,
                "time_s": 3.2,
            },
            [],
        )
    lines = capsys.readouterr().out.splitlines()
    assert "staleness (4,2,0)" in lines[0]
    assert lines[1:] == ["epoch 1/2  loss 0.5000  test accuracy 98.12%  450 samples/s  3.2 s"]


def test_quiet_shows_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with make_display("quiet", tmp_path) as display:
        display.begin(TrainConfig(epochs=2), 23, 1437)
        display.show({"event": "batch", "loss": 1.0, "lr": 0.1, "batch": 0, "epoch": 1}, [])
        display.end({})
        display.finished(tmp_path, {})
    assert capsys.readouterr().out == ""
