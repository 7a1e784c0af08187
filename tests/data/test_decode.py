"""Decoding: the pixels, the size, and files that are damaged or malicious."""

import io
import struct
import threading
import zlib

import numpy as np
import pytest
from PIL import Image

from stalewise.data import decode
from stalewise.data.decode import decode_images, image_size
from stalewise.errors import DataError


def decode_all(encoded: list[bytes], size: tuple[int, int] = (8, 8)) -> np.ndarray:
    return decode_images([encoded], lambda index: f"record {index}", count=len(encoded), size=size)


def png_claiming(width: int, height: int) -> bytes:
    """A PNG of a few bytes whose header claims a size."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def test_pixels_come_back_channel_first(pixels, encode) -> None:
    values = [pixels(index) for index in range(5)]
    images = decode_all([encode(value) for value in values])
    assert images.dtype == np.uint8
    assert np.array_equal(images, np.stack(values).transpose(0, 3, 1, 2))


def test_groups_are_put_together_in_order(pixels, encode) -> None:
    encoded = [encode(pixels(index)) for index in range(7)]
    groups = [encoded[:3], encoded[3:4], encoded[4:]]
    images = decode_images(groups, str, count=7, size=(8, 8))
    assert np.array_equal(images, decode_all(encoded))


def test_large_files_are_decoded_by_threads_to_the_same_pixels(pixels, encode, monkeypatch) -> None:
    encoded = [encode(pixels(index, 64)) for index in range(200)]
    assert min(map(len, encoded)) > decode._THREADING_PAYS_BYTES
    seen = set()
    one = decode._decode

    def watched(*arguments):
        seen.add(threading.current_thread().name)
        return one(*arguments)

    monkeypatch.setattr(decode, "_decode", watched)
    images = decode_all(encoded, (64, 64))
    assert threading.current_thread().name not in seen
    assert np.array_equal(images[150], pixels(150, 64).transpose(2, 0, 1))


@pytest.mark.parametrize("side", [8, 64])
def test_the_first_of_several_faults_is_reported(pixels, encode, side: int) -> None:
    encoded = [encode(pixels(index, side)) for index in range(200)]
    encoded[150] = encoded[70] = encoded[70][:-30]
    with pytest.raises(DataError, match="record 70 cannot be decoded"):
        decode_all(encoded, (side, side))


def test_other_sizes_are_resized_bilinearly(encode) -> None:
    ramp = np.repeat(np.arange(0, 160, 10, dtype=np.uint8)[None, :, None], 16, axis=0).repeat(3, axis=2)
    image = decode_all([encode(ramp)], (8, 8))[0]
    assert image.shape == (3, 8, 8)
    # Halving a ramp of step 10 gives a ramp of step 20, from the mean of its first two columns.
    assert np.abs(image[0, 4, 1:-1].astype(int) - np.arange(25, 145, 20)).max() <= 1


def test_size_is_height_and_width(encode) -> None:
    assert image_size(encode(np.zeros((5, 9, 3), dtype=np.uint8)), "it") == (5, 9)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK"])
def test_eight_bit_modes_become_rgb(mode: str) -> None:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (255, 255, 255)).convert(mode).save(file, "TIFF" if mode == "CMYK" else "PNG")
    assert (decode_all([file.getvalue()]) == 255).all()


def test_a_transparent_palette_raises_no_warning() -> None:
    file = io.BytesIO()
    image = Image.new("P", (8, 8), 1)
    image.putpalette([0, 0, 0, 10, 20, 30])
    image.save(file, "PNG", transparency=bytes([0, 128]))
    assert decode_all([file.getvalue()])[0, :, 0, 0].tolist() == [10, 20, 30]


def test_sixteen_bits_are_refused_rather_than_clipped(encode) -> None:
    with pytest.raises(DataError, match=r"record 0 cannot be decoded.*mode I;16"):
        decode_all([encode(np.full((8, 8), 4000, dtype=np.uint16))])


@pytest.mark.parametrize(
    ("kind", "cut"), [("PNG", 40), ("PNG", 8), ("JPEG", 200), ("JPEG", 3), ("GIF", 30), ("BMP", 60)]
)
def test_truncated_images_name_the_record(pixels, encode, kind: str, cut: int) -> None:
    encoded = [encode(pixels(index), kind) for index in range(5)]
    encoded[3] = encoded[3][:cut]
    with pytest.raises(DataError, match=f"record 3 cannot be decoded \\({cut} bytes\\).*replace it"):
        decode_all(encoded)


@pytest.mark.parametrize("content", [b"", b"no image", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n"])
def test_other_content_is_refused(content: bytes) -> None:
    with pytest.raises(DataError, match="record 0 cannot be decoded"):
        decode_all([content])


def test_formats_that_nobody_trains_from_are_not_even_tried(pixels, encode) -> None:
    with pytest.raises(DataError, match="record 0 cannot be decoded"):
        decode_all([encode(pixels(0), "PCX")])


@pytest.mark.parametrize("side", [5000, 60_000])
def test_a_small_file_cannot_claim_a_huge_image(side: int) -> None:
    with pytest.raises(DataError, match="record 0 is too large to be decoded safely"):
        decode_all([png_claiming(side, side)])
    with pytest.raises(DataError, match="it is too large"):
        image_size(png_claiming(side, side), "it")


def test_a_data_set_beyond_memory_is_refused_before_decoding() -> None:
    with pytest.raises(DataError, match="record 0 and the others make 1000000 images of 1000 x 2000"):
        decode_images([], lambda index: f"record {index}", count=10**6, size=(1000, 2000))
