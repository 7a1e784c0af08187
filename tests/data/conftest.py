"""Small data sets in every layout, made on the spot."""

import io
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from stalewise.data.cifar import CIFAR10, CifarLayout


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder, in force for the test."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("STALEWISE_CACHE", str(folder))
    return folder


def _pixels(index: int, side: int = 8) -> np.ndarray:
    return np.random.default_rng(index).integers(0, 256, (side, side, 3), dtype=np.uint8)


@pytest.fixture(scope="session")
def pixels() -> Callable[..., np.ndarray]:
    """uint8 [side, side, 3] of image number `index`."""
    return _pixels


@pytest.fixture(scope="session")
def encode() -> Callable[..., bytes]:
    """Pixels to the bytes of an image file."""

    def encode(values: np.ndarray, kind: str = "PNG", **options: object) -> bytes:
        file = io.BytesIO()
        Image.fromarray(values).save(file, kind, **options)
        return file.getvalue()

    return encode


@pytest.fixture
def write_parquet(encode) -> Callable[..., list[bytes]]:
    """Writes images 0 .. count-1 with labels index % 3; returns the encoded images."""

    def write(path: Path, count: int = 12, *, kind: str = "PNG", damage: dict[int, bytes | None] | None = None):
        encoded: list[bytes | None] = [encode(_pixels(index), kind) for index in range(count)]
        for index, content in (damage or {}).items():
            encoded[index] = content
        rows = [{"bytes": content, "path": f"{index}.png"} for index, content in enumerate(encoded)]
        image_type = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        labels = [index % 3 for index in range(count)]
        pq.write_table(pa.table({"img": pa.array(rows, image_type), "label": pa.array(labels, pa.int64())}), path)
        return encoded

    return write


@pytest.fixture(scope="session")
def small_cifar() -> CifarLayout:
    """CIFAR-10's layout with 6 + 6 training and 4 test records; its archive has no fixed checksum."""
    return replace(
        CIFAR10, train_files={"data_batch_1.bin": 6, "data_batch_2.bin": 6}, test_files={"test_batch.bin": 4}
    )


@pytest.fixture(scope="session")
def cifar_records() -> Callable[[CifarLayout], dict[str, bytes]]:
    """The content of each file of a layout; the label of record i of a file is i, after i + 50 if there are two."""

    def records(layout: CifarLayout) -> dict[str, bytes]:
        contents, serial = {}, 0
        for name, count in layout.files.items():
            parts = []
            for index in range(count):
                heading = bytes([index + 50, index]) if layout.label_bytes == 2 else bytes([index])
                parts.append(heading + np.random.default_rng(serial).bytes(3072))
                serial += 1
            contents[name] = b"".join(parts)
        return contents

    return records


@pytest.fixture(scope="session")
def write_archive() -> Callable[..., Path]:
    """Packs files into a .tar.gz; a value that is a TarInfo goes in as it is."""

    def write(path: Path, members: dict[str, bytes | tarfile.TarInfo]) -> Path:
        with tarfile.open(path, "w:gz") as archive:
            for name, content in members.items():
                if isinstance(content, tarfile.TarInfo):
                    archive.addfile(content)
                    continue
                info = tarfile.TarInfo(name)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
        return path

    return write
