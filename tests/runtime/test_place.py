"""Where a worker was when it died, to the last action."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from stalewise.protocol.actions import Kind
from stalewise.runtime import place
from stalewise.runtime.place import Place, keep_places_in, last_place


@pytest.fixture(autouse=True)
def _kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(place, "_folder", tmp_path)


def test_the_last_action_survives_a_kill(tmp_path: Path) -> None:
    pid = os.fork()
    if pid == 0:
        mine = Place(2)
        for batch in range(5):
            for kind in (Kind.FORWARD, Kind.RECOMPUTE, Kind.BACKWARD):
                mine.at(kind, batch)
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(pid, 0)
    assert last_place(tmp_path, 2) == ("backward", 4)
    assert last_place(tmp_path, 0) is None


def test_between_actions_the_last_batch_stays_known(tmp_path: Path) -> None:
    mine = Place(0)
    assert last_place(tmp_path, 0) is None
    mine.leave()
    assert last_place(tmp_path, 0) is None
    mine.at(Kind.SEND_GRADIENT, 10**12)
    assert last_place(tmp_path, 0) == ("send gradient", 10**12)
    mine.leave()
    assert last_place(tmp_path, 0) == (None, 10**12)


def test_what_is_no_action_of_a_program_has_a_name(tmp_path: Path) -> None:
    mine = Place(1)
    mine.enter("load", 0)
    assert last_place(tmp_path, 1) == ("load", 0)
    mine.enter(None, None)
    assert last_place(tmp_path, 1) == ("load", 0)
    mine.at(Kind.FORWARD, 0)
    assert last_place(tmp_path, 1) == ("forward", 0)
    mine.enter("state_dict", None)
    assert last_place(tmp_path, 1) == ("state_dict", None)
    mine.leave()
    assert last_place(tmp_path, 1) == (None, 0)


def test_a_second_pipeline_takes_over(tmp_path: Path) -> None:
    first = Place(0)
    first.at(Kind.FORWARD, 1)
    second = Place(0)
    assert last_place(tmp_path, 0) is None
    second.at(Kind.BACKWARD, 7)
    first.leave()
    assert last_place(tmp_path, 0) == (None, 7)


@pytest.mark.parametrize(
    "content", [b"", b"short", bytes(8) + b"\xff" * 48, b"\x7f" + bytes(55), b"\x01" + bytes(23) + b"\xff" * 32]
)
def test_what_no_worker_wrote_says_nothing(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "place.0").write_bytes(content)
    assert last_place(tmp_path, 0) is None


def test_without_a_folder_nothing_is_written(tmp_path: Path) -> None:
    keep_places_in(tmp_path / "gone")
    Place(0).at(Kind.FORWARD, 3)
    assert last_place(tmp_path / "gone", 0) is None
