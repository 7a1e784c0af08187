"""The command line, as a person uses it and misuses it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from stalewise.models import build_model

TINY = [
    *("--model", "resnet8", "--data", "digits", "--train-limit", "96", "--test-limit", "40", "--batch-size", "16"),
    *("--epochs", "2", "--threads", "1", "--partition", "2,3", "--display", "plain"),
]


def stalewise(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run the command in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "stalewise", *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        timeout=400,
        env={**os.environ, "COLUMNS": "120", "NO_COLOR": "1"},
    )


def losses(folder: Path) -> list[float]:
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [record["loss"] for record in records if record["event"] == "batch"]


@pytest.fixture(scope="module")
def sequential_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny run in one process."""
    folder = tmp_path_factory.mktemp("runs") / "sequential"
    done = stalewise("train", *TINY, "--engine", "sequential", "--out", str(folder))
    assert done.returncode == 0, done.stderr
    assert "epoch 2/2" in done.stdout
    return folder


def test_a_run_leaves_its_folder(sequential_run: Path) -> None:
    names = {path.relative_to(sequential_run).as_posix() for path in sequential_run.rglob("*") if path.is_file()}
    assert names == {
        "config.json",
        "environment.json",
        "metrics.jsonl",
        "model.safetensors",
        "partition.json",
        "report.html",
        "summary.json",
        "timeline/stage0.npz",
        "timeline/stage1.npz",
        "timeline/stage2.npz",
        "trace.json",
    }
    assert len(losses(sequential_run)) == 2 * 96 // 16
    environment = json.loads((sequential_run / "environment.json").read_text())
    assert "--engine sequential" in environment["command"]
    assert "digits" in (sequential_run / "report.html").read_text()
    assert json.loads((sequential_run / "trace.json").read_text())["traceEvents"]


def test_the_model_loads_into_the_unsplit_one(sequential_run: Path) -> None:
    model = build_model("resnet8", num_classes=10)
    state = load_file(sequential_run / "model.safetensors")
    assert list(model.state_dict()) == sorted(state, key=list(model.state_dict()).index)
    model.load_state_dict(state)


def test_evaluate_finds_the_accuracy_of_the_run(sequential_run: Path) -> None:
    done = stalewise("evaluate", str(sequential_run), "--json")
    assert done.returncode == 0, done.stderr
    summary = json.loads((sequential_run / "summary.json").read_text())
    assert json.loads(done.stdout)["test_accuracy"] == pytest.approx(summary["test_accuracy"], abs=1e-6)


@pytest.mark.dist
def test_processes_give_the_numbers_of_one_process(sequential_run: Path, tmp_path: Path) -> None:
    """Under slow steps, too."""
    folder = tmp_path / "distributed"
    done = stalewise(
        "train", *TINY, "--out", str(folder), "--json", "--straggler", "probability=1/3,factor=2,stages=0,2"
    )
    assert done.returncode == 0, done.stderr
    events = [json.loads(line)["event"] for line in done.stdout.splitlines()]
    assert events[0] == "begin"
    assert events[-2:] == ["end", "finished"]
    (straggler,) = json.loads((folder / "config.json").read_text())["stragglers"]
    assert (straggler["stages"], straggler["factor"]) == ([0, 2], 2)
    assert losses(folder) == losses(sequential_run)
    ours, theirs = (load_file(path / "model.safetensors") for path in (folder, sequential_run))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.dist
@pytest.mark.slow
def test_an_elastic_run_is_replayed_from_its_folder(tmp_path: Path) -> None:
    """On processes with slow steps, then in one process without any: the same losses and weights."""
    folder, again = tmp_path / "elastic", tmp_path / "again"
    slow = ("--straggler", "probability=0.2,pause=0.01,duration=2")
    done = stalewise("train", *TINY, "--staleness", "6,3,0", "--option", "elastic=true", *slow, "--out", str(folder))
    assert done.returncode == 0, done.stderr
    orders = [(folder / "order" / f"stage{stage}.txt").read_text().split() for stage in range(3)]
    assert [[cycle.count("F") for cycle in cycles] for cycles in orders] == [[6, 6]] * 3
    summary = json.loads((folder / "summary.json").read_text())
    assert [sum(counts) for counts in summary["staleness_counts"]] == [12, 12, 12]
    assert summary["staleness_counts"][2] == [12]
    assert "Elastic staleness" in (folder / "report.html").read_text()

    done = stalewise("train", "--replay", str(folder), "--engine", "sequential", "--out", str(again))
    assert done.returncode == 0, done.stderr
    assert losses(again) == losses(folder)
    ours, theirs = (load_file(path / "model.safetensors") for path in (again, folder))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert [(again / "order" / f"stage{stage}.txt").read_text().split() for stage in range(3)] == orders

    (folder / "order" / "stage0.txt").write_text("FFFFFFFFF\n")
    broken = stalewise("train", "--replay", str(folder), "--engine", "sequential", "--out", str(tmp_path / "no"))
    assert broken.returncode == 2
    assert "different numbers of lines" in broken.stderr


