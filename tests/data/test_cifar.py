"""CIFAR's binary files: packed, unpacked, damaged."""

import hashlib
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from stalewise.data import DataSplit
from stalewise.data.cifar import CIFAR10, CIFAR100, CifarLayout, load_cifar
from stalewise.errors import DataError


@pytest.fixture
def load(cache: Path):
    return lambda layout, data_dir: load_cifar(layout, data_dir=data_dir, cache_dir=cache)


@pytest.fixture
def archived(small_cifar, cifar_records, write_archive, tmp_path: Path) -> tuple[CifarLayout, Path]:
    """The small layout with the checksum of its archive, and the archive."""
    members = {f"{small_cifar.folder}/{name}": data for name, data in cifar_records(small_cifar).items()}
    archive = write_archive(tmp_path / small_cifar.archive, {f"{small_cifar.folder}/readme.html": b"hello"} | members)
    return replace(small_cifar, md5=hashlib.md5(archive.read_bytes()).hexdigest()), archive


def unpack(folder: Path, contents: dict[str, bytes]) -> Path:
    folder.mkdir(exist_ok=True)
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return folder


def check(split: DataSplit) -> None:
    """Labels are 0.. in each file, and the pixels of record i are the bytes of generator i."""
    assert split.train.labels.tolist() == [0, 1, 2, 3, 4, 5] * 2
    assert split.test.labels.tolist() == [0, 1, 2, 3]
    for index, image in enumerate(torch.cat([split.train.images, split.test.images])):
        expected = np.frombuffer(np.random.default_rng(index).bytes(3072), dtype=np.uint8)
        assert np.array_equal(image.numpy(), expected.reshape(3, 32, 32))


def test_the_archive_itself(archived, load) -> None:
    layout, archive = archived
    check(load(layout, archive))


def test_a_folder_with_the_archive(archived, load) -> None:
    layout, archive = archived
    split = load(layout, archive.parent)
    check(split)
    assert split.train.flip
    assert split.train.class_names[:2] == ("airplane", "automobile")


def test_unpacked_files_and_the_folder_of_them(small_cifar, cifar_records, load, tmp_path: Path) -> None:
    folder = unpack(tmp_path / small_cifar.folder, cifar_records(small_cifar))
    check(load(small_cifar, folder))
    check(load(small_cifar, tmp_path))


def test_an_incomplete_folder_falls_back_to_the_archive(archived, load) -> None:
    layout, archive = archived
    unpack(archive.parent / layout.folder, {"data_batch_1.bin": b"rest of an interrupted unpacking"})
    check(load(layout, archive.parent))


def test_cifar100_takes_the_fine_label(cifar_records, load, tmp_path: Path) -> None:
    layout = replace(CIFAR100, train_files={"train.bin": 5}, test_files={"test.bin": 3})
    split = load(layout, unpack(tmp_path, cifar_records(layout)))
    assert split.train.labels.tolist() == [0, 1, 2, 3, 4]
    assert split.num_classes == 100
    expected = np.frombuffer(np.random.default_rng(5).bytes(3072), dtype=np.uint8)
    assert np.array_equal(split.test.images[0].numpy().ravel(), expected)


def test_the_official_layouts() -> None:
    assert sum(CIFAR10.train_files.values()) == sum(CIFAR100.train_files.values()) == 50_000
    assert sum(CIFAR10.test_files.values()) == sum(CIFAR100.test_files.values()) == 10_000
    assert (CIFAR10.record_bytes, CIFAR100.record_bytes) == (3073, 3074)
    assert len(CIFAR10.class_names) == 10
    assert len(set(CIFAR100.class_names)) == 100
    assert list(CIFAR100.class_names) == sorted(CIFAR100.class_names)


def test_an_archive_of_another_checksum_is_refused(archived, load) -> None:
    layout, archive = archived
    archive.write_bytes(archive.read_bytes()[:-100])
    with pytest.raises(DataError, match=f"{layout.archive} has md5 [0-9a-f]{{32}}, .*{layout.md5}.*again"):
        load(layout, archive)
    with pytest.raises(DataError, match="has md5"):
        load(layout, archive.parent)


