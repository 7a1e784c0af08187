"""What a worker is doing, for the process that launched it: exact to the last action, also after a SIGKILL.

    worker      what it begins ─► a page of a file in the launch's temporary folder
    launcher    once the worker is dead ─► the page, which the kernel has kept

Signs of life (`runtime.monitor`) say the same to other hosts, but twice a second.
"""

from __future__ import annotations

import mmap
import os
import struct
from contextlib import suppress
from pathlib import Path

from stalewise.protocol.actions import Kind
from stalewise.protocol.trace import KIND_CODES

__all__ = ["Place", "keep_places_in", "last_place"]

_PAGE = struct.Struct("<qq")
_NOWHERE = _PAGE.pack(0, 0)
_folder: Path | None = None


def keep_places_in(folder: Path) -> None:
    """Where the places of this process are kept from now on: the temporary folder of the launch that started it."""
    global _folder
    _folder = folder


class Place:
    """The page of this worker; without a launch to read it, or a disk to hold it, nothing is written.

    Args:
        rank: of this worker.
    """

    def __init__(self, rank: int) -> None:
        self._page: mmap.mmap | None = None
        if _folder is None:
            return
        with suppress(OSError), open(os.open(_file(_folder, rank), os.O_RDWR | os.O_CREAT, 0o600), "r+b") as file:
            # Written, not only made longer: a full disk refuses here, and not by a signal later.
            file.write(_NOWHERE)
            file.flush()
            self._page = mmap.mmap(file.fileno(), _PAGE.size)

    def at(self, kind: Kind, batch: int) -> None:
        """This action begins."""
        if self._page is not None:
            _PAGE.pack_into(self._page, 0, 1 + KIND_CODES.index(kind), batch)

    def leave(self) -> None:
        """No action goes on."""
        if self._page is not None:
            self._page[:] = _NOWHERE


def last_place(folder: Path, rank: int) -> tuple[str, int] | None:
    """The action in which a worker ended, in words, and its batch; None where it was in none, or that is unknown."""
    with suppress(OSError, struct.error, IndexError):
        code, batch = _PAGE.unpack(_file(folder, rank).read_bytes())
        if code > 0:
            return KIND_CODES[code - 1].name.lower().replace("_", " "), batch
    return None


def _file(folder: Path, rank: int) -> Path:
    return folder / f"place.{rank}"
