"""A folder of checkpoints, each of which appears whole or not at all.

    checkpoints/
      .lock                            held by the run that writes here
      .partial-9f3c11d2-4/             being written: a part per stage, then the manifest, then one rename
      ckpt-000003-batch-1200/          manifest.json  stage0.safetensors  stage0.json  ..
      ckpt-000004-batch-1600/

The first number grows with every checkpoint, so the newest one has the largest.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import time
from pathlib import Path

from stalewise.checkpoint.manifest import MANIFEST, Manifest, file_checksum
from stalewise.errors import CheckpointError, ConfigError

__all__ = ["complete_checkpoints", "find_checkpoint", "lock", "prune", "publish", "set_aside", "sweep", "verify"]

LOCK_WAIT_S = 10.0
"""For the processes of a run that was killed to be gone."""

_locked: dict[Path, int] = {}
"""Folders that this process keeps to itself, with the open file that holds the lock."""

_NAME = re.compile(r"ckpt-(\d{6,})-batch-(\d+)")


def complete_checkpoints(directory: Path) -> list[Path]:
    """The checkpoints of a folder, the newest first; those that are damaged too, those half-written not."""
    if not directory.is_dir():
        return []
    found = [path for path in directory.iterdir() if _NAME.fullmatch(path.name) and (path / MANIFEST).is_file()]
    return sorted(found, key=_number, reverse=True)


def find_checkpoint(path: Path) -> Path:
    """The checkpoint that a user means: this one, or the newest in this folder or in this run.

    Raises:
        CheckpointError: where there is none.
    """
    if (path / MANIFEST).is_file():
        return path
    for directory in (path, path / "checkpoints"):
        if found := complete_checkpoints(directory):
            return found[0]
    raise CheckpointError(
        f"there is no complete checkpoint in {path}; give a folder that save wrote to, a run folder, or one checkpoint."
    )


def verify(path: Path, *, names: frozenset[str] | None = None) -> Manifest:
    """Read every byte of a checkpoint.

    Args:
        path: of one checkpoint.
        names: of the files to read; None: all.

    Raises:
        CheckpointError: naming the file and what is wrong with it, and the previous good checkpoint if there is one.
    """
    try:
        return _verified(path, names)
    except CheckpointError as error:
        raise CheckpointError(f"{error} {_offer(path)}") from None


def publish(partial: Path, directory: Path, *, num_batches: int) -> Path:
    """Make a checkpoint visible by one rename; it is on disk before and after it."""
    for path in (*partial.iterdir(), partial):
        _synchronise(path)
    number = max((_number(path) for path in directory.iterdir() if _NAME.fullmatch(path.name)), default=0) + 1
    path = directory / f"ckpt-{number:06d}-batch-{num_batches}"
    os.rename(partial, path)
    _synchronise(directory)
    return path


def prune(directory: Path, *, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints; each disappears by one rename."""
    for path in complete_checkpoints(directory)[keep:]:
        doomed = directory / f".deleted-{path.name}"
        os.rename(path, doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def set_aside(path: Path) -> list[Path]:
    """Make a checkpoint the newest of its folder: later ones get a name that is not a checkpoint's, and stay.

    Returns:
        Where they are now.
    """
    moved = []
    for other in complete_checkpoints(path.parent):
        if _number(other) > _number(path):
            moved.append(other.rename(other.with_name(f"aside-{os.getpid()}-{other.name}")))
    return moved


def sweep(directory: Path, *, token: str) -> None:
    """Delete what earlier runs left half-written; the caller holds the lock, and `token` names its own."""
    for path in directory.glob(".partial-*"):
        if not path.name.startswith(f".partial-{token}-"):
            shutil.rmtree(path, ignore_errors=True)
    for path in directory.glob(".deleted-*"):
        shutil.rmtree(path, ignore_errors=True)


def lock(directory: Path) -> bool:
    """Keep a folder to this process until it ends; whether that is new.

    A POSIX record lock: a process that this one forks does not inherit it.

    Args:
        directory: which exists.

    Raises:
        ConfigError: where another run holds it.
    """
    directory = directory.resolve()
    if directory in _locked:
        return False
    descriptor = os.open(directory / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    deadline = time.monotonic() + LOCK_WAIT_S
    while True:
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except (BlockingIOError, PermissionError):
            if time.monotonic() > deadline:
                os.close(descriptor)
                raise ConfigError(
                    f"{directory} is in use by another run that saves its checkpoints there; give this one a folder of "
                    "its own, or end the other."
                ) from None
        time.sleep(0.1)
    _locked[directory] = descriptor
    return True


def _verified(path: Path, names: frozenset[str] | None) -> Manifest:
    manifest = Manifest.read(path)
    for name, record in manifest.files.items():
        if names is not None and name not in names:
            continue
        try:
            found = file_checksum(path / name)
        except OSError as error:
            raise CheckpointError(f"{path / name} cannot be read: {error.strerror or error}.") from None
        if found.size != record.size:
            raise CheckpointError(f"{path / name} is truncated: it has {found.size} bytes of {record.size}.")
        if found != record:
            raise CheckpointError(f"{path / name} is damaged: its checksum is wrong.")
    return manifest


def _offer(path: Path) -> str:
    """What to resume from instead."""
    for other in complete_checkpoints(path.parent):
        if other.name != path.name and _number(other) < (_number(path) if _NAME.fullmatch(path.name) else 1 << 62):
            with contextlib.suppress(CheckpointError):
                _verified(other, None)
                return f"The one before is intact: resume from {other}."
    return "No earlier checkpoint beside it is intact."


def _number(path: Path) -> int:
    match = _NAME.fullmatch(path.name)
    return int(match[1]) if match else 0


def _synchronise(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
