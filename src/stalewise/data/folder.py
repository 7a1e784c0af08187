"""A folder of class folders of images.

    root/train/<class>/*.png     and     root/test/<class>/*.png   (or val, or validation)
    root/<class>/*.png           where every fifth image of each class, in the order of a hash, is for testing

Classes are numbered in the order of their names. The order of the samples is that of a hash of
`<class>/<file name>`, so the first n of them are a mixture of all classes, the same on every machine.
"""

from __future__ import annotations

import difflib
import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from stalewise.data.dataset import DataSplit, ImageDataset
from stalewise.data.decode import decode_images, image_size
from stalewise.errors import DataError

__all__ = ["load_folder", "mixed", "train_and_test_classes"]

_SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})
_TEST_NAMES = ("test", "val", "validation")
_TEST_SHARE = 0.2
_GROUP = 256
"""Files read ahead of decoding."""

_Classes = dict[str, list[Path]]
"""Image files per class name, both in order."""


def load_folder(root: Path) -> DataSplit:
    """All images below `root`, as RGB, resized to the size of the first training image unless they have it.

    Args:
        root: a folder of one of the two layouts above. Hidden entries and files that are no images are passed
            over.

    Raises:
        DataError: where the layout is another one, a class has no image, or an image cannot be decoded.
    """
    train, test = train_and_test_classes(root)
    class_names = tuple(train)
    train_files, train_labels = mixed(train, class_names)
    test_files, test_labels = mixed(test, class_names)
    size = image_size(_read(train_files[0]), str(train_files[0]))
    datasets = []
    for split, files, labels in (("train", train_files, train_labels), ("test", test_files, test_labels)):
        names = [str(file) for file in files]
        images = decode_images(_groups(files), names.__getitem__, count=len(files), size=size)
        datasets.append(
            ImageDataset(
                name=f"{root.name} {split}",
                images=torch.from_numpy(images),
                labels=torch.tensor(labels, dtype=torch.int64),
                class_names=class_names,
            )
        )
    return DataSplit.normalised_by_train(*datasets)


def train_and_test_classes(root: Path) -> tuple[dict[str, list[Path]], dict[str, list[Path]]]:
    """The image files of each class, for training and for testing.

    Raises:
        DataError: where the layout is another one, or a class has no image.
    """
    train_root = root / "train"
    # A folder `train` that holds images itself is a class of that name.
    if train_root.is_dir() and _folders(train_root):
        train = _classes(train_root)
        # ImageNet comes with a folder test, too, whose images have no classes.
        found = sorted(
            (root / name for name in _TEST_NAMES if (root / name).is_dir()), key=lambda path: not _folders(path)
        )
        test_root = found[0] if found else None
        if test_root is None:
            raise DataError(
                f"{root} has a folder train but none of {', '.join(_TEST_NAMES)}; both splits are needed. "
                "Add one, or move the class folders up to have a fifth of the images split off."
            )
        test = _classes(test_root)
        _check_test_classes(test_root, list(train), list(test))
        return train, test
    return _split(root, _classes(root))


def _folders(root: Path) -> list[Path]:
    return sorted(entry for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _classes(root: Path) -> _Classes:
    folders = _folders(root)
    if not folders:
        raise DataError(
            f"{root} has no class folders; images are read from {root}/<class>/*.png and the like, or a "
            "parquet pair train*.parquet and test*.parquet. Check the path."
        )
    classes: _Classes = {}
    for folder in folders:
        with os.scandir(folder) as entries:  # which knows what is a file without asking for each
            names = [entry.name for entry in entries if entry.is_file() and not entry.name.startswith(".")]
        classes[folder.name] = [folder / name for name in sorted(names) if Path(name).suffix.lower() in _SUFFIXES]
        if not classes[folder.name]:
            raise DataError(
                f"class folder {folder} holds no image; an image ends in {', '.join(sorted(_SUFFIXES))}. Add "
                "images, or remove the folder."
            )
    return classes


def _check_test_classes(test_root: Path, train: Sequence[str], test: Sequence[str]) -> None:
    for name in test:
        if name not in train:
            nearest = difflib.get_close_matches(name, train, n=1)
            raise DataError(
                f"{test_root / name} is a class that the training images do not have; test classes must be "
                f"among {', '.join(train)}. " + (f"Is it {nearest[0]!r}?" if nearest else "Remove it or rename it.")
            )


def _split_hash(file: Path) -> bytes:
    """Of the class and the file name alone, so that moving the root changes nothing."""
    return hashlib.sha256(f"split {file.parent.name}/{file.name}".encode()).digest()


def _order_hash(file: Path) -> bytes:
    """Independent of `_split_hash`, whose small values are all in the test set."""
    return hashlib.sha256(f"order {file.parent.name}/{file.name}".encode()).digest()


def _split(root: Path, classes: _Classes) -> tuple[_Classes, _Classes]:
    """A fifth of each class for testing; at least one image of a class that has two."""
    train: _Classes = {}
    test: _Classes = {}
    for name, files in classes.items():
        ranked = sorted(files, key=_split_hash)
        count = max(1, round(_TEST_SHARE * len(ranked))) if len(ranked) > 1 else 0
        train[name] = ranked[count:]
        if count:
            test[name] = ranked[:count]
    if not test:
        raise DataError(
            f"every class of {root} has a single image; testing needs another one. Add images, or lay them "
            "out as train/<class> and test/<class>."
        )
    return train, test


def mixed(classes: _Classes, class_names: Sequence[str]) -> tuple[list[Path], list[int]]:
    """All files in the order of their hashes, and the label of each."""
    files = sorted((file for members in classes.values() for file in members), key=_order_hash)
    label_of = {name: label for label, name in enumerate(class_names)}
    return files, [label_of[file.parent.name] for file in files]


def _groups(files: Sequence[Path]) -> Iterator[list[bytes]]:
    for start in range(0, len(files), _GROUP):
        yield [_read(file) for file in files[start : start + _GROUP]]


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error}. Check its permissions and the disk.") from error
