"""The plain model out of a checkpoint."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file

from stalewise.checkpoint.folder import verify
from stalewise.checkpoint.stage_file import read_model
from stalewise.errors import SaveError

__all__ = ["export_model"]


def export_model(path: Path, out: Path) -> int:
    """Write parameters and persistent buffers of all stages into one file.

    Args:
        path: of one checkpoint.
        out: file to write; it is there whole or not at all.

    Returns:
        How many tensors there are.

    Raises:
        CheckpointError: where the checkpoint is damaged.
        SaveError: where the file cannot be written.
    """
    manifest = verify(path)
    model = {name: value for stage in range(manifest.num_stages) for name, value in read_model(path, stage).items()}
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        save_file(model, temporary)
        os.replace(temporary, out)
    except (OSError, SafetensorError) as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise SaveError(f"cannot write {out}: {error}. Choose another file.") from None
    return len(model)
