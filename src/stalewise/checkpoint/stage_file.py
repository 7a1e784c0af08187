"""The part of one stage in a checkpoint: `stage0.safetensors` with every tensor, `stage0.json` with the rest.

Parameters and persistent buffers are in the first under `model.` and the name that they have in the unsplit model, in
their own shape, so that any program can read them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from stalewise.checkpoint.codec import Packer, contiguous_copy, unpack
from stalewise.checkpoint.manifest import FileRecord, file_checksum
from stalewise.errors import CheckpointError

__all__ = ["StagePart", "read_model", "read_stage", "stage_files", "stage_records"]

_MODEL = "model."


def stage_files(stage: int) -> tuple[str, str]:
    """Names of the files of a stage: tensors, values."""
    return f"stage{stage}.safetensors", f"stage{stage}.json"


class StagePart:
    """What a stage puts into a checkpoint; copied when it is made.

    Args:
        stage: its index.
        snapshot: its state between two local steps, whose entry "stage" has the entry "model".
    """

    def __init__(self, stage: int, snapshot: Mapping[str, Any]) -> None:
        own = dict(snapshot["stage"])
        self.stage = stage
        self._packer = Packer()
        self._model = {_MODEL + name: contiguous_copy(value) for name, value in own.pop("model").items()}
        self._value = self._packer.pack({**snapshot, "stage": own}, f"stage {stage}")
        self._messages: Any = None
        self.stopped_s = 0.0

    def add_messages(self, messages: Mapping[str, Any]) -> None:
        """What lay on the links to the stage; completes the part."""
        self._messages = self._packer.pack(messages, f"messages to stage {self.stage}")

    def write(self, folder: Path) -> None:
        """Write both files; the second one appears when both are whole.

        Raises:
            OSError: where the system does not take them.
        """
        tensors, values = stage_files(self.stage)
        try:
            save_file({**self._model, **self._packer.tensors}, folder / tensors)
        except SafetensorError as error:
            raise OSError(str(error)) from error
        content = {
            "value": self._value,
            "messages": self._messages,
            "stopped_s": self.stopped_s,
            "tensors": vars(file_checksum(folder / tensors)),
        }
        temporary = folder / f"{values}.tmp"
        temporary.write_text(json.dumps(content), encoding="utf-8")
        os.replace(temporary, folder / values)


def stage_records(folder: Path, stage: int) -> tuple[dict[str, FileRecord], float] | None:
    """The files of a stage for the manifest, and how long it was held up; None while they are being written."""
    tensors, values = stage_files(stage)
    try:
        content = json.loads((folder / values).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    records = {tensors: FileRecord(**content["tensors"]), values: file_checksum(folder / values)}
    return records, float(content["stopped_s"])


def read_stage(folder: Path, stage: int, *, device: torch.device) -> dict[str, Any]:
    """The snapshot of a stage, with its messages, after `verify`.

    Raises:
        CheckpointError: where the files are not of this form.
    """
    tensors_name, values_name = stage_files(stage)
    tensors = _load(folder / tensors_name)
    try:
        content = json.loads((folder / values_name).read_text(encoding="utf-8"))
        snapshot = unpack(content["value"], tensors, device=device)
        snapshot["messages"] = unpack(content["messages"], tensors, device=device)
        snapshot["stage"]["model"] = _model_of(tensors)
    except CheckpointError as error:
        raise CheckpointError(f"{folder / values_name} is malformed: {error}") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{folder / values_name} is malformed ({type(error).__name__}: {error}).") from None
    return dict(snapshot)


def read_model(folder: Path, stage: int) -> dict[str, Tensor]:
    """Parameters and persistent buffers of a stage, by the names of the unsplit model."""
    return _model_of(_load(folder / stage_files(stage)[0]))


def _load(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}.") from None


def _model_of(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(_MODEL): value for name, value in tensors.items() if name.startswith(_MODEL)}
