"""The cache folder: downloads, and decoded images that are slow to make again."""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
import warnings
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

__all__ = ["default_cache_dir", "load_array", "source_key", "store_array"]


def default_cache_dir() -> Path:
    """`$STALEWISE_CACHE` as it is now, or `~/.cache/stalewise`."""
    configured = os.environ.get("STALEWISE_CACHE")
    return Path(configured).expanduser() if configured else Path.home() / ".cache" / "stalewise"


def source_key(source: Path, *details: object) -> str:
    """A file-system safe key of a file as it is now, by path, size and time of change, and of `details`."""
    status = source.stat()
    text = repr((str(source.resolve()), status.st_size, status.st_mtime_ns, *details))
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def load_array(path: Path, shape: tuple[int, ...]) -> NDArray[np.uint8] | None:
    """The uint8 array stored at `path`, or None where it is missing, damaged, or not of that shape."""
    try:
        array = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    usable = isinstance(array, np.ndarray) and array.dtype == np.uint8 and array.shape == shape
    return array if usable else None


def store_array(path: Path, array: NDArray[np.uint8]) -> None:
    """Store `array` at `path` so that a reader sees all of it or nothing; a failure is only a warning."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".tmp")
        try:
            with os.fdopen(handle, "wb") as file:
                np.save(file, array, allow_pickle=False)
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
    except OSError as error:
        warnings.warn(
            f"decoded images cannot be stored in {path.parent} ({error}); the next load decodes them again. "
            "Set STALEWISE_CACHE to a folder that can be written.",
            RuntimeWarning,
            stacklevel=2,
        )
