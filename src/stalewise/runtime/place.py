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

_PAGE = struct.Struct("<qqq32s")
"""What goes on, its batch, the last batch before one without, and a name."""
_START = struct.Struct("<qq")
_NOTHING, _NAMED, _FIRST_KIND = 0, 1, 2
_NO_BATCH = -1
_EMPTY = _PAGE.pack(_NOTHING, _NO_BATCH, _NO_BATCH, b"")
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
            file.write(_EMPTY)
            file.flush()
            self._page = mmap.mmap(file.fileno(), _PAGE.size)

    def at(self, kind: Kind, batch: int) -> None:
        """This action of the program begins."""
        if self._page is not None:
            _START.pack_into(self._page, 0, _FIRST_KIND + KIND_CODES.index(kind), batch)

    def enter(self, action: str | None, batch: int | None) -> None:
        """What this is called begins; None: it is not known yet what, but soon to be."""
        if self._page is not None and action is not None:
            of_batch = _NO_BATCH if batch is None else batch
            _PAGE.pack_into(self._page, 0, _NAMED, of_batch, self._last_batch(self._page), action.encode())

    def leave(self) -> None:
        """Code of the user goes on; which batch was the last stays known."""
        if self._page is not None:
            _START.pack_into(self._page, 0, _NOTHING, self._last_batch(self._page))

    def _last_batch(self, page: mmap.mmap) -> int:
        _, batch, before, _ = _PAGE.unpack_from(page)
        return int(before if batch == _NO_BATCH else batch)


def last_place(folder: Path, rank: int) -> tuple[str | None, int | None] | None:
    """What a worker did when it ended, in words, and the batch; no words: between two actions, after that batch.

    None where it has begun nothing, or that is unknown.
    """
    with suppress(OSError, struct.error, IndexError, UnicodeDecodeError):
        code, batch, _, name = _PAGE.unpack(_file(folder, rank).read_bytes())
        of_batch = batch if batch >= 0 else None
        if code == _NAMED:
            return name.rstrip(b"\0").decode(), of_batch
        if code >= _FIRST_KIND:
            return KIND_CODES[code - _FIRST_KIND].name.lower().replace("_", " "), of_batch
        if code == _NOTHING and of_batch is not None:
            return None, of_batch
    return None


def _file(folder: Path, rank: int) -> Path:
    return folder / f"place.{rank}"
