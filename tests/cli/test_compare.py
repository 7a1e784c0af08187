"""`stalewise compare`, as a person uses it and misuses it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from comparison_folders import no_training
from safetensors.torch import load_file

from stalewise.cli.main import run

__all__ = ["no_training"]

TINY = [
    *("--model", "resnet8", "--data", "digits", "--train-limit", "96", "--test-limit", "40", "--batch-size", "16"),
    *("--epochs", "1", "--threads", "1", "--partition", "2,3"),
]


def stalewise(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "stalewise", *arguments],
        capture_output=True,
        text=True,
        timeout=400,
        env={**os.environ, "COLUMNS": "120", "NO_COLOR": "1"},
    )


def losses(folder: Path) -> list[float]:
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [record["loss"] for record in records if record["event"] == "batch"]


@pytest.mark.slow
@pytest.mark.dist
def test_a_comparison_from_end_to_end(tmp_path: Path) -> None:
    """Two methods are trained; given again, the command finds them complete and prints the same table."""
    command = ["compare", *TINY, "--methods", "bp,dsp", "--baselines", "none", "--engine", "sequential"]
    first = stalewise(*command, "--out", str(tmp_path / "out"))
    assert first.returncode == 0, first.stderr
    lines = first.stdout.splitlines()
    assert lines[1] == "cuts 2, 3, as given"
    assert [line.split()[:2] for line in lines[2:4]] == [["1/2", "bp"], ["2/2", "dsp"]]
    made = {path.name for path in (tmp_path / "out").iterdir()}
    assert made == {
        *("comparison.json", "partition.json", "report.html", "results.csv", "results.json", "results.md", "runs")
    }
    for method in ("bp", "dsp"):
        folder = tmp_path / "out" / "runs" / f"{method}-seed0"
        assert {"config.json", "model.safetensors", "report.html", "summary.json"} <= {
            path.name for path in folder.iterdir()
        }
    rows = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    bp, dsp = rows
    assert bp["speed_up"]["mean"] == 1.0
    assert [stage["staleness_max"] for stage in dsp["stages"]] == [4, 2, 0]
    for row in rows:
        assert row["test_accuracy"]["mean"] == row["best_accuracy"]["mean"]
        for stage in row["stages"]:
            memory = stage["memory"]
            assert memory["measured"]["total"]["mean"] == pytest.approx(memory["predicted"]["total"], rel=1e-3)

    again = stalewise(*command, "--out", str(tmp_path / "out"), "--json")
    assert again.returncode == 0, again.stderr
    records = [json.loads(line) for line in again.stdout.splitlines()]
    assert [record["found"] for record in records if record["event"] == "run"] == [True, True]
    assert records[-1]["rows"] == rows


@pytest.mark.slow
@pytest.mark.dist
def test_baselines_are_trained_too(tmp_path: Path) -> None:
    """A model in one process, and on three processes with a third of each batch; both can be evaluated as runs."""
    done = stalewise("compare", *TINY, "--methods", "bp", "--out", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    rows = {row["name"]: row for row in json.loads((tmp_path / "out" / "results.json").read_text())["rows"]}
    assert {row["runs"][0]["state"] for row in rows.values()} == {"done"}
    assert rows["data-parallel"]["samples_per_s"]["mean"] > 0
    assert "BatchNorm" in done.stdout
    runs = tmp_path / "out" / "runs"
    models = [
        load_file(runs / f"{name}-seed0" / "model.safetensors") for name in ("bp", "one-process", "data-parallel")
    ]
    assert models[0].keys() == models[1].keys() == models[2].keys()
    split, whole = (losses(runs / f"{name}-seed0") for name in ("bp", "one-process"))
    assert split == pytest.approx(whole, rel=0.01), "cut or not, backpropagation is the same but for rounding"
    assert "Data parallel" in (runs / "data-parallel-seed0" / "report.html").read_text()
    evaluated = stalewise("evaluate", str(runs / "data-parallel-seed0"), "--json")
    assert json.loads(evaluated.stdout)["test_accuracy"] == pytest.approx(
        rows["data-parallel"]["test_accuracy"]["mean"]
    )


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--methods", "bp,dps"], "Did you mean 'dsp'?"),
        (["--methods", "dsp,dsp"], "compared twice"),
        (["--methods", "bp", "--option", "micro_batches=8"], "row:key=value"),
        (["--methods", "bp", "--option", "gpipe:micro_batches=8"], "not compared"),
        (["--methods", "gpipe", "--option", "gpipe:micro_batches=0"], "micro_batches"),
        (["--methods", "bp", "--baselines", "two"], "no baseline 'two'"),
        (["--target-accuracy", "92"], "Did you mean 92%?"),
        (["--target-accuracy", "high"], "a fraction such as 0.92"),
        (["--seeds", "0"], "at least 1"),
        (["--epochs", "0"], "epochs is 0"),
        (["--straggler", "factor=2,speed=1"], "the entry 'speed'"),
    ],
)
def test_wrong_input_is_one_clear_sentence(
    arguments: list[str],
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["stalewise", "compare", *arguments])
    with pytest.raises(SystemExit) as ended:
        run()
    assert ended.value.code == 2
    assert says in " ".join(capsys.readouterr().err.split())
    assert not any(tmp_path.iterdir())


@pytest.mark.dist
def test_a_wrong_model_ends_before_the_first_run(tmp_path: Path) -> None:
    done = stalewise("compare", *TINY, "--methods", "bp", "--model", "resnet21", "--out", str(tmp_path / "out"))
    assert done.returncode == 2
    assert "The nearest depth is 20 or 26" in done.stderr
    assert not (tmp_path / "out" / "runs").exists()


def test_help_explains_the_options() -> None:
    done = stalewise("compare", "--help")
    assert done.returncode == 0
    for option in ("--methods", "--baselines", "--target-accuracy", "--overwrite", "--seeds"):
        assert option in done.stdout


def test_a_failed_row_shows_in_the_exit_code(
    no_training: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["stalewise", "compare", "--methods", "bp,dni", "--baselines", "none", "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as ended:
        run()
    assert ended.value.code == 1
    assert no_training == ["bp-seed0", "dni-seed0"]
    assert "dni: failed: ValueError: <no> batch | left" in capsys.readouterr().out
