"""Encoded images (PNG, JPEG, ...) to one array of bytes, with every fault traced to its record."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from stalewise.errors import DataError

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["MAX_PIXELS", "decode_box", "decode_images", "image_size"]

MAX_PIXELS = 4096 * 4096
"""Largest image that is decoded: a few kilobytes of a malicious file can claim to be billions of pixels."""
MAX_TOTAL_BYTES = 32 * 2**30
"""Largest decoded data set: it is held in memory as a whole."""

# No format that starts another program to be read (EPS) and none that nobody trains from.
_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
# Modes of eight bits per channel. The others hold values that a conversion to RGB would clip.
_MODES = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBX", "RGBa", "CMYK", "YCbCr")

# Measured with JPEGs, four threads against one: at 1 KB an image takes 114 us against 69 us, because taking
# turns at the interpreter costs more than decoding; at 5 KB both are equal; at 12 KB 213 us against 282 us.
_THREADING_PAYS_BYTES = 8192
_CHUNK = 64
_MAX_THREADS = 4


def image_size(encoded: bytes, where: str) -> tuple[int, int]:
    """Height and width of an encoded image.

    Raises:
        DataError: where it cannot be decoded; the message begins with `where`.
    """
    _, height, width = _decode(encoded, where, None).shape
    return height, width


def decode_images(
    encoded: Iterable[Sequence[bytes]], where: Callable[[int], str], *, count: int, size: tuple[int, int]
) -> NDArray[np.uint8]:
    """Decode images, as RGB, all resized to one size (bilinear, antialiased) unless they have it.

    Args:
        encoded: the images in groups that are held in memory one at a time.
        where: from the index of an image to the words that name it in a message.
        count: number of images in all groups.
        size: height and width of the result.

    Returns:
        uint8 [count, 3, height, width].

    Raises:
        DataError: where an image cannot be decoded, or all of them do not fit in memory.
    """
    height, width = size
    total_bytes = count * 3 * height * width
    if total_bytes > MAX_TOTAL_BYTES:
        raise DataError(
            f"{where(0)} and the others make {count} images of {height} x {width} pixels, "
            f"{total_bytes / 2**30:.0f} GiB; data sets are held in memory, up to "
            f"{MAX_TOTAL_BYTES / 2**30:.0f} GiB. Store them smaller; the first image gives the size of all."
        )
    images = np.empty((count, 3, height, width), dtype=np.uint8)

    def fill(start: int, chunk: Sequence[bytes]) -> None:
        for index, item in enumerate(chunk, start):
            images[index] = _decode(item, where(index), size)

    with ThreadPoolExecutor(min(_MAX_THREADS, os.cpu_count() or 1)) as pool:
        start = 0
        for group in encoded:
            chunks = list(_chunks(group, start))
            if sum(map(len, group)) < _THREADING_PAYS_BYTES * len(group):
                for first, chunk in chunks:
                    fill(first, chunk)
            else:
                # Results come in order, so of several faulty images the first is the one reported.
                list(pool.map(fill, *zip(*chunks, strict=True)))
            start += len(group)
    assert start == count, (start, count)
    return images


def _chunks(group: Sequence[bytes], start: int) -> Iterator[tuple[int, Sequence[bytes]]]:
    for offset in range(0, len(group), _CHUNK):
        yield start + offset, group[offset : offset + _CHUNK]


def decode_box(
    encoded: bytes, where: str, box: Callable[[int, int], tuple[float, float, float, float]], size: int
) -> NDArray[np.uint8]:
    """A part of one image as RGB, resampled to a square (bilinear, antialiased).

    Args:
        encoded: the image.
        where: names it in a message.
        box: from width and height of the whole image to the part: left, top, right, bottom in pixels.
        size: height and width of the result.

    Returns:
        uint8 [3, size, size].

    Raises:
        DataError: where it cannot be decoded; the message begins with `where`.
    """
    image = _opened(encoded, where)
    part = image.resize((size, size), _bilinear(), box=box(*image.size))
    return np.asarray(part).transpose(2, 0, 1)


def _decode(encoded: bytes, where: str, size: tuple[int, int] | None) -> NDArray[np.uint8]:
    """One image as uint8 [3, H, W]."""
    decoded = _opened(encoded, where)
    if size is not None and decoded.size != (size[1], size[0]):
        decoded = decoded.resize((size[1], size[0]), _bilinear())
    return np.asarray(decoded).transpose(2, 0, 1)


def _bilinear() -> Image.Resampling:
    from PIL import Image

    return Image.Resampling.BILINEAR


def _opened(encoded: bytes, where: str) -> Image.Image:
    """One image as RGB."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(encoded), formats=_FORMATS) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise Image.DecompressionBombError(f"{width} x {height} pixels, more than {MAX_PIXELS}")
            if image.mode not in _MODES:
                raise ValueError(f"mode {image.mode}, which has more than 8 bits per channel or no RGB colours")
            # A palette with transparency goes through RGBA: Pillow warns of the direct way.
            indirect = image.mode == "P" and "transparency" in image.info
            return (image.convert("RGBA") if indirect else image).convert("RGB")
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DataError(
            f"{where} is too large to be decoded safely: {error}. Store it with at most {MAX_PIXELS} pixels."
        ) from error
    except Exception as error:
        # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error, ... for damaged files.
        raise DataError(
            f"{where} cannot be decoded ({len(encoded)} bytes): {error}. An image must be a whole 8-bit "
            f"{', '.join(_FORMATS)} file; replace it or leave it out."
        ) from error
