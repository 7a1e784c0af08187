"""Data set names and paths."""

import hashlib
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from stalewise.data import DATA_NAMES, load, load_data
from stalewise.errors import ConfigError, DataError


def test_the_names() -> None:
    assert DATA_NAMES == ("digits", "cifar10", "cifar100", "imagenet")


def test_limits_and_flip() -> None:
    whole = load_data("digits")
    split = load_data("digits", train_limit=20, test_limit=7, flip=True)
    assert (len(split.train), len(split.test)) == (20, 7)
    assert split.train.flip
    assert (split.mean, split.std) == (whole.mean, whole.std)
    assert split.train.images.equal(whole.train.images[:20])
    with pytest.raises(ConfigError, match="limit for digits test is 0"):
        load_data("digits", test_limit=0)


def test_cifar_by_name_from_a_folder(
    monkeypatch: pytest.MonkeyPatch, small_cifar, cifar_records, write_archive, tmp_path: Path
) -> None:
    contents = {f"{small_cifar.folder}/{name}": data for name, data in cifar_records(small_cifar).items()}
    archive = write_archive(tmp_path / small_cifar.archive, contents)
    layout = replace(small_cifar, md5=hashlib.md5(archive.read_bytes()).hexdigest())
    monkeypatch.setitem(load._CIFAR, "cifar10", layout)
    for data_dir in (tmp_path, archive):
        split = load_data("cifar10", data_dir=data_dir, train_limit=5)
        assert split.train.labels.tolist() == [0, 1, 2, 3, 4]
        assert split.num_classes == 10


def test_the_official_checksum_is_asked_of_a_users_archive(
    small_cifar, cifar_records, write_archive, tmp_path: Path
) -> None:
    contents = {f"{small_cifar.folder}/{name}": data for name, data in cifar_records(small_cifar).items()}
    write_archive(tmp_path / small_cifar.archive, contents)
    with pytest.raises(DataError, match=r"has md5 .*tar\.gz has c32a1d4ab5d03f1284b67883e8d87530"):
        load_data("cifar10", data_dir=tmp_path)


def test_paths(write_parquet, encode, pixels, tmp_path: Path, cache: Path) -> None:
    (tmp_path / "hub").mkdir()
    write_parquet(tmp_path / "hub" / "train.parquet", 6)
    write_parquet(tmp_path / "hub" / "test.parquet", 4)
    (tmp_path / "plain" / "a").mkdir(parents=True)
    for index in range(5):
        (tmp_path / "plain" / "a" / f"{index}.png").write_bytes(encode(pixels(index)))
    assert len(load_data(str(tmp_path / "hub")).train) == 6
    assert len(load_data(str(tmp_path / "hub" / "train.parquet")).test) == 4
    assert len(load_data(str(tmp_path / "plain")).train) == 4
    assert (cache / "decoded").is_dir()
    load_data(str(tmp_path / "hub"), cache_dir=tmp_path / "other")
    assert (tmp_path / "other" / "decoded").is_dir()


@pytest.mark.parametrize(("name", "nearest"), [("cifar-10", "cifar10"), ("CIFAR100", "cifar100"), ("digit", "digits")])
def test_unknown_names_get_the_nearest(name: str, nearest: str) -> None:
    with pytest.raises(DataError, match=f"no data set '{name}'.*Did you mean '{nearest}'"):
        load_data(name)


def test_a_missing_path_gets_the_nearest_beside_it(tmp_path: Path) -> None:
    (tmp_path / "flowers").mkdir()
    with pytest.raises(DataError, match=r"Did you mean '.*flowers'"):
        load_data(str(tmp_path / "flower"))
    with pytest.raises(DataError, match=r"no data set or folder '.*'.*digits, cifar10, cifar100.*Check the path"):
        load_data(str(tmp_path / "no" / "such" / "place"))
    with pytest.raises(DataError, match="no data set or folder ''"):
        load_data("")


def test_a_file_of_another_kind(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("1,2")
    with pytest.raises(DataError, match=r"train\.csv is not a train\*\.parquet file"):
        load_data(str(tmp_path / "train.csv"))


def test_importing_needs_no_reader() -> None:
    """What reads one kind of data set is imported when it is needed."""
    code = (
        "import sys, stalewise.data, stalewise.models\n"
        "print([name for name in ('pooch', 'sklearn', 'pyarrow', 'PIL', 'requests') if name in sys.modules])"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "[]"
