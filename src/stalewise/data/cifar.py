"""CIFAR-10 and CIFAR-100 in their binary form: fixed-length records and nothing to interpret.

    CIFAR-10    label (1 byte)                               1024 red, 1024 green, 1024 blue, row by row
    CIFAR-100   coarse label (1 byte), fine label (1 byte)   likewise

The Python form of the same archives is not read: it is pickled, and reading a pickle may run code.

Source: Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009;
https://www.cs.toronto.edu/~kriz/cifar.html.
"""

from __future__ import annotations

import hashlib
import tarfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from stalewise.data.dataset import DataSplit, ImageDataset
from stalewise.data.download import fetch
from stalewise.errors import DataError

__all__ = ["CIFAR10", "CIFAR100", "CifarLayout", "load_cifar"]

_SIDE = 32
_PIXEL_BYTES = 3 * _SIDE * _SIDE


@dataclass(frozen=True, kw_only=True)
class CifarLayout:
    """Where the records of one of the two data sets are, and what is in them.

    Args:
        name: of the data set.
        url: of the archive.
        md5: of the archive.
        folder: that all files of the archive lie in.
        train_files: names in `folder`, in order, each with its number of records.
        test_files: likewise.
        label_bytes: bytes before the pixels; the last of them is the label.
        class_names: in the order of the labels.
    """

    name: str
    url: str
    md5: str
    folder: str
    train_files: dict[str, int]
    test_files: dict[str, int]
    label_bytes: int
    class_names: tuple[str, ...]

    @property
    def archive(self) -> str:
        """File name of the archive."""
        return self.url.rsplit("/", 1)[-1]

    @property
    def files(self) -> dict[str, int]:
        """All files with their number of records."""
        return self.train_files | self.test_files

    @property
    def record_bytes(self) -> int:
        """Length of a record."""
        return self.label_bytes + _PIXEL_BYTES


_CIFAR10_CLASSES = "airplane automobile bird cat deer dog frog horse ship truck"
_CIFAR100_CLASSES = """
    apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel
    can castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur
    dolphin elephant flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion
    lizard lobster man maple_tree motorcycle mountain mouse mushroom oak_tree orange orchid otter
    palm_tree pear pickup_truck pine_tree plain plate poppy porcupine possum rabbit raccoon ray road
    rocket rose sea seal shark shrew skunk skyscraper snail snake spider squirrel streetcar sunflower
    sweet_pepper table tank telephone television tiger tractor train trout tulip turtle wardrobe whale
    willow_tree wolf woman worm
"""

CIFAR10 = CifarLayout(
    name="cifar10",
    url="https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
    md5="c32a1d4ab5d03f1284b67883e8d87530",
    folder="cifar-10-batches-bin",
    train_files={f"data_batch_{index}.bin": 10_000 for index in range(1, 6)},
    test_files={"test_batch.bin": 10_000},
    label_bytes=1,
    class_names=tuple(_CIFAR10_CLASSES.split()),
)

CIFAR100 = CifarLayout(
    name="cifar100",
    url="https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz",
    md5="03b5dce01913d631647c71ecec9e9cb8",
    folder="cifar-100-binary",
    train_files={"train.bin": 50_000},
    test_files={"test.bin": 10_000},
    label_bytes=2,
    class_names=tuple(_CIFAR100_CLASSES.split()),
)


def load_cifar(layout: CifarLayout, *, data_dir: Path | None, cache_dir: Path) -> DataSplit:
    """The data set, from the user's folder if one is given, or else from the cache, downloaded if need be.

    Args:
        layout: `CIFAR10` or `CIFAR100`.
        data_dir: the archive, or a folder that holds it, its `.bin` files, or its folder of them.
        cache_dir: where a download is kept.

    Raises:
        DataError: where files are missing, damaged or not of that data set, or the download fails.
    """
    if data_dir is None:
        contents = _read_archive(layout, fetch(layout.url, md5=layout.md5, folder=cache_dir))
    else:
        contents = _read_local(layout, data_dir)
    splits = []
    for split, files in (("train", layout.train_files), ("test", layout.test_files)):
        parts = [_parse(layout, *contents[name], expected=records) for name, records in files.items()]
        images, labels = zip(*parts, strict=True)
        splits.append(
            ImageDataset(
                name=f"{layout.name} {split}",
                images=torch.from_numpy(np.concatenate(images)),
                labels=torch.from_numpy(np.concatenate(labels)),
                class_names=layout.class_names,
            )
        )
    return DataSplit.normalised_by_train(*splits)


_Contents = dict[str, tuple[str, bytes]]
"""Per file name: the words that name it in a message, and its bytes."""


