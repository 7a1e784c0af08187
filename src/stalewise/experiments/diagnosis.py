"""What a machine can run, and what would hurt, as findings."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import socket
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Literal

import torch

from stalewise._version import __version__
from stalewise.data import default_cache_dir
from stalewise.experiments.environment import processor_name
from stalewise.runtime.backends import available_backends
from stalewise.runtime.cores import usable_cores

__all__ = ["Finding", "diagnose"]

LEAST_TORCH = (2, 11)


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing found.

    Args:
        level: "ok", "note" (works, but slower or with less) or "problem" (will not work).
        subject: what it is about.
        text: what was found, and what to do about it.
    """

    level: Literal["ok", "note", "problem"]
    subject: str
    text: str

    def as_dict(self) -> dict[str, str]:
        """JSON values."""
        return asdict(self)


def diagnose(stages: int) -> list[Finding]:
    """Look at this machine as the place of a run with so many stages."""
    return [*_versions(), *_processors(stages), *_devices(stages), *_backends(), *_network(), *_storage()]


def _versions() -> Iterator[Finding]:
    yield Finding(level="ok", subject="stalewise", text=f"{__version__}, Python {platform.python_version()}")
    release = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if release < LEAST_TORCH:
        yield Finding(level="problem", subject="torch", text=f"{torch.__version__}; install 2.11 or newer.")
    else:
        yield Finding(level="ok", subject="torch", text=torch.__version__)
    for package in ("safetensors", "pyarrow", "scikit-learn", "pillow", "matplotlib"):
        try:
            importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            yield Finding(level="problem", subject=package, text="is not installed; reinstall stalewise.")


def _processors(stages: int) -> Iterator[Finding]:
    cores = os.cpu_count() or 1
    available = usable_cores()
    yield Finding(level="ok", subject="processor", text=f"{processor_name()}, {available} of {cores} cores usable")
    if available < stages:
        yield Finding(
            level="note",
            subject="cores",
            text=f"{stages} stages share {available} cores, so stages wait for each other; use --stages {available} "
            "or fewer for speed. The numbers are the same.",
        )
    threads = os.environ.get("OMP_NUM_THREADS")
    if threads is not None and threads.isdigit() and int(threads) * stages > available:
        yield Finding(
            level="note",
            subject="threads",
            text=f"OMP_NUM_THREADS is {threads}: {stages} stages would run {int(threads) * stages} threads on "
            f"{available} cores, which can be ten times slower. Unset it, or give --threads "
            f"{max(1, available // stages)}.",
        )


def _devices(stages: int) -> Iterator[Finding]:
    if not torch.cuda.is_available():
        yield Finding(level="ok", subject="devices", text="CPU only; no CUDA device")
        return
    count = torch.cuda.device_count()
    names = ", ".join(torch.cuda.get_device_name(index) for index in range(count))
    yield Finding(level="ok", subject="devices", text=f"{count} CUDA: {names}")
    if count < stages:
        yield Finding(
            level="note",
            subject="devices",
            text=f"{stages} stages share {count} GPUs, and their messages go through host memory.",
        )


def _backends() -> Iterator[Finding]:
    backends = available_backends()
    if "gloo" not in backends:
        yield Finding(
            level="problem",
            subject="gloo",
            text="this torch has no gloo, so only --engine sequential works; install another build.",
        )
    else:
        yield Finding(level="ok", subject="backends", text=", ".join(backends))


def _network() -> Iterator[Finding]:
    try:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
    except OSError as error:
        yield Finding(level="problem", subject="loopback", text=f"cannot listen on 127.0.0.1 ({error}).")
    else:
        yield Finding(level="ok", subject="loopback", text="workers can meet on 127.0.0.1")


def _storage() -> Iterator[Finding]:
    folder = default_cache_dir()
    there = folder
    while not there.exists():
        there = there.parent
    free = shutil.disk_usage(there).free
    writable = os.access(there, os.W_OK)
    text = f"{folder}, {free / 1e9:.0f} GB free"
    if not writable:
        yield Finding(level="note", subject="cache", text=f"{text}, not writable; set STALEWISE_CACHE for downloads.")
    elif free < 2e9:
        yield Finding(level="note", subject="cache", text=f"{text}; downloads may not fit. Set STALEWISE_CACHE.")
    else:
        yield Finding(level="ok", subject="cache", text=text)
