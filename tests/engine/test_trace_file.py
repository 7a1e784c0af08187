"""Records in files come back as they were; of too many the newest are kept; a full disk loses records, not the run."""

from __future__ import annotations

import tempfile
from array import array
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stalewise.engine.trace_file import TraceFile
from stalewise.protocol.trace import COLUMNS, Columns


def block(begin: int, count: int) -> Columns:
    return {name: array("q", range(begin + 1000 * n, begin + 1000 * n + count)) for n, name in enumerate(COLUMNS)}


@given(st.lists(st.integers(1, 7), max_size=20), st.integers(2, 30), st.booleans())
@settings(deadline=None, derandomize=True, max_examples=60)
def test_the_newest_records_come_back(counts: list[int], limit: int, look: bool) -> None:
    file = TraceFile(limit=limit)
    total = 0
    for count in counts:
        file.add(block(total, count))
        total += count
        if look:
            file.columns()
    assert len(file) + file.dropped == total
    assert len(file) >= min(total, limit // 2)
    assert len(file) <= max(limit, 14)
    for n, name in enumerate(COLUMNS):
        assert list(file.columns()[name]) == [1000 * n + i for i in range(file.dropped, total)]


def test_a_full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        def __init__(self, file: Any) -> None:
            self._file = file

        def __getattr__(self, name: str) -> Any:
            return getattr(self._file, name)

        def write(self, data: memoryview) -> int:
            if self._file.tell() >= 80:
                raise OSError(28, "No space left on device")
            return int(self._file.write(data))

    make = tempfile.TemporaryFile
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda **options: Full(make(**options)))
    file = TraceFile()
    file.add(block(0, 2))
    file.add(block(2, 3))
    assert (len(file), file.dropped) == (2, 3)
    assert list(file.columns()["kind"]) == [0, 1]
