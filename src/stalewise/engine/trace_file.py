"""Trace records in unnamed temporary files, so that a long run does not fill the memory.

Two files take turns: when one holds half of what is kept, the other is emptied and goes on. So the newest records are
there, at least half of the limit, and at most the limit; of a run that is shorter, all.
"""

from __future__ import annotations

import tempfile
import weakref
from array import array
from typing import BinaryIO

from stalewise.protocol.trace import COLUMNS, Columns

__all__ = ["TraceFile"]


class TraceFile:
    """Keeps the records of one stage; see `protocol.trace.TraceStore`.

    The files are made when the first records come, in the folder for temporary files, and are gone with the process.
    Records that the disk does not take are dropped: a run does not end for them.

    Args:
        limit: records kept, 32 bytes each.
    """

    def __init__(self, *, limit: int = 4_000_000) -> None:
        self._half = limit // 2
        self._files: list[BinaryIO] = []
        self._counts = [0, 0]
        self._blocks: list[list[int]] = [[], []]
        self._current = 0
        self._dropped = 0

    @property
    def dropped(self) -> int:
        """Records that were kept once and are not any more."""
        return self._dropped

    def __len__(self) -> int:
        return sum(self._counts)

    def add(self, columns: Columns) -> None:
        """Keep these, after those before."""
        count = len(columns[COLUMNS[0]])
        if self._counts[self._current] and self._counts[self._current] + count > self._half:
            self._turn()
        try:
            if not self._files:
                self._files = [tempfile.TemporaryFile(buffering=0) for _ in range(2)]  # noqa: SIM115
                for file in self._files:
                    weakref.finalize(self, file.close)
            file = self._files[self._current]
            file.seek(8 * len(COLUMNS) * self._counts[self._current])
            for name in COLUMNS:
                data = memoryview(columns[name]).cast("B")
                while data:
                    data = data[file.write(data) :]
        except OSError:
            self._dropped += count
            return
        self._counts[self._current] += count
        self._blocks[self._current].append(count)

    def columns(self) -> dict[str, array[int]]:
        """All that are kept."""
        found: dict[str, array[int]] = {name: array("q") for name in COLUMNS}
        if not self._files:
            return found
        for place in (1 - self._current, self._current):
            file = self._files[place]
            file.seek(0)
            for count in self._blocks[place]:
                for name in COLUMNS:
                    found[name].frombytes(_read(file, 8 * count))
        return found

    def _turn(self) -> None:
        self._current = 1 - self._current
        self._dropped += self._counts[self._current]
        self._counts[self._current] = 0
        self._blocks[self._current] = []
        file = self._files[self._current]
        file.seek(0)
        file.truncate()


def _read(file: BinaryIO, size: int) -> bytes:
    parts: list[bytes] = []
    while size and (part := file.read(size)):
        parts.append(part)
        size -= len(part)
    return b"".join(parts)