def test_the_plan_chooses_the_staleness_of_a_run(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    tiny = ["profile" if word == "2,3" else word for word in TINY]
    done = stalewise(
        *("train", *tiny, "--staleness", "auto", "--option", "elastic=true", "--engine", "sequential"),
        *("--out", str(folder)),
    )
    assert done.returncode == 0, done.stderr
    chosen = json.loads((folder / "partition.json").read_text())
    depths = chosen["staleness"]["staleness"]
    assert len(depths) == 3
    assert depths[-1] == 0
    assert chosen["why"] in done.stdout
    assert chosen["why"].startswith(f"staleness ({','.join(map(str, depths))}) chosen")
    assert "The plan chose the staleness" in (folder / "report.html").read_text()
    assert json.loads((folder / "config.json").read_text())["staleness"] == depths
    # What is known of the run from now on is enough to repeat it.
    again = stalewise("train", "--replay", str(folder), "--engine", "sequential", "--out", str(tmp_path / "again"))
    assert again.returncode == 0, again.stderr
    assert losses(tmp_path / "again") == losses(folder)
    refused = stalewise("train", *TINY, "--staleness", "auto", "--out", str(tmp_path / "cuts"))
    assert refused.returncode != 0
    assert "needs a profile" in refused.stderr


def test_a_run_of_fixed_staleness_is_not_replayed(sequential_run: Path, tmp_path: Path) -> None:
    done = stalewise("train", "--replay", str(sequential_run), "--out", str(tmp_path / "run"))
    assert done.returncode == 2
    assert "fixed staleness" in done.stderr


@pytest.mark.dist
def test_a_wrong_model_ends_in_one_sentence(tmp_path: Path) -> None:
    done = stalewise("train", *TINY, "--model", "resnet21", "--out", str(tmp_path / "run"))
    assert done.returncode == 2
    assert "The nearest depth is 20 or 26" in done.stderr
    assert "Traceback" not in done.stderr


def test_refuses_a_folder_that_holds_something(sequential_run: Path, tmp_path: Path) -> None:
    before = (sequential_run / "summary.json").read_bytes()
    done = stalewise("train", *TINY, "--out", str(sequential_run))
    assert done.returncode == 2
    assert "--overwrite" in done.stderr
    assert (sequential_run / "summary.json").read_bytes() == before

    (tmp_path / "precious.txt").write_text("do not delete")
    done = stalewise("train", *TINY, "--out", str(tmp_path), "--overwrite")
    assert done.returncode == 2
    assert (tmp_path / "precious.txt").read_text() == "do not delete"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["train", "--staleness", "2,4,0"], "Did you mean (4, 2, 0)?"),
        (["train", "--staleness", "4,2"], "--stages 2"),
        (["train", "--staleness", "4,x,0"], "'x'"),
        (["train", "--method", "dps"], "Did you mean 'dsp'?"),
        (["train", "--method", "bp", "--staleness", "4,2,0"], "Leave staleness out"),
        (["train", "--epochs", "0"], "epochs is 0"),
        (["train", "--lr", "nan"], "lr is nan"),
        (["train", "--lr-schedule", "linear"], "onecycle"),
        (["train", "--partition", "4;8"], "--partition"),
        (["train", "--straggler", "stages=3,factor=2"], "counted from 0"),
        (["evaluate", "nowhere"], "config.json"),
        (["report", "nowhere"], "nowhere is not a folder"),
        (["program", "--stages", "0"], "at least 1"),
    ],
)
def test_wrong_input_is_one_clear_sentence(arguments: list[str], says: str, tmp_path: Path) -> None:
    done = stalewise(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    assert not any(tmp_path.iterdir())


def test_program_prints_the_grid() -> None:
    done = stalewise("program", "--staleness", "2,1,0", "--batches", "3")
    assert done.returncode == 0, done.stderr
    assert done.stdout == (
        "DSP(queue=(1, 1, 0), staleness=(2, 1, 0)), slack (1, 1, 0)\n"
        "link 0 -> 1: overlapped, no slack\n"
        "link 1 -> 2: overlapped, no slack\n"
        "\n"
        "step    | 0       | 1          | 2          | 3       | 4\n"
        "stage 0 | F0      | F1         | F2 R0 B0 U | R1 B1 U | R2 B2 U\n"
        "stage 1 | F0      | F1 R0 B0 U | F2 R1 B1 U | R2 B2 U | -\n"
        "stage 2 | F0 B0 U | F1 B1 U    | F2 B2 U    | -       | -\n"
    )


def test_doctor_flags_what_would_hurt() -> None:
    many = (os.cpu_count() or 1) + 1
    done = stalewise("doctor", "--stages", str(many), "--json")
    assert done.returncode == 0, done.stderr
    findings = {finding["subject"]: finding for finding in json.loads(done.stdout)}
    assert findings["torch"]["level"] == "ok"
    assert findings["cores"]["level"] == "note"
    assert f"{many} stages share" in findings["cores"]["text"]


@pytest.mark.parametrize("command", ["train", "evaluate", "program", "doctor"])
def test_help_names_every_option(command: str) -> None:
    done = stalewise(command, "--help")
    assert done.returncode == 0
    assert "--help" in done.stdout


def test_version() -> None:
    import stalewise as package

    assert stalewise("--version").stdout.strip() == package.__version__