@pytest.mark.parametrize("kept", [0, 10, 2000])
def test_a_truncated_archive_of_the_right_checksum(archived, load, kept: int) -> None:
    layout, archive = archived
    archive.write_bytes(archive.read_bytes()[:kept])
    layout = replace(layout, md5=hashlib.md5(archive.read_bytes()).hexdigest())
    with pytest.raises(DataError, match=f"{layout.archive} cannot be read.*download"):
        load(layout, archive)


def test_an_archive_without_a_file(archived, load, cifar_records, write_archive) -> None:
    layout, archive = archived
    write_archive(archive, {f"{layout.folder}/data_batch_1.bin": cifar_records(layout)["data_batch_1.bin"]})
    layout = replace(layout, md5=hashlib.md5(archive.read_bytes()).hexdigest())
    with pytest.raises(DataError, match=f"holds no file {layout.folder}/data_batch_2.bin"):
        load(layout, archive)


def test_files_that_cannot_be_opened(archived, load, cifar_records, monkeypatch, tmp_path: Path) -> None:
    layout, archive = archived
    folder = unpack(tmp_path / "unpacked", cifar_records(layout))

    def failing(path: Path, mode: str) -> None:
        raise PermissionError(13, "permission denied")

    monkeypatch.setattr(Path, "open", failing)
    with pytest.raises(DataError, match=r"binary\.tar\.gz cannot be read: .*permission denied"):
        load(layout, archive)
    with pytest.raises(DataError, match=r"data_batch_1\.bin cannot be read: .*permission denied"):
        load(layout, folder)


def test_links_and_other_paths_in_an_archive_are_not_followed(
    archived, load, cifar_records, write_archive, tmp_path: Path
) -> None:
    layout, archive = archived
    contents = cifar_records(layout)
    secret = tmp_path / "secret.bin"
    secret.write_bytes(contents["test_batch.bin"])
    link = tarfile.TarInfo(f"{layout.folder}/test_batch.bin")
    link.type, link.linkname = tarfile.SYMTYPE, str(secret)
    members = {f"{layout.folder}/{name}": contents[name] for name in layout.train_files}
    members |= {"../test_batch.bin": contents["test_batch.bin"], "link": link}
    write_archive(archive, members)
    layout = replace(layout, md5=hashlib.md5(archive.read_bytes()).hexdigest())
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(DataError, match=r"holds no file .*test_batch.bin"):
        load(layout, archive)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data[:-1], "has 18437 bytes and ends in record 5; it must have 6 records of 3073 bytes"),
        (lambda data: data[:-3073], "has 15365 bytes and ends before record 5"),
        (lambda data: b"", "has 0 bytes and ends before record 0"),
        (lambda data: data + b"x", "has more than 6 records"),
        (lambda data: data[: 2 * 3073] + b"\x0a" + data[2 * 3073 + 1 :], "has label 10 in record 2;.*0 .. 9"),
    ],
)
def test_files_of_the_wrong_size_or_content(
    small_cifar, cifar_records, load, tmp_path: Path, change, message: str
) -> None:
    contents = cifar_records(small_cifar)
    contents["data_batch_2.bin"] = change(contents["data_batch_2.bin"])
    with pytest.raises(DataError, match=f"data_batch_2.bin {message}"):
        load(small_cifar, unpack(tmp_path, contents))


def test_a_member_of_the_wrong_size_is_named_with_its_archive(archived, load, cifar_records, write_archive) -> None:
    layout, archive = archived
    contents = cifar_records(layout) | {"test_batch.bin": bytes(10**6)}
    write_archive(archive, {f"{layout.folder}/{name}": data for name, data in contents.items()})
    layout = replace(layout, md5=hashlib.md5(archive.read_bytes()).hexdigest())
    with pytest.raises(DataError, match=f"test_batch.bin in .*{layout.archive} has more than 4 records"):
        load(layout, archive)


def test_a_missing_or_empty_folder(load, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere does not exist"):
        load(CIFAR10, tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"neither cifar-10-binary.tar.gz nor cifar-10-batches-bin/ with data"):
        load(CIFAR10, tmp_path)


def test_other_forms_of_the_data_get_a_hint(load, tmp_path: Path) -> None:
    (tmp_path / "train.parquet").write_bytes(b"")
    with pytest.raises(DataError, match="It holds parquet files"):
        load(CIFAR10, tmp_path)
    (tmp_path / "train.parquet").rename(tmp_path / "cifar-10-python.tar.gz")
    with pytest.raises(DataError, match="not read, because it is pickled"):
        load(CIFAR10, tmp_path)
