"""A checkpoint that is not as it was written is refused by file and reason, and loads nothing."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from dist_equal import assert_equal
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from resume_runs import method_of, pipeline

from stalewise.checkpoint import folder as folders
from stalewise.checkpoint.folder import complete_checkpoints, find_checkpoint, lock, prune, publish, sweep, verify
from stalewise.checkpoint.manifest import MANIFEST, Manifest
from stalewise.errors import CheckpointError, ConfigError

FILES = [MANIFEST, *(f"stage{stage}.{ending}" for stage in range(3) for ending in ("json", "safetensors"))]


def refused(path: Path, match: str) -> str:
    """What `resume` says; nothing must have been loaded."""
    pipe = pipeline(method_of("dsp-stored"))
    before = pipe.state_dict()
    with pytest.raises(CheckpointError, match=match) as caught:
        pipe.resume(path)
    assert_equal(pipe.state_dict(), before)
    assert pipe.num_batches == 0
    return str(caught.value)


def test_an_intact_one(folder: Path) -> None:
    newest, older = complete_checkpoints(folder)
    assert find_checkpoint(folder) == newest
    assert [path.name for path in (older, newest)] == ["ckpt-000001-batch-6", "ckpt-000002-batch-8"]
    assert set(verify(newest).files) | {MANIFEST} == {path.name for path in newest.iterdir()} == set(FILES)
    point = pipeline(method_of("dsp-stored")).resume(folder, positioned=True)
    assert point is not None
    assert (point.path, point.batches) == (newest, 8)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing", "empty", "garbage"])
def test_a_damaged_file(name: str, damage: str, folder: Path) -> None:
    newest, older = complete_checkpoints(folder)
    path = newest / name
    data = bytearray(path.read_bytes())
    match damage:
        case "truncated":
            path.write_bytes(data[:-1])
        case "flipped":
            data[len(data) // 2] ^= 1
            path.write_bytes(data)
        case "missing":
            path.unlink()
        case "empty":
            path.write_bytes(b"")
        case "garbage":
            path.write_bytes(os.urandom(len(data)))
    if name == MANIFEST and damage == "missing":
        assert find_checkpoint(folder) == older
        refused(newest, "no complete checkpoint")
    else:
        message = refused(newest, name)
        assert str(older) in message


@given(name=st.sampled_from(FILES), data=st.data())
@settings(deadline=None, derandomize=True, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_flipped_bit_is_found(name: str, data: st.DataObject, original: Path, tmp_path: Path) -> None:
    path = tmp_path / "one"
    shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(find_checkpoint(original), path)
    content = bytearray((path / name).read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    (path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=name):
        verify(path)


def test_a_change_of_the_manifest_that_changes_no_value_is_found(folder: Path) -> None:
    path = find_checkpoint(folder) / MANIFEST
    path.write_text(path.read_text().replace(": ", ":  ", 1))
    refused(folder, "manifest.json is damaged: its checksum is wrong")


def test_the_last_good_one_is_offered_also_where_two_are_damaged(folder: Path) -> None:
    newest, older = complete_checkpoints(folder)
    shutil.copytree(newest, folder / "ckpt-000003-batch-9")
    for path in (newest, folder / "ckpt-000003-batch-9"):
        (path / "stage1.json").write_text("{}")
    message = refused(folder, "ckpt-000003-batch-9/stage1.json is truncated")
    assert f"resume from {older}." in message
    (older / "stage0.json").unlink()
    assert "No earlier checkpoint beside it is intact." in refused(folder, "stage1.json")


def rewritten(path: Path, **changes: Any) -> None:
    """The manifest with other values and the right checksum, as only a program would leave it."""
    from stalewise.checkpoint.manifest import _checksum

    content = json.loads((path / MANIFEST).read_text())
    content.pop("checksum")
    content.update(changes)
    (path / MANIFEST).write_text(json.dumps({**content, "checksum": _checksum(content)}, indent=1))


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"format": 3}, r"is of format 3, and this release reads format 2; use the release that wrote it \(0\."),
        ({"surprise": 1}, "not a manifest of this release"),
        ({"files": {"../evil": {"size": 1, "sha256": ""}}}, "not a manifest of this release"),
        ({"files": {"/etc/passwd": {"size": 1, "sha256": ""}}}, "not a manifest of this release"),
        ({"files": {}}, "does not list stage"),
        ({"cut": {"first_batch": 1, "entered": "two"}}, "not a manifest of this release"),
        ({"cut": {"first_batch": 1, "entered": 1}}, "malformed"),
        ({"layers": ["other"]}, "is of another model: its layers are other; this model's are 0, 1"),
        ({"method": ["nothing", {}], "method_text": "?"}, "names a method that cannot be built"),
        ({"method": [1, 2], "method_text": "?"}, "names a method that cannot be built"),
        ({"method": None, "method_text": "Own()"}, r"was saved by Own\(\), a method of your own"),
        ({"num_stages": 2}, "not a manifest of this release"),
    ],
    ids=str,
)
def test_a_manifest_of_something_else(changes: dict[str, Any], text: str, folder: Path) -> None:
    path = find_checkpoint(folder)
    rewritten(path, **changes)
    refused(path, text)


def test_a_part_with_the_right_checksum_and_the_wrong_content(folder: Path) -> None:
    from stalewise.checkpoint.manifest import file_checksum

    path = find_checkpoint(folder)
    for content in ("[]", "{", '{"value": 3, "messages": 4}', "[" * 100_000):
        (path / "stage0.json").write_text(content)
        files = {name: vars(file_checksum(path / name)) for name in FILES if name != MANIFEST}
        rewritten(path, files=files)
        refused(path, "stage0.json is malformed")


def test_numbers_grow_and_old_ones_go(tmp_path: Path) -> None:
    for number in range(12):
        partial = tmp_path / f".partial-x-{number}"
        partial.mkdir()
        (partial / MANIFEST).write_text("{}")
        publish(partial, tmp_path, num_batches=100 - number)
    names = [path.name for path in complete_checkpoints(tmp_path)]
    assert names == [f"ckpt-{number:06d}-batch-{101 - number}" for number in range(12, 0, -1)]
    prune(tmp_path, keep=2)
    assert [path.name for path in complete_checkpoints(tmp_path)] == names[:2]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names[:2])


def test_what_earlier_runs_left_is_swept(tmp_path: Path) -> None:
    for name in (".partial-old-3", ".partial-new-1", ".deleted-ckpt-000001-batch-2", "ckpt-000002-batch-3", "mine"):
        (tmp_path / name).mkdir()
    sweep(tmp_path, token="new")
    assert {path.name for path in tmp_path.iterdir()} == {".partial-new-1", "ckpt-000002-batch-3", "mine"}


def test_a_folder_belongs_to_one_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folders, "LOCK_WAIT_S", 0.0)
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import fcntl, sys; f = open(sys.argv[1], 'a'); fcntl.lockf(f, fcntl.LOCK_EX); print(flush=True); input()",
            str(tmp_path / ".lock"),
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        assert holder.stdout is not None
        holder.stdout.readline()
        with pytest.raises(ConfigError, match="is in use by another run"):
            lock(tmp_path)
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        assert lock(tmp_path)
        assert not lock(tmp_path)
    finally:
        holder.kill()
        holder.communicate()


def test_the_manifest_says_what_it_is_of(folder: Path) -> None:
    manifest = Manifest.read(find_checkpoint(folder))
    assert (manifest.num_stages, manifest.cuts, manifest.method_text) == (3, [2, 5], repr(method_of("dsp-stored")))
    assert manifest.method is not None
    assert manifest.method[0] == "dsp"
    assert len(manifest.stopped_s) == 3
