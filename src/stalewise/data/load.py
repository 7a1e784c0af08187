"""From the text that a user types to a data set: `digits`, `cifar10`, `cifar100`, `imagenet`, or a path."""

from __future__ import annotations

import difflib
import re
from dataclasses import replace
from pathlib import Path

from stalewise.data.cache import default_cache_dir
from stalewise.data.cifar import CIFAR10, CIFAR100, load_cifar
from stalewise.data.dataset import DataSplit
from stalewise.data.digits import load_digits
from stalewise.data.folder import load_folder
from stalewise.data.imagenet import IMAGENET_SIZE, load_imagenet
from stalewise.data.parquet import find_parquet_pair, load_parquet
from stalewise.errors import DataError

__all__ = ["DATA_NAMES", "load_data"]

_CIFAR = {layout.name: layout for layout in (CIFAR10, CIFAR100)}

DATA_NAMES = ("digits", *_CIFAR, "imagenet")
"""The data sets that have a name of their own."""

_IMAGENET = re.compile("imagenet(?:-([1-9][0-9]{1,2}))?")


def load_data(
    name: str,
    *,
    data_dir: Path | None = None,
    cache_dir: Path | None = None,
    train_limit: int | None = None,
    test_limit: int | None = None,
    flip: bool | None = None,
) -> DataSplit:
    """Load a data set into memory, or list its files. Blocks; may download (`cifar10`, `cifar100` without `data_dir`).

    Args:
        name: one of `DATA_NAMES`, or the path of a folder of class folders of images, of a folder with
            train*.parquet and test*.parquet, or of such a train*.parquet. `imagenet` is a folder of class folders, too,
            but its files are read when they are needed, and cropped to 224 pixels; `imagenet-64` to 64.
        data_dir: where the files of CIFAR or ImageNet are; the other names do not use it.
        cache_dir: for downloads and decoded images; default `$STALEWISE_CACHE` or `~/.cache/stalewise`.
        train_limit: use only the first so many training samples; the normalisation stays that of all.
        test_limit: use only the first so many test samples.
        flip: whether augmentation may mirror the images; default: not for digits, and else yes.

    Returns:
        The training and the test set, both of one image size, with the normalisation of the training set.

    Raises:
        DataError: where the name is unknown, or the data are missing or damaged.
        ConfigError: where a limit is not a positive integer.
    """
    cache = default_cache_dir() if cache_dir is None else Path(cache_dir)
    split = _load(name, None if data_dir is None else Path(data_dir).expanduser(), cache)
    if flip is not None:
        split = replace(split, train=split.train.flipping(flip), test=split.test.flipping(flip))
    return split.first(train_limit=train_limit, test_limit=test_limit)


def _load(name: str, data_dir: Path | None, cache_dir: Path) -> DataSplit:
    if not isinstance(name, str):
        raise DataError(f"the data set is {name!r}; it must be a name, one of {', '.join(DATA_NAMES)}, or a path.")
    if name == "digits":
        return load_digits()
    if name in _CIFAR:
        return load_cifar(_CIFAR[name], data_dir=data_dir, cache_dir=cache_dir)
    if match := _IMAGENET.fullmatch(name):
        return load_imagenet(data_dir, size=int(match[1] or IMAGENET_SIZE))
    try:
        path = Path(name).expanduser()
        there = bool(name) and path.exists()
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(f"{name[:200]!r} is neither a data set nor a path: {error}. Check the path.") from None
    if not there:
        raise DataError(_unknown(name))
    pair = find_parquet_pair(path)
    return load_folder(path) if pair is None else load_parquet(path.name, pair, cache_dir=cache_dir)


def _unknown(name: str) -> str:
    rule = f"a data set is {', '.join(DATA_NAMES)}, or the path of a folder of images or parquet files."
    nearest = difflib.get_close_matches(name.lower(), DATA_NAMES, n=1)
    if nearest:
        return f"there is no data set {name!r}; {rule} Did you mean {nearest[0]!r}?"
    parent = Path(name).expanduser().parent
    beside = [entry.name for entry in parent.iterdir()] if parent.is_dir() else []
    nearest = difflib.get_close_matches(Path(name).name, beside, n=1)
    repair = f"Did you mean {str(parent / nearest[0])!r}?" if nearest else "Check the path."
    return f"there is no data set or folder {name!r}; {rule} {repair}"