def _read_local(layout: CifarLayout, data_dir: Path) -> _Contents:
    """The files from wherever `data_dir` has them; the unpacked ones first, because they read faster."""
    if data_dir.is_file():
        return _checked_archive(layout, data_dir)
    if not data_dir.is_dir():
        raise DataError(
            f"data folder {data_dir} does not exist; it must hold {layout.archive}. Check the path, or leave "
            "it out to download the archive."
        )
    for folder in (data_dir, data_dir / layout.folder):
        if all((folder / name).is_file() for name in layout.files):
            return _read_unpacked(layout, folder)
    if (data_dir / layout.archive).is_file():
        return _checked_archive(layout, data_dir / layout.archive)
    raise DataError(
        f"data folder {data_dir} holds neither {layout.archive} nor {layout.folder}/ with "
        f"{', '.join(layout.files)}; {layout.name} is read from its binary archive, packed or "
        f"unpacked.{_other_form(data_dir)} Download {layout.url}, or leave the folder out to have it "
        "downloaded."
    )


def _read_unpacked(layout: CifarLayout, folder: Path) -> _Contents:
    contents: _Contents = {}
    for name, records in layout.files.items():
        path = folder / name
        try:
            with path.open("rb") as file:
                contents[name] = (str(path), file.read(records * layout.record_bytes + 1))
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error}. Check its permissions and the disk.") from error
    return contents


def _other_form(data_dir: Path) -> str:
    """A hint, where the folder holds images in a form that is read under another name, or not at all."""
    if any(data_dir.glob("*.parquet")):
        return f" It holds parquet files: to read these, give {str(data_dir)!r} as the name of the data set."
    if any(data_dir.glob("cifar-*-python*")) or any(data_dir.glob("cifar-*-py")):
        return " The archive for Python that lies there is not read, because it is pickled."
    return ""


def _checked_archive(layout: CifarLayout, path: Path) -> _Contents:
    try:
        with path.open("rb") as file:
            md5 = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}. Check its permissions and the disk.") from error
    if md5 != layout.md5:
        raise DataError(
            f"{path} has md5 {md5}, and {layout.archive} has {layout.md5}; the file is damaged or another "
            f"one. Download {layout.url} again."
        )
    return _read_archive(layout, path)


def _read_archive(layout: CifarLayout, path: Path) -> _Contents:
    """The files of an archive, taken by name into memory: nothing is unpacked, so no path in it matters."""
    wanted = {f"{layout.folder}/{name}": name for name in layout.files}
    contents: _Contents = {}
    try:
        with tarfile.open(path, "r:gz") as archive:
            for member in archive:
                name = wanted.get(member.name)
                file = archive.extractfile(member) if name is not None and member.isreg() else None
                if name is None or file is None:
                    continue
                # One byte more than expected is enough to see that a member is too long.
                limit = layout.files[name] * layout.record_bytes + 1
                contents[name] = (f"{member.name} in {path}", file.read(limit))
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
        raise DataError(
            f"{path} cannot be read: {error}. It must be the archive {layout.archive}; delete it and "
            f"download {layout.url} again."
        ) from error
    missing = [member for member, name in wanted.items() if name not in contents]
    if missing:
        raise DataError(
            f"{path} holds no file {missing[0]}; {layout.archive} has {len(wanted)} such files. Delete it "
            f"and download {layout.url} again."
        )
    return contents


def _parse(
    layout: CifarLayout, where: str, content: bytes, *, expected: int
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Images [N, 3, 32, 32] and labels [N] of one file, which `where` names in messages; `expected` is N."""
    complete, rest = divmod(len(content), layout.record_bytes)
    if complete != expected or rest:
        if len(content) > expected * layout.record_bytes:
            found = f"more than {expected} records"
        else:
            found = f"{len(content)} bytes and ends {'in' if rest else 'before'} record {complete}"
        raise DataError(
            f"{where} has {found}; it must have {expected} records of {layout.record_bytes} bytes. Unpack or "
            f"download {layout.url} again."
        )
    records = np.frombuffer(content, dtype=np.uint8).reshape(expected, layout.record_bytes)
    labels = records[:, layout.label_bytes - 1].astype(np.int64)
    wrong = np.flatnonzero(labels >= len(layout.class_names))
    if len(wrong):
        raise DataError(
            f"{where} has label {labels[wrong[0]]} in record {wrong[0]}; {layout.name} has the labels 0 .. "
            f"{len(layout.class_names) - 1}. The file is damaged: unpack or download {layout.url} again."
        )
    return records[:, layout.label_bytes :].reshape(expected, 3, _SIDE, _SIDE), labels
