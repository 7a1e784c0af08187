"""Failures of scripts that run as users run them, with python and with torchrun: what the user sees at the end."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from dist_faults import FAULT_BATCH
from dist_jobs import wait_until_gone

pytestmark = [pytest.mark.dist, pytest.mark.slow]

SCRIPT = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it for what runs in the background
sys.path.insert(0, {tests!r})
import dist_faults
import stalewise

def main(folder, place, stage, action):
    dist_faults.fail(folder, place, int(stage), action)

stalewise.launch(main, num_workers=2, args=sys.argv[1:])
print("not reached")
"""

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]

BROKEN = """
import os
import stalewise

if "RANK" in os.environ:
    raise ValueError("in workers" + " only")

def main():
    pass

if __name__ == "__main__":
    stalewise.launch(main, num_workers=2)
"""

JOBS = {
    "python": ([], "forward", 1, "raise"),
    "control-c": ([], "loop over a late loader", 0, "interrupt"),
    "broken": ([],),
    "torchrun": (TORCHRUN, "while the others wait for all", 0, "raise"),
}


@dataclass(frozen=True)
class Finished:
    """A script that failed."""

    code: int
    output: str
    folder: Path
    seconds_until_gone: float
    left: list[int]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Finished]:
    """All scripts, run beside each other: each new process takes seconds to import torch."""
    running = {}
    for name, (command, *values) in JOBS.items():
        folder = tmp_path_factory.mktemp("script")
        script = folder / "train.py"
        script.write_text(BROKEN if name == "broken" else SCRIPT.format(tests=str(Path(__file__).parents[1])))
        with open(folder / "output", "wb") as output:
            running[name] = (
                folder,
                subprocess.Popen(
                    [sys.executable, *command, str(script), str(folder), *map(str, values)],
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env={**os.environ, "OMP_NUM_THREADS": "1"},
                    start_new_session=True,
                ),
            )
    try:
        return {name: _finished(folder, process) for name, (folder, process) in running.items()}
    finally:
        for _, process in running.values():
            process.kill()
            process.wait()


def _finished(folder: Path, process: subprocess.Popen[bytes]) -> Finished:
    code = process.wait(90)
    ended = time.monotonic()
    pids = [int(path.suffix[1:]) for path in folder.glob("loader.*")]
    pids += [int(path.read_text()) for path in folder.glob("rank.*")]
    fault = min((float(path.read_text()) for path in folder.glob("fault.*")), default=ended)
    left = wait_until_gone(pids, 10.0)
    return Finished(code, (folder / "output").read_text(), folder, ended - fault, left)


def test_an_exception_is_shown_once(finished: dict[str, Finished]) -> None:
    """At the end of the output, where it is looked for."""
    script = finished["python"]
    pid = (script.folder / "rank.1").read_text()
    header = f"stage 1 (rank 1, host {socket.gethostname()}, pid {pid}) failed, batch {FAULT_BATCH}, forward:"
    assert script.code == 1
    assert script.output.count(header) == 1
    assert script.output.count(", in explode\n") == 1
    assert script.output.endswith("dist_faults.Boom: on rank 1\n")
    assert "not reached" not in script.output
    assert script.seconds_until_gone < 10
    assert script.left == []


def test_control_c(finished: dict[str, Finished]) -> None:
    """One KeyboardInterrupt, the parent's; the exit code is what a shell shows as 130."""
    script = finished["control-c"]
    assert script.code in (-signal.SIGINT, 130)
    assert script.output.count("Traceback") == 1
    assert script.output.endswith("KeyboardInterrupt\n")
    assert "stalewise:" not in script.output
    assert script.seconds_until_gone < 10
    assert len(list(script.folder.glob("loader.*"))) == 2
    assert script.left == []


def test_a_script_that_a_worker_cannot_import(finished: dict[str, Finished]) -> None:
    """Both workers fail before any code of the library runs in them; one of them is shown."""
    script = finished["broken"]
    assert script.code == 1
    assert re.search(r"stage [01] \(rank [01], .*\) failed:\nTraceback", script.output)
    assert script.output.count("ValueError: in workers only") == 1
    assert script.output.endswith("ValueError: in workers only\n")


def test_torchrun(finished: dict[str, Finished]) -> None:
    """The traceback once with its header; the other rank, which waits within a collective, does not wait for ever."""
    script = finished["torchrun"]
    pid = (script.folder / "rank.0").read_text()
    header = f"stage 0 (rank 0, host {socket.gethostname()}, pid {pid}) failed:\n"
    assert script.code not in (0, None)
    assert script.output.count(header) == 1
    assert script.output.count(", in explode\n") == 1
    assert script.output.splitlines().count("dist_faults.Boom: on rank 0") == 1
    assert header + "Traceback (most recent call last):\n" in script.output
    assert "not reached" not in script.output
    assert script.seconds_until_gone < 30
    assert script.left == []
