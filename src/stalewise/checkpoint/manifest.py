"""The table of contents of a checkpoint: what it is of, where the run stood, and every file with its checksum.

`manifest.json` carries a checksum of itself. It is written last, so a folder without one is not a checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from stalewise.errors import CheckpointError

__all__ = ["FORMAT", "MANIFEST", "FileRecord", "Manifest", "file_checksum"]

FORMAT = 2
MANIFEST = "manifest.json"
_FILE_NAME = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*")


@dataclass(frozen=True, kw_only=True)
class FileRecord:
    """One file of a checkpoint.

    Args:
        size: in bytes.
        sha256: of its content, in hexadecimal.
    """

    size: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """See the module.

    Args:
        stalewise: version that wrote it.
        created: date and time, ISO 8601.
        num_stages: K.
        cuts: indices of the first layers of stages 1 .. K-1.
        layers: names of the model's layers.
        method: (name, options) by which it can be built; None for a method of the user's own.
        method_text: how the method prints.
        seed: of the random layers.
        settings: other options of the pipeline that change numbers: "autocast", "clip_grad_norm",
            "compile".
        environment: what rounding may depend on: "torch" (its version), "threads".
        cut: where the run stood; fields of `engine.Cut`.
        data: "none" (between sessions), "state" (the iterable's own state is kept), "position" (only how many batches
            were taken is known).
        extra: the caller's own record, JSON.
        stopped_s: how long each stage was held up, in seconds.
        files: by name.
    """

    stalewise: str
    created: str
    num_stages: int
    cuts: list[int]
    layers: list[str]
    method: list[Any] | None
    method_text: str
    seed: int
    settings: dict[str, Any]
    environment: dict[str, Any]
    cut: dict[str, Any]
    data: str
    extra: Any
    stopped_s: list[float]
    files: dict[str, FileRecord]

    @property
    def num_batches(self) -> int:
        """Batches that entered the pipeline."""
        return int(self.cut["first_batch"]) + int(self.cut["entered"])

    def text(self) -> str:
        """The content of the file."""
        return _text({"format": FORMAT, **asdict(self)})

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Read a checkpoint's.

        Raises:
            CheckpointError: where it is missing, damaged or of another version; the message begins with the file.
        """
        path = folder / MANIFEST
        try:
            text = path.read_text(encoding="utf-8")
            content = json.loads(text)
            claimed = content.pop("checksum")
            version = content.pop("format")
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror or error}.") from None
        except (ValueError, AttributeError, KeyError, RecursionError) as error:
            raise CheckpointError(f"{path} is damaged: it is not the JSON that was written ({error!r}).") from None
        if version != FORMAT:
            raise CheckpointError(
                f"{path} is of format {version!r}, and this release reads format {FORMAT}; use the release that wrote "
                f"it ({content.get('stalewise', 'unknown')})."
            )
        # A changed digit may give the same number, and a space nothing at all: the text itself has to be right, too.
        content = {"format": version, **content}
        if claimed != _checksum(content) or text != _text(content):
            raise CheckpointError(f"{path} is damaged: its checksum is wrong.")
        content.pop("format")
        return cls._checked(path, content)

    @classmethod
    def _checked(cls, path: Path, content: Mapping[str, Any]) -> Manifest:
        try:
            files = {str(name): FileRecord(**record) for name, record in content["files"].items()}
            names = {entry.name for entry in fields(cls)}
            if set(content) != names or not all(_FILE_NAME.fullmatch(name) for name in files):
                raise ValueError("other entries than this release writes")
            manifest = cls(**{**content, "files": files})
            if set(manifest.settings) != {"autocast", "clip_grad_norm", "compile"}:
                raise ValueError(f"settings {manifest.settings}")
            if len(manifest.cuts) != manifest.num_stages - 1:
                raise ValueError(f"cuts {manifest.cuts} for {manifest.num_stages} stages")
            for number in (manifest.num_stages, manifest.num_batches, manifest.seed, *manifest.cuts):
                if not isinstance(number, int):
                    raise ValueError(f"{number!r} where a whole number is due")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"{path} is not a manifest of this release: {error}.") from None
        return manifest


def file_checksum(path: Path) -> FileRecord:
    """Size and checksum of a file as it is now."""
    digest = hashlib.sha256()
    size = 0
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
            size += len(chunk)
    return FileRecord(size=size, sha256=digest.hexdigest())


def _text(content: Mapping[str, Any]) -> str:
    return json.dumps({**content, "checksum": _checksum(content)}, indent=1)


def _checksum(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
