"""`stalewise train --checkpoint-every N --resume DIR`, and `stalewise checkpoint`, as users run them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

import stalewise
from stalewise.cli.main import app
from stalewise.cli.resumed import resumed_config
from stalewise.errors import CheckpointError, ConfigError
from stalewise.experiments.config import TrainConfig
from stalewise.experiments.run_lock import locked_folder
from stalewise.experiments.run_writer import write_json

OPTIONS = [
    *("--model", "resnet8", "--data", "digits", "--train-limit", "96", "--test-limit", "32", "--batch-size", "16"),
    *("--epochs", "3", "--evaluate-every", "2", "--engine", "sequential", "--threads", "1", "--partition", "1,3"),
    *("--gradient-difference-every", "4", "--display", "quiet", "--loader-workers", "0"),
]
TIMES = {"time_s", "epoch_s", "samples_per_s"}


def train(*options: str) -> None:
    done = CliRunner().invoke(app, ["train", *options], catch_exceptions=False)
    assert done.exit_code == 0


def metrics(folder: Path) -> list[dict[str, Any]]:
    """All records without the times, and without what is made of times alone."""
    records = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [
        {name: value for name, value in record.items() if name not in TIMES}
        for record in records
        if record["event"] != "bottleneck"
    ]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with checkpoints, all of which were kept."""
    folder = tmp_path_factory.mktemp("runs") / "undisturbed"
    train(*OPTIONS, "--checkpoint-every", "3", "--keep", "100", "--out", str(folder))
    return folder


def interrupted(undisturbed: Path, folder: Path, number: int) -> Path:
    """The run as a kill after its n-th checkpoint would have left it, with metrics that were written after it."""
    shutil.copytree(undisturbed, folder)
    for path in sorted((folder / "checkpoints").glob("ckpt-*"))[number + 1 :]:
        shutil.rmtree(path)
    for name in ("summary.json", "model.safetensors", "report.html", "trace.json"):
        (folder / name).unlink()
    return folder


@pytest.mark.parametrize("number", [0, 1, 2, 3, 5])
def test_a_resumed_run_is_the_undisturbed_one(number: int, undisturbed: Path, tmp_path: Path) -> None:
    folder = interrupted(undisturbed, tmp_path / "run", number)
    train("--resume", str(folder))
    assert metrics(folder) == metrics(undisturbed)
    theirs = load_file(undisturbed / "model.safetensors")
    ours = load_file(folder / "model.safetensors")
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())
    assert (folder / "report.html").is_file()
    (told,) = (folder / "resumed.jsonl").read_text().splitlines()
    assert "resumed at batch" in json.loads(told)["did"]


def test_another_pipeline(undisturbed: Path, tmp_path: Path) -> None:
    folder = interrupted(undisturbed, tmp_path / "run", 1)
    train("--resume", str(folder), "--stages", "2", "--method", "bp", "--partition", "2")
    batches = [record["batch"] for record in metrics(folder) if record["event"] == "batch"]
    assert batches == list(range(18))
    assert "moved by name to BP(stages=2" in (folder / "resumed.jsonl").read_text()
    assert json.loads((folder / "config.json").read_text())["method"] == "bp"
    assert json.loads((folder / "partition.json").read_text())["cuts"] == [2]


def test_other_bounds_for_the_stages_that_the_run_has(undisturbed: Path, tmp_path: Path) -> None:
    """Not for those that a new run would have."""
    first, second = tmp_path / "first", tmp_path / "second"
    bounds = ("--staleness", "2,0", "--partition", "2")
    train("--resume", str(interrupted(undisturbed, first, 1)), "--stages", "2", *bounds, "--checkpoint-every", "4")
    train("--resume", str(interrupted(first, second, 3)), "--staleness", "3,0")
    config = json.loads((second / "config.json").read_text())
    assert (config["stages"], config["staleness"], config["partition"]) == (2, [3, 0], [2])


def test_a_run_that_became_another_one_is_not_replayed(tmp_path: Path) -> None:
    """The record begins where it became so. One that went on as it was is replayed bitwise."""
    begun, same, other = tmp_path / "begun", tmp_path / "same", tmp_path / "other"
    options = [option for option in OPTIONS if option not in ("--gradient-difference-every", "4")]
    train(*options, "--option", "elastic=true", "--checkpoint-every", "3", "--keep", "100", "--out", str(begun))
    train("--resume", str(interrupted(begun, same, 1)))
    train("--replay", str(same), "--engine", "sequential", "--display", "quiet", "--out", str(tmp_path / "replayed"))
    repeated, theirs = (load_file(folder / "model.safetensors") for folder in (tmp_path / "replayed", same))
    assert all(torch.equal(repeated[name], value) for name, value in theirs.items())
    train("--resume", str(interrupted(begun, other, 1)), "--staleness", "5,2,0")
    with pytest.raises(stalewise.ConfigError, match="went on from a checkpoint otherwise than it was begun"):
        train("--replay", str(other), "--engine", "sequential", "--out", str(tmp_path / "never"))


def test_a_run_without_a_checkpoint_begins_anew(undisturbed: Path, tmp_path: Path) -> None:
    folder = interrupted(undisturbed, tmp_path / "run", -1)
    train("--resume", str(folder))
    assert metrics(folder) == metrics(undisturbed)
    assert "begins anew" in (folder / "resumed.jsonl").read_text()


