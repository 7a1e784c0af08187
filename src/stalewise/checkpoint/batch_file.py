"""A batch as files, to be looked at later: `batch-12.json` with its tensors beside it in `batch-12.safetensors`."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from stalewise.checkpoint.codec import Packer, unpack
from stalewise.errors import CheckpointError, ConfigError, SaveError

__all__ = ["read_batch", "write_batch"]

_FORMAT = "stalewise batch 1"


def write_batch(folder: Path, batch: int, value: tuple[Any, Any], *, loss: float, stage: int) -> Path:
    """Write a batch so that its JSON is there whole or not at all.

    Args:
        folder: made where it is missing.
        batch: its global index.
        value: (input, target) as trees of tensors.
        loss: that it gave.
        stage: that computed the loss.

    Returns:
        The JSON file.

    Raises:
        SaveError: where it cannot be written.
    """
    path = folder / f"batch-{batch}.json"
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    packer = Packer()
    try:
        packed = packer.pack(value, "the batch")
        record = {"format": _FORMAT, "batch": batch, "stage": stage, "loss": repr(loss), "value": packed}
        folder.mkdir(parents=True, exist_ok=True)
        save_file(packer.tensors, path.with_suffix(".safetensors"))
        temporary.write_text(json.dumps(record) + "\n", encoding="utf-8")
        os.replace(temporary, path)
    except (OSError, SafetensorError, ConfigError) as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise SaveError(f"cannot write {path}: {error}. Make room, or choose another folder.") from None
    return path


def read_batch(path: str | Path) -> tuple[Any, Any]:
    """(input, target) of a batch that was saved because its loss was not finite; on the CPU.

    Args:
        path: of the JSON file.

    Raises:
        CheckpointError: where it is not such a file, or damaged.
    """
    path = Path(path)
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["format"] != _FORMAT:
            raise ValueError(f"its format is {record['format']!r}, not {_FORMAT!r}")
        tensors = load_file(path.with_suffix(".safetensors"))
        inputs, target = unpack(record["value"], tensors, device=torch.device("cpu"))
    except (OSError, SafetensorError, LookupError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"{path} is not a saved batch, or damaged: {error}. Give a batch-N.json beside its .safetensors."
        ) from None
    return inputs, target
