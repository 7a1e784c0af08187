"""An experiment from its declaration to its files, for real but tiny; and what is made of its rows."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from stalewise.data import load_data
from stalewise.errors import ConfigError
from stalewise.experiments.comparison_display import ComparisonDisplay
from stalewise.experiments.experiment import GeneratedImages
from stalewise.experiments.generated_images import generate_images
from stalewise.experiments.paper import experiment
from stalewise.experiments.reproduce import reproduce, results_files
from stalewise.report.experiment import Plot, cell, markdown_table
from stalewise.report.experiment_plots import draw_plot

STEM = "gradient-difference-smoke"


class Counted(ComparisonDisplay):
    """What a user is told of the runs beside each other."""

    def __init__(self) -> None:
        self.told: list[tuple[int, int]] = []

    def progress(self, done: int, total: int) -> None:
        self.told.append((done, total))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("reproduce") / "runs"
    plan: dict[str, Any] = {"seeds": 2, "jobs": 2, "overrides": {"threads": 1}}
    display = Counted()
    assert reproduce(experiment("gradient-difference"), "smoke", path, **plan, display=display) == 0
    assert display.told == [(done, 4) for done in range(5)]
    return path


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
@pytest.mark.dist
def test_the_files_of_an_experiment(folder: Path) -> None:
    names = {file.name for file in folder.iterdir()}
    assert names == {
        "resnet8",
        *(f"{STEM}{end}" for end in (".csv", "-curves.csv", "-gradients.csv", ".json", "-gradients.svg")),
        "report.html",
        "report.md",
    }
    found = rows(folder / f"{STEM}.csv")
    gradients = rows(folder / f"{STEM}-gradients.csv")
    table = json.loads((folder / "resnet8" / "results.json").read_text())["rows"]
    for row, truth in zip(found, table, strict=True):
        assert (row["part"], row["method"], row["seeds"], row["failed"]) == ("resnet8", truth["name"], "2", "")
        assert float(row["accuracy_mean"]) == pytest.approx(truth["test_accuracy"]["mean"], rel=1e-5)
        assert float(row["accuracy_std"]) == pytest.approx(truth["test_accuracy"]["std"], rel=1e-5, abs=1e-9)
        own = [line for line in gradients if line["method"] == row["method"]]
        for column, lines, stages in (
            ("gradient", own, "012"),
            ("gradient_1", own, "1"),
            ("gradient_highest", [line for line in own if line["lr"] == "0.05"], "012"),
            ("gradient_lowest", [line for line in own if line["lr"] == "0.0005"], "012"),
        ):
            values = [float(line[f"stage{stage}"]) for line in lines for stage in stages]
            assert float(row[f"{column}_mean"]) == pytest.approx(sum(values) / len(values), rel=1e-4)
    assert len(rows(folder / f"{STEM}-curves.csv")) == 2 * 2 * 2, "methods, seeds, epochs"
    assert len(gradients) == 2 * 2 * 8, "methods, seeds, batches"
    assert {int(row["batch"]) for row in gradients} == set(range(8))
    rates = {int(row["batch"]): float(row["lr"]) for row in gradients}
    assert [rates[batch] for batch in range(8)] == [0.05] * 4 + [0.005] * 2 + [0.0005] * 2
    assert not any(row["rate_mean"] for row in found), "one process in turn: no pipeline's speed"
    assert not any(row["time_s"] for row in rows(folder / f"{STEM}-curves.csv"))
    about = json.loads((folder / f"{STEM}.json").read_text())
    assert (about["scale"], about["seeds"]) == ("smoke", 2)
    assert about["machine"]["cores"]
    assert about["parts"]["resnet8"]["data"] == "digits"
    assert about["command"] == "stalewise reproduce gradient-difference --scale smoke --seeds 2 --threads 1"
    environments = [json.loads(path.read_text()) for path in (folder / "resnet8" / "runs").glob("*/environment.json")]
    assert set(about["commits"]) == {environment["commit"] for environment in environments} - {None}
    assert str(folder) not in (folder / f"{STEM}.json").read_text()


@pytest.mark.slow
@pytest.mark.dist
def test_the_reports_say_what_the_files_say(folder: Path) -> None:
    page, text = ((folder / name).read_text(encoding="utf-8") for name in ("report.html", "report.md"))
    for row in rows(folder / f"{STEM}.csv"):
        for column in ("gradient", "gradient_0", "gradient_lowest", "accuracy"):
            assert cell(row, column) in page
            assert cell(row, column) in text
    assert "The numbers say nothing about the methods." in page
    assert "<svg" in page
    assert f"({STEM}-gradients.svg)" in text


@pytest.mark.slow
@pytest.mark.dist
def test_an_interrupted_experiment_goes_on(folder: Path) -> None:
    summaries = sorted((folder / "resnet8" / "runs").glob("*/summary.json"))
    assert len(summaries) == 4
    before = {file: file.stat().st_mtime_ns for file in summaries}
    results = (folder / f"{STEM}.csv").read_text()
    curves = [(row["loss"], row["accuracy"]) for row in rows(folder / f"{STEM}-curves.csv")]
    shutil.rmtree(summaries[0].parent)
    # The store would give the run back.
    shutil.rmtree(folder.parent / "shared-runs")
    assert reproduce(experiment("gradient-difference"), "smoke", folder, seeds=2) == 0
    after = {file: file.stat().st_mtime_ns for file in summaries}
    assert [file for file in summaries if after[file] != before[file]] == [summaries[0]]
    assert curves == [(row["loss"], row["accuracy"]) for row in rows(folder / f"{STEM}-curves.csv")]
    assert results.splitlines()[0] == (folder / f"{STEM}.csv").read_text().splitlines()[0]


@pytest.mark.slow
@pytest.mark.dist
def test_results_are_copied_without_the_runs(folder: Path, tmp_path: Path) -> None:
    copies = results_files(folder, tmp_path / "results")
    assert {file.name for file in copies} == {
        f"{STEM}{end}" for end in (".csv", "-curves.csv", "-gradients.csv", ".json", "-gradients.svg")
    }
    assert sum(file.stat().st_size for file in copies) < 100_000
    with pytest.raises(ConfigError, match="no results"):
        results_files(tmp_path, tmp_path / "none")


@pytest.mark.slow
@pytest.mark.dist
def test_another_experiment_in_the_folder_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match="another comparison"):
        reproduce(experiment("gradient-difference"), "smoke", folder, seeds=1)


def test_generated_images_are_of_imagenets_layout_and_tell_their_class(tmp_path: Path) -> None:
    generate_images(tmp_path / "a", GeneratedImages(classes=3, per_class=8, size=48))
    generate_images(tmp_path / "b", GeneratedImages(classes=3, per_class=8, size=48))
    split = load_data("imagenet-32", data_dir=tmp_path / "a")
    assert (len(split.train), len(split.test), split.num_classes) == (24, 6, 3)
    for file in (tmp_path / "a").rglob("*.JPEG"):
        assert file.read_bytes() == (tmp_path / "b" / file.relative_to(tmp_path / "a")).read_bytes()
        with Image.open(file) as image:
            assert image.size == (48, 48)
    images = split.train.take(torch.arange(24), seed=0, epoch=0, augmented=False).double().numpy()
    spectra = np.abs(np.fft.fft2(images.mean(1) - images.mean((1, 2, 3))[:, None, None])).reshape(24, -1)
    spectra /= np.linalg.norm(spectra, axis=1, keepdims=True)
    likeness = spectra @ spectra.T
    np.fill_diagonal(likeness, 0)
    labels = split.train.labels.numpy()
    assert (labels[likeness.argmax(1)] == labels).all()


def test_cells_are_means_with_their_deviation_in_the_units_of_people() -> None:
    row = {
        "accuracy_mean": "0.63803",
        "accuracy_std": "0.0041",
        "memory_mean": "1048576",
        "memory_std": "",
        "rate_mean": "",
    }
    assert cell(row, "accuracy") == "63.80 ± 0.41%"
    assert cell(row, "memory") == "1.0"
    assert cell(row, "rate") == "-"
    table = markdown_table(("rate", "accuracy"), [{"part": "p", "title": "DSP", "seeds": "3", **row}])
    assert table.splitlines()[0] == "| Part | Method | Test accuracy | Seeds |"
    assert table.splitlines()[2] == "| p | DSP | 63.80 ± 0.41% | 3 |"


def test_plots_draw_every_method_and_nothing_of_nothing() -> None:
    bars = [
        {"part": part, "method": method, "rate_mean": "10", "rate_std": "1"}
        for part in "ab"
        for method in ("bp", "dsp")
    ]
    curve = {"part": "a", "method": "bp", "seed": "0", "epoch": "1", "time_s": "3", "loss": "2", "accuracy": "0.5"}
    untimed = {**curve, "part": "b", "time_s": ""}
    gradient = {"part": "a", "method": "fr", "seed": "0", "epoch": "1", "batch": "4", "lr": "0.1", "stage0": "0.5"}
    later = {**gradient, "batch": "6", "lr": "0.01"}
    for plot, texts in (
        (Plot("bars", "rate"), ("bp", "dsp", ">a<", ">b<")),
        (Plot("curves"), ("a: training loss", "b: test accuracy", "seconds")),
        (Plot("gradients"), ("a: fr", "stage 0", "learning rate drops")),
    ):
        svg = draw_plot(plot, "Title", bars, [curve, untimed], [gradient, later])
        assert all(text in svg for text in texts), plot
        assert draw_plot(plot, "Title", [], [], []) == ""
    assert "seconds" not in draw_plot(Plot("curves"), "Title", [], [untimed], [])
    slow = {"part": "a", "method": "bp", "slow_down_mean": "0.5", "slow_down_std": "", "floor_mean": "0.333"}
    assert "floor" in draw_plot(Plot("bars", "slow_down"), "Title", [slow], [], [])
    assert "drops" not in draw_plot(Plot("gradients"), "Title", [], [], [gradient])
