"""The cache folder: where it is, when a key changes, and what damage does."""

import os
from pathlib import Path

import numpy as np
import pytest

from stalewise.data import default_cache_dir
from stalewise.data.cache import load_array, source_key, store_array


def test_the_environment_is_read_when_asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("STALEWISE_CACHE", str(tmp_path / "here"))
    assert default_cache_dir() == tmp_path / "here"
    monkeypatch.setenv("STALEWISE_CACHE", "~/there")
    assert default_cache_dir() == Path.home() / "there"
    monkeypatch.delenv("STALEWISE_CACHE")
    assert default_cache_dir() == Path.home() / ".cache" / "stalewise"


def test_the_key_follows_path_size_time_and_details(tmp_path: Path) -> None:
    file = tmp_path / "a"
    file.write_bytes(b"12")
    os.utime(file, ns=(0, 10**9))
    keys = {source_key(file), source_key(file, (8, 8)), source_key(file, (8, 9))}
    assert source_key(file) in keys
    os.utime(file, ns=(0, 2 * 10**9))
    keys.add(source_key(file))
    file.write_bytes(b"123")
    os.utime(file, ns=(0, 10**9))
    keys.add(source_key(file))
    other = tmp_path / "b"
    other.write_bytes(b"12")
    os.utime(other, ns=(0, 10**9))
    keys.add(source_key(other))
    assert len(keys) == 6


def test_an_array_comes_back(tmp_path: Path) -> None:
    array = np.arange(24, dtype=np.uint8).reshape(2, 3, 2, 2)
    path = tmp_path / "new" / "folder" / "a.npy"
    store_array(path, array)
    loaded = load_array(path, array.shape)
    assert loaded is not None
    assert np.array_equal(loaded, array)
    assert [entry.name for entry in path.parent.iterdir()] == ["a.npy"]


@pytest.mark.parametrize("kept", [0, 5, 60, 140])
def test_a_truncated_array_is_no_array(tmp_path: Path, kept: int) -> None:
    array = np.zeros((2, 3, 2, 2), dtype=np.uint8)
    path = tmp_path / "a.npy"
    store_array(path, array)
    path.write_bytes(path.read_bytes()[:kept])
    assert load_array(path, array.shape) is None


def test_other_arrays_and_pickles_are_not_taken(tmp_path: Path) -> None:
    path = tmp_path / "a.npy"
    assert load_array(path, (4,)) is None
    np.save(path, np.zeros(4, dtype=np.int8))
    assert load_array(path, (4,)) is None
    np.save(path, np.zeros(5, dtype=np.uint8))
    assert load_array(path, (4,)) is None
    np.save(path, np.array([{"pickled": True}] * 4), allow_pickle=True)
    assert load_array(path, (4,)) is None


def test_a_folder_that_cannot_be_written_is_a_warning(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.warns(RuntimeWarning, match="STALEWISE_CACHE"):
        store_array(tmp_path / "file" / "a.npy", np.zeros(4, dtype=np.uint8))


def test_a_failed_write_leaves_the_old_array_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.npy"
    store_array(path, np.ones(4, dtype=np.uint8))

    def full_disk(file, array, allow_pickle):
        file.write(b"half of it")
        raise OSError("no space left on device")

    monkeypatch.setattr(np, "save", full_disk)
    with pytest.warns(RuntimeWarning, match="no space left on device"):
        store_array(path, np.zeros(4, dtype=np.uint8))
    loaded = load_array(path, (4,))
    assert loaded is not None
    assert loaded.all()
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.npy"]
