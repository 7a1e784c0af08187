"""A folder is written by one run at a time.

The lock is the system's (flock) on a file in the folder, so it ends with the process that holds it, however that ends;
the text in the file only names the process.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from stalewise.errors import ConfigError

__all__ = ["empty_folder", "is_empty", "locked_folder"]

_LOCK = ".lock"


def is_empty(folder: Path) -> bool:
    """Whether a folder holds nothing but a lock, or is not there."""
    return not folder.exists() or (folder.is_dir() and all(entry.name == _LOCK for entry in folder.iterdir()))


def empty_folder(folder: Path) -> None:
    """Delete what is in a folder, but for the lock."""
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        elif entry.name != _LOCK:
            entry.unlink()


@contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Inside, no other run may use the folder, which is made where it is missing.

    Raises:
        ConfigError: where another run uses it, naming that, or nothing can be written there.
    """
    file, made = _lock(folder)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            # Before it is released: whoever opened it in between sees that its own is no longer the one in the folder.
            (folder / _LOCK).unlink()
        os.close(file)
        if made:
            with contextlib.suppress(OSError):
                folder.rmdir()  # only where nothing came into it


def _lock(folder: Path) -> tuple[int, bool]:
    """The open file that holds the lock, and whether the folder is new."""
    path = folder / _LOCK
    try:
        made = not folder.exists()
        if not made and not folder.is_dir():
            raise ConfigError(f"{folder} is a file and not a folder. Choose another --out.")
        folder.mkdir(parents=True, exist_ok=True)
        while True:
            file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if _is_at(file, path):
                    os.truncate(file, 0)
                    os.pwrite(file, json.dumps(_owner()).encode(), 0)
                    return file, made
            except BaseException:
                os.close(file)
                raise
            os.close(file)
    except BlockingIOError:
        raise ConfigError(
            f"{folder} is in use by {_holder(path)}; two runs in one folder would destroy each other. Wait until it "
            "ends, or choose another folder with --out."
        ) from None
    except ConfigError:
        raise
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"cannot write to {folder}: {reason}. Choose another --out.") from None


def _is_at(file: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except FileNotFoundError:
        return False


def _owner() -> dict[str, object]:
    return {
        "pid": os.getpid(),
        "host": os.uname().nodename,
        "command": " ".join(sys.argv)[:200],
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
    }


def _holder(path: Path) -> str:
    """Who holds the lock, as far as the file tells."""
    try:
        owner = json.loads(path.read_text(encoding="utf-8"))
        return f"process {owner['pid']} on {owner['host']} since {owner['since']} ({owner['command']})"
    except (OSError, ValueError, LookupError, TypeError):
        return "another process"
