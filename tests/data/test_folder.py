"""Class folders of images: the two layouts, the split, and what is wrong with others."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from stalewise.data import DataSplit
from stalewise.data.folder import load_folder
from stalewise.errors import DataError


@pytest.fixture
def write_classes(pixels, encode):
    """Writes count images per class; the pixels of image i of class c are those of number 100 * c + i."""

    def write(root: Path, counts: dict[str, int], side: int = 8) -> Path:
        for position, (name, count) in enumerate(counts.items()):
            (root / name).mkdir(parents=True, exist_ok=True)
            for index in range(count):
                (root / name / f"{index:03}.png").write_bytes(encode(pixels(100 * position + index, side)))
        return root

    return write


def numbers(split: DataSplit, pixels, counts: list[int]) -> tuple[list[int], list[int]]:
    """Which images the training and the test set hold, by number, having checked their labels."""
    known = {
        pixels(100 * c + i).transpose(2, 0, 1).tobytes(): 100 * c + i for c, n in enumerate(counts) for i in range(n)
    }
    found = []
    for dataset in (split.train, split.test):
        found.append([known[image.numpy().tobytes()] for image in dataset.images])
        assert [number // 100 for number in found[-1]] == dataset.labels.tolist()
    return found[0], found[1]


@pytest.mark.parametrize("test_name", ["test", "val", "validation"])
def test_train_and_test_folders(write_classes, pixels, tmp_path: Path, test_name: str) -> None:
    write_classes(tmp_path / "train", {"cat": 5, "dog": 4})
    write_classes(tmp_path / test_name, {"cat": 2, "dog": 3})
    split = load_folder(tmp_path)
    assert split.train.class_names == ("cat", "dog")
    train, test = numbers(split, pixels, [5, 4])
    assert sorted(train) == [0, 1, 2, 3, 4, 100, 101, 102, 103]
    assert sorted(test) == [0, 1, 100, 101, 102]
    assert split.train.flip


def test_without_a_test_folder_a_fifth_of_each_class_is_split_off(write_classes, pixels, tmp_path: Path) -> None:
    split = load_folder(write_classes(tmp_path, {"a": 20, "b": 10, "c": 2, "d": 1}))
    train, test = numbers(split, pixels, [20, 10, 2, 1])
    assert np.bincount(split.test.labels).tolist() == [4, 2, 1]
    assert sorted(train + test) == [*range(20), *range(100, 110), 200, 201, 300]


def test_the_split_follows_the_names_alone(write_classes, tmp_path: Path) -> None:
    first = load_folder(write_classes(tmp_path / "one", {"a": 20, "b": 10}))
    second = load_folder(Path(shutil.copytree(tmp_path / "one", tmp_path / "elsewhere" / "two")))
    assert first.train.images.equal(second.train.images)
    assert first.test.images.equal(second.test.images)


def test_the_split_and_the_order_are_the_same_on_every_machine(write_classes, pixels, tmp_path: Path) -> None:
    split = load_folder(write_classes(tmp_path, {"a": 6, "b": 6}))
    assert numbers(split, pixels, [6, 6]) == ([3, 5, 103, 0, 100, 2, 101, 104, 102, 1], [4, 105])


def test_the_first_samples_are_of_many_classes(write_classes, tmp_path: Path) -> None:
    split = load_folder(write_classes(tmp_path, dict.fromkeys("abcd", 50)))
    first = np.bincount(split.train.labels[:40], minlength=4)
    # 10 of each are expected, with a standard deviation of 2.4.
    assert (np.abs(first - 10) < 3 * 2.4).all()


def test_a_class_named_train(write_classes, tmp_path: Path) -> None:
    split = load_folder(write_classes(tmp_path, {"bus": 5, "train": 5}))
    assert split.train.class_names == ("bus", "train")
    assert len(split.train) == 8


def test_other_files_are_passed_over(write_classes, encode, pixels, tmp_path: Path) -> None:
    write_classes(tmp_path, {"a": 5, "b": 5})
    (tmp_path / "a" / "notes.txt").write_text("no image")
    (tmp_path / "a" / ".hidden.png").write_bytes(b"no image")
    (tmp_path / ".git").mkdir()
    (tmp_path / "LICENSE").write_text("no class")
    (tmp_path / "b" / "UPPER.JPG").write_bytes(encode(pixels(0), "JPEG"))
    split = load_folder(tmp_path)
    assert len(split.train) + len(split.test) == 11


def test_all_images_get_the_size_of_the_first(write_classes, tmp_path: Path) -> None:
    write_classes(tmp_path / "train", {"a": 3})
    write_classes(tmp_path / "test", {"a": 2}, side=12)
    split = load_folder(tmp_path)
    assert split.test.images.shape == (2, 3, 8, 8)


def test_grey_images_become_rgb(encode, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    for index in range(2):
        (tmp_path / "a" / f"{index}.png").write_bytes(encode(np.full((4, 4), 40 * index, dtype=np.uint8)))
    split = load_folder(tmp_path)
    assert split.train.images.unique().tolist() + split.test.images.unique().tolist() in ([0, 40], [40, 0])


def test_more_files_than_one_group(write_classes, pixels, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr("stalewise.data.folder._GROUP", 3)
    split = load_folder(write_classes(tmp_path, {"a": 11}))
    train, test = numbers(split, pixels, [11])
    assert sorted(train + test) == list(range(11))


def test_a_damaged_image_is_named(write_classes, tmp_path: Path) -> None:
    write_classes(tmp_path, {"a": 6, "b": 6})
    bad = tmp_path / "b" / "003.png"
    bad.write_bytes(bad.read_bytes()[:50])
    with pytest.raises(DataError, match=r"b.003\.png cannot be decoded \(50 bytes\)"):
        load_folder(tmp_path)


def test_an_image_that_cannot_be_read_is_named(write_classes, monkeypatch, tmp_path: Path) -> None:
    write_classes(tmp_path, {"a": 6})

    def failing(path: Path) -> bytes:
        raise PermissionError(13, "permission denied")

    monkeypatch.setattr(Path, "read_bytes", failing)
    with pytest.raises(DataError, match=r"\.png cannot be read: .*permission denied"):
        load_folder(tmp_path)


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        ({}, "has no class folders"),
        ({"a": 3, "b": 0}, "class folder .*b holds no image"),
        ({"a": 1, "b": 1}, "every class of .* has a single image"),
        ({"train/a": 2}, "has a folder train but none of test, val, validation"),
        ({"train/a": 2, "test/b": 2}, "b is a class that the training images do not have.*among a. Remove"),
        ({"train/horse": 2, "train/ship": 2, "test/hosre": 2}, "Is it 'horse'"),
        ({"train/a": 2, "test": 0}, "test has no class folders"),
        ({"train/a": 0, "test/a": 1}, "train.a holds no image"),
    ],
)
def test_other_layouts_are_explained(write_classes, tmp_path: Path, folders: dict[str, int], message: str) -> None:
    write_classes(tmp_path, folders)
    with pytest.raises(DataError, match=message):
        load_folder(tmp_path)
