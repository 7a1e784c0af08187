"""Two runs never write into one folder."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from stalewise.cli.main import app
from stalewise.errors import ConfigError
from stalewise.experiments.run_lock import empty_folder, is_empty, locked_folder

HOLDER = """
import sys
from pathlib import Path
from stalewise.experiments.run_lock import locked_folder
with locked_folder(Path(sys.argv[1])):
    print("locked", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that holds the lock of `tmp_path / "run"`."""
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "run")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "locked\n"
        yield process


@pytest.mark.parametrize(
    "command",
    [
        ["train", "--out", "{}"],
        ["train", "--out", "{}", "--overwrite"],
        ["compare", "--methods", "bp,dsp", "--out", "{}"],
        ["simulate", "--out", "{}"],
    ],
    ids=" ".join,
)
def test_a_folder_in_use_is_refused_naming_the_process(
    command: list[str], holder: subprocess.Popen[str], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    result = CliRunner().invoke(app, [part.format(folder) for part in command])
    assert isinstance(result.exception, ConfigError)
    assert f"{folder} is in use by process {holder.pid} on {os.uname().nodename} since" in str(result.exception)
    assert is_empty(folder)
    holder.communicate("")
    assert not folder.exists()


def test_a_lock_ends_with_its_process(holder: subprocess.Popen[str], tmp_path: Path) -> None:
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    folder = tmp_path / "run"
    assert [path.name for path in folder.iterdir()] == [".lock"]
    with locked_folder(folder):
        assert is_empty(folder)
        (folder / "result").write_text("kept")
    assert [path.name for path in folder.iterdir()] == ["result"]


def test_emptying_keeps_the_lock(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_text("kept")
    folder = tmp_path / "run"
    with locked_folder(folder):
        (folder / "old").mkdir()
        (folder / "old" / "file").write_text("x")
        (folder / "link").symlink_to(outside)
        empty_folder(folder)
        assert [path.name for path in folder.iterdir()] == [".lock"]
        with pytest.raises(ConfigError, match="is in use by process"), locked_folder(folder):
            pass
    assert (outside / "precious").read_text() == "kept"


@pytest.mark.parametrize("name", ["file", "file/below", "a\0b", "x" * 300], ids=["file", "below", "nul", "long"])
def test_folders_that_cannot_be_are_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    with (
        pytest.raises(ConfigError, match=r"is a file and not a folder|cannot write to"),
        locked_folder(tmp_path / name),
    ):
        pass
    assert (tmp_path / "file").read_text() == "kept"
