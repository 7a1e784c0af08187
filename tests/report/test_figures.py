"""Figures are valid SVG, show what they are given, and are the same each time."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from stalewise.errors import ConfigError
from stalewise.report import figures
from stalewise.report.run_folder import BatchPoint, EpochPoint, RunFolder
from stalewise.report.timeline import Activity

_SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def run(finished_run: Path) -> RunFolder:
    return RunFolder.read(finished_run)


def all_figures(run: RunFolder) -> dict[str, str]:
    window = run.timeline.window(8)
    return {
        "loss": figures.loss_curve(run.batches, run.epochs),
        "accuracy": figures.accuracy_curve(run.epochs),
        "timeline": figures.timeline_picture(run.timeline, window, batch=127),
        "shares": figures.time_shares(run.timeline.usage(window)),
        "partition": figures.partition_bar(run.partition)[0],
    }


def texts(svg: str) -> list[str]:
    return ["".join(element.itertext()) for element in ElementTree.fromstring(svg).iter(f"{_SVG}text")]


def fills(svg: str) -> set[str]:
    return set(re.findall(r"fill: (#[0-9a-f]{6})", svg))


def test_figures_are_deterministic_and_self_contained(run: RunFolder) -> None:
    once, again = all_figures(run), all_figures(run)
    assert once == again
    used: set[str] = set()
    for name, svg in once.items():
        root = ElementTree.fromstring(svg)
        assert root.tag == f"{_SVG}svg"
        assert root.get("aria-label") == root.find(f"{_SVG}title").text
        names = {element.get("id") for element in root.iter()} - {None}
        assert names.isdisjoint(used), "two figures share identifiers"
        used |= names
        references = set(re.findall(r'(?:url\(|href=")#([^)"]+)', svg))
        assert references == names
        assert "<metadata" not in svg
        assert re.findall(r'(?:src|href)="(?!#)', svg) == []
        assert len(svg) < 80_000, name


def test_timeline_shows_kinds_batches_and_waits(run: RunFolder) -> None:
    svg = all_figures(run)["timeline"]
    shown = texts(svg)
    for label in ("stage 0", "stage 1", "stage 2", "forward", "recompute", "backward", "waiting", "ms"):
        assert label in shown
    # Batch 127: forward, recompute and backward on stages 0 and 1, forward and backward on the last.
    assert shown.count("127") == 8
    assert fills(svg) >= {
        figures.COLOURS[activity]
        for activity in (Activity.FORWARD, Activity.RECOMPUTE, Activity.BACKWARD, Activity.UPDATE)
    }
    assert "<pattern" in svg, "waiting is not hatched"


def test_followed_batch_lies_within_the_window(run: RunFolder) -> None:
    window = run.timeline.window(8)
    batch = figures.followed_batch(run.timeline, window)
    for spans in run.timeline.stages:
        mine = spans.where(spans.batch == batch)
        assert window.start_ns <= mine.start_ns.min()
        assert mine.end_ns.max() <= window.end_ns
    assert figures.followed_batch(run.timeline, run.timeline.window(2)) is None


def test_shares_show_the_percentages(run: RunFolder) -> None:
    usage = run.timeline.usage(run.timeline.window(8))
    shown = texts(figures.time_shares(usage))
    for stage in usage.stages:
        for activity in (Activity.FORWARD, Activity.BACKWARD):
            assert f"{100 * stage.shares[activity]:.0f}%" in shown


def test_partition_widths_follow_time_then_parameters_then_nothing(run: RunFolder) -> None:
    partition = run.partition
    svg, meaning = figures.partition_bar(partition)
    assert "measured" in meaning
    total = sum(layer.seconds for layer in partition.layers if layer.stage == 1)
    assert f"stage 1 · {1000 * total:.1f} ms" in texts(svg)
    assert figures.stage_colour(0) in fills(svg)

    untimed = replace(partition, layers=tuple(replace(layer, forward_s=None) for layer in partition.layers))
    svg, meaning = figures.partition_bar(untimed)
    assert "parameters" in meaning
    assert "stage 1" in texts(svg)
    bare = replace(untimed, layers=tuple(replace(layer, parameters=None) for layer in untimed.layers))
    assert "equal widths" in figures.partition_bar(bare)[1]


def test_names_are_drawn_as_they_are(run: RunFolder) -> None:
    name = "$x^2$ <b>&"
    layers = tuple(replace(layer, type=name) for layer in run.partition.layers)
    assert name in texts(figures.partition_bar(replace(run.partition, layers=layers))[0])


def batch(index: int, loss: float | None) -> BatchPoint:
    return BatchPoint(batch=index, epoch=1, loss=loss, lr=0.1, time_s=None)


def epoch(index: int, accuracy: float | None, last_batch: int | None = None) -> EpochPoint:
    return EpochPoint(
        epoch=index,
        train_loss=None,
        test_loss=None,
        test_accuracy=accuracy,
        samples_per_s=None,
        time_s=None,
        last_batch=last_batch,
    )


def test_long_runs_stay_small() -> None:
    noise = np.random.default_rng(0)
    points = [batch(index, float(value)) for index, value in enumerate(noise.normal(2, 0.1, 50_000))]
    assert len(figures.loss_curve(points, [])) < 60_000
    assert figures.smoothing(50_000) == 500


def test_losses_that_are_not_finite_are_left_out() -> None:
    plain = figures.loss_curve([batch(index, 1.0 + index) for index in range(8)], [])
    wild = [batch(index, 1.0 + index) for index in range(8)] + [batch(8, math.nan), batch(9, math.inf)]
    assert figures.loss_curve([*wild, batch(10, None)], []) == plain
    assert "<svg" in figures.loss_curve([batch(0, math.nan)], [])


@pytest.mark.parametrize("accuracies", [[0.5], [0.1, 0.1], [0.9, 1.0], [1.0, 0.2], [0.0, 0.0]])
def test_accuracy_axis_stays_within_a_hundred_percent(accuracies: list[float]) -> None:
    points = [epoch(index, accuracy) for index, accuracy in enumerate(accuracies, 1)]
    shown = texts(figures.accuracy_curve(points))
    assert f"{100 * accuracies[-1]:.1f}%" in shown
    ticks = [float(text[:-1]) for text in shown if text.endswith("%")]
    assert min(ticks) >= 0
    assert max(ticks) <= 100


def test_accuracy_needs_a_value() -> None:
    with pytest.raises(ConfigError, match="none of 1 epochs has a test accuracy"):
        figures.accuracy_curve([epoch(1, None)])


def test_moving_mean_is_the_mean_of_what_is_there() -> None:
    assert figures._moving_mean(np.array([1.0, 2.0, 6.0]), 3) == pytest.approx([1.5, 3.0, 4.0])
    assert figures._moving_mean(np.array([4.0]), 5) == pytest.approx([4.0])