def test_the_checkpoint_that_is_offered_instead_of_a_damaged_one(
    undisturbed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = interrupted(undisturbed, tmp_path / "run", 4)
    newest, previous = sorted((folder / "checkpoints").glob("ckpt-*"), reverse=True)[:2]
    data = bytearray((newest / "stage1.safetensors").read_bytes())
    data[-1] ^= 1
    (newest / "stage1.safetensors").write_bytes(data)
    before = (folder / "config.json").read_text()
    with pytest.raises(CheckpointError, match=f"damaged: its checksum is wrong. .* resume from {previous}"):
        train("--resume", str(folder), "--method", "bp", "--threads", "2")
    assert (folder / "config.json").read_text() == before
    train("--resume", str(previous))
    assert metrics(folder) == metrics(undisturbed)
    assert [path.name.partition("-ckpt")[2] for path in (folder / "checkpoints").glob("aside-*")] == [newest.name[4:]]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_what_is_refused_changes_nothing(undisturbed: Path, tmp_path: Path) -> None:
    """Neither the names of later checkpoints nor the configuration, wherever it is found out."""
    folder = interrupted(undisturbed, tmp_path / "run", 4)
    before = contents(folder)
    first = sorted((folder / "checkpoints").glob("ckpt-*"))[0]
    for options, error in (
        ((str(first), "--lr", "0.5"), "--lr cannot be given with --resume"),
        ((str(folder), "--stages", "20"), "20 stages"),
        ((str(first), "--partition", "3,1"), "partition"),
    ):
        with pytest.raises(ConfigError, match=error):
            CliRunner().invoke(app, ["train", "--resume", *options], catch_exceptions=False)
    with locked_folder(folder), pytest.raises(ConfigError, match="in use"):
        CliRunner().invoke(app, ["train", "--resume", str(first)], catch_exceptions=False)
    assert contents(folder) == before


def test_what_the_run_had_makes_room_for_what_is_given(undisturbed: Path, tmp_path: Path) -> None:
    config = TrainConfig.read(undisturbed / "config.json")
    config = replace(config, queue=(1, 1, 0), staleness=(4, 2, 0), options={"activations": ["stored"] * 3})
    write_json(tmp_path / "config.json", config.as_dict())
    deeper = resumed_config(tmp_path, {"staleness": (6, 3, 0)})
    assert (deeper.staleness, deeper.queue, deeper.partition) == ((6, 3, 0), None, (1, 3))
    chosen = resumed_config(tmp_path, {"staleness": "auto"})
    assert (chosen.queue, chosen.partition) == (None, "profile")
    assert resumed_config(tmp_path, {"stages": 2}).options == {}


def test_slow_steps_of_a_replay_are_on_the_stages_of_the_run(tmp_path: Path) -> None:
    options = [option for option in OPTIONS if option not in ("--gradient-difference-every", "4", "1,3")]
    begun, again = tmp_path / "begun", tmp_path / "again"
    at = options.index("--partition")
    train(*options[:at], "--partition", "1,2,3", *options[at + 1 :], "--stages", "4", "--option", "elastic=true",
          "--out", str(begun))  # fmt: skip
    train("--replay", str(begun), "--straggler", "stages=3,factor=1.1", "--engine", "sequential", "--out", str(again))
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (again, begun))
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())


def test_torchrun_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each rank would begin a run of its own."""
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="without torchrun"):
        CliRunner().invoke(app, ["train", "--out", str(tmp_path / "run")], catch_exceptions=False)
    assert not (tmp_path / "run").exists()


def test_what_belongs_to_the_run_cannot_be_changed(undisturbed: Path) -> None:
    with pytest.raises(ConfigError, match="--lr cannot be given with --resume"):
        CliRunner().invoke(app, ["train", "--resume", str(undisturbed), "--lr", "0.5"], catch_exceptions=False)


class TestCheckpoint:
    def test_show(self, undisturbed: Path) -> None:
        done = CliRunner().invoke(app, ["checkpoint", "show", str(undisturbed), "--json"], catch_exceptions=False)
        shown = json.loads(done.stdout)
        assert (shown["stages"], shown["cuts"]) == (3, [1, 3])
        assert "metrics.jsonl" in shown["files"]
        assert len(shown["beside"]) == 5
        text = CliRunner().invoke(app, ["checkpoint", "show", str(undisturbed)], catch_exceptions=False).stdout
        assert "DSP(queue=(1, 1, 0), staleness=(4, 2, 0))" in text

    def test_verify(self, undisturbed: Path, tmp_path: Path) -> None:
        done = CliRunner().invoke(app, ["checkpoint", "verify", str(undisturbed)], catch_exceptions=False)
        assert "as they were written" in done.stdout
        folder = shutil.copytree(undisturbed / "checkpoints", tmp_path / "checkpoints")
        newest = max(folder.glob("ckpt-*"))
        (newest / "metrics.jsonl").write_text("")
        with pytest.raises(CheckpointError, match=r"metrics.jsonl is truncated: .* resume from .*ckpt-000005"):
            CliRunner().invoke(app, ["checkpoint", "verify", str(folder)], catch_exceptions=False)

    def test_export(self, undisturbed: Path, tmp_path: Path) -> None:
        newest = max((undisturbed / "checkpoints").glob("ckpt-*"))
        out = tmp_path / "model.safetensors"
        CliRunner().invoke(app, ["checkpoint", "export", str(newest), "--out", str(out)], catch_exceptions=False)
        final = load_file(undisturbed / "model.safetensors")
        assert {name: value.shape for name, value in load_file(out).items()} == {
            name: value.shape for name, value in final.items()
        }


@pytest.mark.dist
def test_processes_resume_too(undisturbed: Path, tmp_path: Path) -> None:
    folder = interrupted(undisturbed, tmp_path / "run", 2)
    subprocess.run(
        [sys.executable, "-m", "stalewise", "train", "--resume", str(folder), "--engine", "distributed"],
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=400,
    )
    assert metrics(folder) == metrics(undisturbed)
