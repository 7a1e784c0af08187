"""The folder that a run leaves behind.

config.json        the `TrainConfig`                     environment.json   versions, hardware, command
partition.json     the cuts, and what was measured       metrics.jsonl      a JSON object per batch and epoch
summary.json       the result                            model.safetensors  the unsplit model, original names
timeline/          every action of every stage (.npz)    trace.json         the same for Perfetto
nonfinite/         the batch whose loss was not finite, where that stopped the run
report.html        all of it for people                 checkpoints/       to resume from, with `--checkpoint-every`
order/             what elastic stages chose (.txt)
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from stalewise.errors import ConfigError
from stalewise.experiments.run_lock import empty_folder, is_empty
from stalewise.protocol.trace import Trace

__all__ = ["RunWriter", "prepare_run_folder"]


def prepare_run_folder(path: Path, *, overwrite: bool, mark: str = "config.json") -> None:
    """Make an empty folder at `path`, but for the lock of the run that is about to begin.

    Args:
        path: where.
        overwrite: delete what is there, if it holds `mark`.
        mark: file by which a folder is known to be ours.

    Raises:
        ConfigError: where something is there already and `overwrite` is off, or the folder cannot be written.
    """
    try:
        if not is_empty(path):
            if not overwrite:
                raise ConfigError(
                    f"{path} is not empty; a run keeps its folder to itself. Choose another --out, or give "
                    "--overwrite to delete what is there."
                )
            if not path.is_dir() or not (path / mark).is_file():
                raise ConfigError(
                    f"{path} is not such a folder (it has no {mark}), so --overwrite does not delete it. "
                    "Choose another --out, or delete it yourself."
                )
            empty_folder(path)
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot write to {path}: {error.strerror}. Choose another --out.") from None


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that the file is there whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    temporary.replace(path)


def write_timeline(path: Path, traces: list[Trace]) -> None:
    """Write one file of columns per stage."""
    folder = path / "timeline"
    folder.mkdir(parents=True, exist_ok=True)
    for trace in traces:
        columns = {name: np.array(values, dtype=np.int64) for name, values in trace.columns().items()}
        np.savez(folder / f"stage{trace.stage}.npz", **columns)  # type: ignore[arg-type]


class RunWriter:
    """Appends to `metrics.jsonl`.

    Args:
        path: the run folder.
        beginning: what the file begins with, where a run is resumed.
    """

    def __init__(self, path: Path, beginning: bytes = b"") -> None:
        self.path = path
        self._metrics = (path / "metrics.jsonl").open("wb")
        self._metrics.write(beginning)

    def __enter__(self) -> RunWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._metrics.close()

    def add(self, record: dict[str, Any]) -> None:
        """Append one record."""
        self._metrics.write(json.dumps(record).encode() + b"\n")

    def flush(self) -> int:
        """Bring what was added to the file; its size in bytes."""
        self._metrics.flush()
        return self._metrics.tell()
