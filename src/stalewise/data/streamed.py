"""Images that stay in their files until a batch needs them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stalewise.data.crops import centre_box, random_box
from stalewise.data.decode import decode_box
from stalewise.data.samples import Samples
from stalewise.errors import DataError

__all__ = ["FileNames", "StreamedImages"]


class FileNames(Sequence[str]):
    """Many names in one array of bytes.

    A list of a million strings is copied page by page into every loader process, because reading a string writes
    its reference count; an array is shared.
    """

    def __init__(self, names: Sequence[str]) -> None:
        encoded = [name.encode("utf-8", "surrogateescape") for name in names]
        self._ends: NDArray[np.int64] = np.cumsum([len(name) for name in encoded], dtype=np.int64)
        self._bytes = np.frombuffer(b"".join(encoded), dtype=np.uint8)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index):  # type: ignore[no-untyped-def]
        if isinstance(index, slice):
            return [self[position] for position in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"there is no name {index} among {len(self)}")
        position = index % len(self)
        start = int(self._ends[position - 1]) if position else 0
        return self._bytes[start : int(self._ends[position])].tobytes().decode("utf-8", "surrogateescape")


@dataclass(frozen=True, kw_only=True, eq=False)
class StreamedImages(Samples):
    """Image files and labels of one split.

    Args:
        name: for messages and logs.
        root: that the names of the files are relative to.
        files: one per sample.
        labels: int64 [N].
        class_names: one name per class.
        size: height and width of the images in a batch.
        flip: whether a mirrored image still shows its class.
    """

    name: str
    root: Path
    files: Sequence[str]
    labels: Tensor
    class_names: tuple[str, ...]
    size: int
    flip: bool = True

    @property
    def image_shape(self) -> tuple[int, ...]:
        """(3, size, size)."""
        return 3, self.size, self.size

    def take(self, indices: Tensor, *, seed: int, epoch: int, augmented: bool) -> Tensor:
        """Decode, crop and resample some images; see `Samples` and `stalewise.data.crops`.

        Raises:
            DataError: where a file cannot be read or decoded; the message names it.
        """
        images = np.empty((len(indices), *self.image_shape), dtype=np.uint8)
        for position, index in enumerate(indices.tolist()):
            images[position] = self._image(index, seed=seed, epoch=epoch, augmented=augmented)
        return torch.from_numpy(images)

    def first(self, limit: int | None) -> StreamedImages:
        """See `Samples`."""
        if limit is None:
            return self
        self._check_limit(limit)
        return replace(self, files=FileNames(self.files[:limit]), labels=self.labels[:limit])

    def flipping(self, flip: bool) -> StreamedImages:
        """See `Samples`."""
        return replace(self, flip=flip)

    def _image(self, index: int, *, seed: int, epoch: int, augmented: bool) -> NDArray[np.uint8]:
        file = self.root / self.files[index]
        try:
            encoded = file.read_bytes()
        except OSError as error:
            raise DataError(f"{file} cannot be read: {error}. Check its permissions and the disk.") from error
        mirrored = False

        def box(width: int, height: int) -> tuple[float, float, float, float]:
            nonlocal mirrored
            if not augmented:
                return centre_box(width, height)
            found, mirrored = random_box(width, height, index, seed=seed, epoch=epoch)
            return found

        image = decode_box(encoded, str(file), box, self.size)
        return image[:, :, ::-1] if mirrored and self.flip else image
