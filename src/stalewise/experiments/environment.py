"""What a run ran on, for its folder and its report."""

from __future__ import annotations

import datetime
import os
import platform
import shlex
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from stalewise._version import __version__

__all__ = ["describe_environment", "processor_name", "typed_command"]


def describe_environment(command: str, devices: list[str], threads: int) -> dict[str, Any]:
    """Versions, hardware and command, as JSON values.

    Args:
        command: by which the run was started.
        devices: of each stage.
        threads: intra-op threads per stage.
    """
    return {
        "stalewise": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": platform.platform(),
        "host": socket.gethostname(),
        "processor": processor_name(),
        "cores": os.cpu_count(),
        "threads_per_stage": threads,
        "devices": devices,
        "command": command,
        "started": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "commit": _commit(),
    }


def typed_command() -> str:
    """The command of this process, as a person would type it."""
    program = Path(sys.argv[0])
    if program.name == "__main__.py":
        return shlex.join(["python", "-m", program.parent.name, *sys.argv[1:]])
    return shlex.join([program.name, *sys.argv[1:]])


def processor_name() -> str:
    """The processor's name as the system gives it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _commit() -> str | None:
    """The commit of the working folder's repository, where there is one."""
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
