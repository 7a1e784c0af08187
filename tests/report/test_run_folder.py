"""What is missing reads as None; what is malformed is named with file, line and repair."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from stalewise.errors import ConfigError
from stalewise.report.html import write_report
from stalewise.report.run_folder import RunFolder


def edit(path: Path, **changes: Any) -> None:
    """Change fields of a JSON file; None as a value stands for null."""
    document = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(document | changes, indent=2), encoding="utf-8")


def test_finished_run_is_read_whole(finished_run: Path) -> None:
    run = RunFolder.read(finished_run)
    assert run.notes == ()
    assert (run.num_stages, len(run.batches), len(run.epochs)) == (3, 230, 10)
    assert run.staleness == (4, 2, 0)
    assert run.epochs[0].last_batch == 22
    assert run.epochs[-1].last_batch == 229
    assert run.partition.layers[5].stage == 1
    assert run.partition.layers[5].seconds == pytest.approx(7.1e-3)
    assert run.partition.stages[1].layers == (4, 7)
    assert run.total("samples_per_s") == 1320.4
    assert run.timeline.num_stages == 3


def test_missing_fields_and_files_read_as_none(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model": null}', encoding="utf-8")
    (tmp_path / "metrics.jsonl").write_text('{"event":"batch","batch":0}\n{"event":"new"}\n', encoding="utf-8")
    run = RunFolder.read(tmp_path)
    assert run.config.text("model") is None
    assert run.batches[0].loss is None
    assert (run.partition, run.timeline, run.staleness, run.num_stages) == (None, None, None, None)
    assert run.total("test_accuracy") is None
    assert run.total("batches") == 1
    assert len(run.notes) == 4


def test_totals_of_a_stopped_run_come_from_its_last_epoch(run_dir: Path) -> None:
    (run_dir / "summary.json").unlink()
    run = RunFolder.read(run_dir)
    assert run.total("test_accuracy") == run.epochs[-1].test_accuracy
    assert run.total("wall_time_s") == run.epochs[-1].time_s
    assert run.total("epochs") == 10
    assert any("summary.json" in note for note in run.notes)


def test_stage_of_a_layer_follows_from_the_ranges(run_dir: Path) -> None:
    layers = json.loads((run_dir / "partition.json").read_text(encoding="utf-8"))["layers"]
    edit(run_dir / "partition.json", layers=[layer | {"stage": None} for layer in layers])
    stages = [layer.stage for layer in RunFolder.read(run_dir).partition.layers]
    assert stages == [0, 0, 0, 0, 1, 1, 1, 2, 2, 2, 2]


@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl"])
def test_required_file_is_named(run_dir: Path, name: str) -> None:
    (run_dir / name).unlink()
    with pytest.raises(ConfigError, match=rf"{name} does not exist.*Give the folder"):
        RunFolder.read(run_dir)


def test_folder_must_exist(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nowhere is not a folder"):
        RunFolder.read(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", '{\n  "model": "a",\n}', r"config\.json, line 3: not JSON .*Correct the line"),
        ("config.json", "[1]", r"config\.json, line 1: holds list"),
        ("config.json", b'{\n"a": "\xff"}', r"config\.json, line 2: byte 8 is not UTF-8"),
        (
            "config.json",
            '{\n"stages": "three"}',
            r"line 2: stages is 'three'; it must be a whole number >= 0",
        ),
        ("config.json", '{"stages": true}', "line 1: stages is True"),
        ("config.json", '{"stages": 0}', "stages is 0; it must be at least 1"),
        ("config.json", '{\n\n"staleness": [2, 4, 0]}', r"line 3: staleness .*Did you mean \(4, 2, 0\)"),
        ("config.json", '{"staleness": 4}', "staleness is 4; it must be a list of whole numbers"),
        ("config.json", '{"stages": 3, "queue": [1, 0]}', "one number for each of the 3 stages"),
        ("environment.json", '{"cores": -4}', r"environment\.json, line 1: cores is -4"),
        ("summary.json", "{", r"summary\.json, line 1: not JSON"),
        (
            "partition.json",
            '{"layers": [{}, {"forward_s": "x"}]}',
            r"layers\[1\]\.forward_s is 'x'; it must be",
        ),
        ("partition.json", '{"stages": [{"layers": [5, 2]}]}', r"stages\[0\]\.layers is \[5, 2\].*half-open"),
        ("partition.json", '{"layers": [3]}', "layers is .*a list of objects"),
        ("metrics.jsonl", "{}\nnonsense\n{}\n", r"metrics\.jsonl, line 2: not JSON .*Delete the line"),
        ("metrics.jsonl", "{}\n[]\n", r"metrics\.jsonl, line 2: '\[\]' is not an object"),
        ("metrics.jsonl", '\n{"event": "batch"}\n', "line 2: batch is None; it must be a whole number"),
        ("metrics.jsonl", '{"event": "batch", "batch": 0, "loss": "1"}\n', "line 1: loss is '1'"),
        ("metrics.jsonl", '{"event": "epoch", "epoch": 1.5}\n', "line 1: epoch is 1.5"),
    ],
)
def test_malformed_files_are_named(run_dir: Path, name: str, content: str | bytes, message: str) -> None:
    (run_dir / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError, match=message):
        write_report(run_dir)


def test_incomplete_timeline_is_left_out(run_dir: Path) -> None:
    (run_dir / "timeline/stage1.npz").unlink()
    run = RunFolder.read(run_dir)
    assert run.timeline is None
    assert any("stage0.npz, stage2.npz and the run has 3 stages" in note for note in run.notes)


def test_malformed_timeline_is_named(run_dir: Path) -> None:
    (run_dir / "timeline/stage1.npz").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"stage1\.npz is not a readable"):
        RunFolder.read(run_dir)


def test_line_that_a_stopped_run_left_half_written_is_left_out(run_dir: Path) -> None:
    with (run_dir / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"event": "batch", "ba')
    run = RunFolder.read(run_dir)
    assert len(run.batches) == 230
    assert any("line 241, is cut off" in note for note in run.notes)


def test_non_finite_losses_are_read(run_dir: Path) -> None:
    (run_dir / "metrics.jsonl").write_text('{"event":"batch","batch":0,"loss":NaN}\n', encoding="utf-8")
    loss = RunFolder.read(run_dir).batches[0].loss
    assert loss != loss
