"""Image sets in parquet files, laid out as on the Hugging Face hub.

    folder/train*.parquet    one file or several shards, in the order of their names; also folder/data/...
    folder/test*.parquet     or validation*.parquet

    column img or image           struct with a field `bytes`, or binary: an encoded image
    column label or fine_label    integers from 0

What is in a file is the matter of `parquet_shard`.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from stalewise.data.dataset import DataSplit, ImageDataset
from stalewise.data.parquet_shard import ParquetShard
from stalewise.errors import DataError

__all__ = ["find_parquet_pair", "load_parquet"]

_TEST_NAMES = ("test", "validation")

_Pair = tuple[list[Path], list[Path]]


def find_parquet_pair(path: Path) -> _Pair | None:
    """The training and test shards that `path` stands for, or None for a folder without parquet files.

    Args:
        path: a folder, or a `train*.parquet` file whose test file lies beside it.

    Raises:
        DataError: where one of the two splits is missing.
    """
    if path.is_file():
        if path.suffix != ".parquet" or not path.name.startswith("train"):
            raise DataError(
                f"{path} is not a train*.parquet file; a data set is a folder, or such a file with its "
                "test*.parquet beside it. Pass the folder."
            )
        return [path], _test_shards(path.parent)
    for folder in (path, path / "data"):
        if any(folder.glob("*.parquet")):
            train = sorted(folder.glob("train*.parquet"))
            if not train:
                raise DataError(
                    f"{folder} has parquet files but no train*.parquet; both splits are needed. Rename or "
                    "add the training file."
                )
            return train, _test_shards(folder)
    return None


def load_parquet(name: str, pair: _Pair, *, cache_dir: Path) -> DataSplit:
    """Decode both splits, or take them from `cache_dir`.

    Images become RGB, and are resized to the size of the first training image unless they have it.

    Args:
        name: of the data set, for messages.
        pair: training and test shards, as `find_parquet_pair` returns them.
        cache_dir: where decoded images are kept, by path, size and time of change of each shard.

    Raises:
        DataError: where a file, a column, a record or an image cannot be used.
    """
    train, test = ([ParquetShard(path) for path in paths] for paths in pair)
    class_names = train[0].class_names or tuple(
        str(label) for label in range(1 + max(int(shard.labels.max()) for shard in train))
    )
    for shard in (*train, *test):
        shard.check_labels(class_names)
    size = train[0].first_image_size()
    datasets = []
    for split, shards in (("train", train), ("test", test)):
        datasets.append(
            ImageDataset(
                name=f"{name} {split}",
                images=torch.from_numpy(np.concatenate([shard.images(size, cache_dir) for shard in shards])),
                labels=torch.from_numpy(np.concatenate([shard.labels for shard in shards])),
                class_names=class_names,
            )
        )
    return DataSplit.normalised_by_train(*datasets)


def _test_shards(folder: Path) -> list[Path]:
    for name in _TEST_NAMES:
        shards = sorted(folder.glob(f"{name}*.parquet"))
        if shards:
            return shards
    raise DataError(
        f"{folder} has no {' or '.join(f'{name}*.parquet' for name in _TEST_NAMES)}; both splits are needed. "
        "Put the test file beside the training file."
    )
