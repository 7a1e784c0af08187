"""One parquet file of encoded images and labels, with every fault traced to its record.

    column img or image           struct with a field `bytes`, or binary: an encoded image
    column label or fine_label    integers from 0

Decoded images are kept in the cache folder, since decoding takes many times longer than reading them back.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stalewise.data.cache import load_array, source_key, store_array
from stalewise.data.decode import decode_images, image_size
from stalewise.errors import DataError

__all__ = ["ParquetShard"]

_IMAGE_COLUMNS = ("img", "image")
_LABEL_COLUMNS = ("label", "fine_label")
_ROWS_AT_ONCE = 1024
MAX_CLASSES = 1_000_000
"""Every class has a name; a label far beyond is damage, and would take all memory."""

_CACHE_VERSION = 1
"""Part of the key of decoded images; raised whenever decoding changes what it yields."""


class ParquetShard:
    """The columns of one file found and its labels read; images are decoded on demand.

    Args:
        path: of the file.

    Attributes:
        labels: int64 [N], each at least 0.
        class_names: as the file itself names them, or None.

    Raises:
        DataError: where the file cannot be read, or has no such columns, or no rows.
    """

    def __init__(self, path: Path) -> None:
        import pyarrow.parquet as pq

        self._path = path
        with self._readable(), pq.ParquetFile(path) as file:
            schema = file.schema_arrow
            self._rows: int = file.metadata.num_rows
        if self._rows == 0:
            raise DataError(f"{path} has no rows; a split needs at least one image. Replace the file.")
        self._image_column, self._in_struct = self._find_images(schema)
        self._label_column = self._find_labels(schema)
        self.labels: NDArray[np.int64] = self._read_labels()
        self.class_names = _class_names(schema.metadata or {}, self._label_column)

    def check_labels(self, class_names: tuple[str, ...]) -> None:
        """Raise `DataError` where the file names other classes, or at the first record whose label has no name."""
        if self.class_names not in (None, class_names):
            raise DataError(
                f"{self._path} names the classes {self.class_names}, and the training data {class_names}; a label "
                "must mean the same class in both. Label both splits alike."
            )
        num_classes = len(class_names)
        wrong = np.flatnonzero(self.labels >= num_classes)
        if len(wrong):
            raise DataError(
                f"{self._where(wrong[0])} has label {self.labels[wrong[0]]}; the training data have the "
                f"classes 0 .. {num_classes - 1}. Repair the label or leave the record out."
            )

    def first_image_size(self) -> tuple[int, int]:
        """Height and width of the first image."""
        return image_size(next(self._encoded(rows_at_once=1))[0], self._where(0))

    def images(self, size: tuple[int, int], cache_dir: Path) -> NDArray[np.uint8]:
        """All images as uint8 [N, 3, height, width], from the cache or decoded and then stored there.

        Raises:
            DataError: where an image cannot be read or decoded.
        """
        key = source_key(self._path, self._image_column, size, _CACHE_VERSION)
        stored = cache_dir / "decoded" / f"{self._path.stem}-{key}.npy"
        images = load_array(stored, (self._rows, 3, *size))
        if images is None:
            groups = self._encoded(rows_at_once=_ROWS_AT_ONCE)
            images = decode_images(groups, self._where, count=self._rows, size=size)
            store_array(stored, images)
        return images

    def _where(self, index: int) -> str:
        return f"{self._path} record {index}"

    @contextlib.contextmanager
    def _readable(self) -> Iterator[None]:
        """Turn what pyarrow raises for a damaged file into a `DataError`."""
        import pyarrow

        try:
            yield
        except (pyarrow.ArrowException, OSError) as error:
            raise DataError(
                f"{self._path} cannot be read: {error}. It must be a whole parquet file; download or copy it again."
            ) from error

    def _find_images(self, schema: Any) -> tuple[str, bool]:
        """Name of the image column, and whether the images are in a field `bytes` of it."""
        import pyarrow.types

        name = self._find(schema, _IMAGE_COLUMNS)
        kind = schema.field(name).type
        in_struct = pyarrow.types.is_struct(kind) and kind.get_field_index("bytes") >= 0
        stored = kind.field("bytes").type if in_struct else kind
        if not (pyarrow.types.is_binary(stored) or pyarrow.types.is_large_binary(stored)):
            raise DataError(
                f"column {name!r} of {self._path} is {kind}; images are binary, or a struct with a binary "
                "field 'bytes'. Store encoded images, such as PNG or JPEG."
            )
        return name, in_struct

    def _find_labels(self, schema: Any) -> str:
        import pyarrow.types

        name = self._find(schema, _LABEL_COLUMNS)
        kind = schema.field(name).type
        if not pyarrow.types.is_integer(kind):
            raise DataError(
                f"column {name!r} of {self._path} is {kind}; labels are integers from 0. Number the classes."
            )
        return name

    def _find(self, schema: Any, accepted: tuple[str, ...]) -> str:
        for name in accepted:
            if schema.get_field_index(name) >= 0:
                return name
        raise DataError(
            f"{self._path} has the columns {', '.join(schema.names)}, and no {' or '.join(accepted)}; an "
            "image set has one of each. Rename the column."
        )

    def _read_labels(self) -> NDArray[np.int64]:
        import pyarrow.parquet as pq

        with self._readable(), pq.ParquetFile(self._path) as file:
            column = file.read(columns=[self._label_column]).column(self._label_column)
        if column.null_count:
            index = column.is_null().to_pylist().index(True)
            raise DataError(f"{self._where(index)} has no label; every record needs one. Add it or drop the record.")
        labels: NDArray[np.int64] = column.to_numpy().astype(np.int64)
        negative = np.flatnonzero(labels < 0)
        if len(negative):
            raise DataError(
                f"{self._where(negative[0])} has label {labels[negative[0]]}; labels are integers from 0. "
                "Some image sets mark unlabelled records so: leave these out."
            )
        if labels.max() >= MAX_CLASSES:
            index = int(labels.argmax())
            raise DataError(
                f"{self._where(index)} has label {labels[index]}; labels count classes from 0, and at most "
                f"{MAX_CLASSES} are read. Repair the label, or number the classes without gaps."
            )
        return labels

    def _encoded(self, *, rows_at_once: int) -> Iterator[list[bytes]]:
        """The encoded images in groups of rows."""
        import pyarrow.compute as pc
        import pyarrow.parquet as pq

        index = 0
        with self._readable(), pq.ParquetFile(self._path) as file:
            for batch in file.iter_batches(batch_size=rows_at_once, columns=[self._image_column]):
                column = batch.column(0)
                group = (pc.struct_field(column, "bytes") if self._in_struct else column).to_pylist()
                for offset, item in enumerate(group):
                    if not item:
                        raise DataError(
                            f"{self._where(index + offset)} has no image bytes; images must be in the file "
                            "itself, not named by a path. Embed them, or leave the record out."
                        )
                yield group
                index += len(group)


def _class_names(metadata: dict[bytes, bytes], label_column: str) -> tuple[str, ...] | None:
    """The class names that the hub's libraries store beside the schema, or None where there are none."""
    try:
        names = json.loads(metadata[b"huggingface"])["info"]["features"][label_column]["names"]
    except (KeyError, ValueError, TypeError):
        return None
    usable = isinstance(names, list) and all(isinstance(name, str) for name in names)
    return tuple(names) if usable and names else None
