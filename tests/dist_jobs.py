"""Runs `stalewise.launch` for tests of failures, without the seconds that each new process needs to import torch.

    test ──► fork server (torch imported) ──► parent of a job: launch() ──► workers, forked as well
                                              session leader; its output goes to a file

All but the start of a worker is as in real life: one process group per worker, a pipe to the parent as standard input,
no other open file. The session number finds every process of a job, whoever started it.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import multiprocessing
import multiprocessing.connection
import os
import select
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

__all__ = ["Ended", "Job", "left_in_session", "mark_fault", "run_job", "run_jobs", "wait_until_gone"]

JOB_TIMEOUT_S = 200.0
LEFT_TIMEOUT_S = 20.0
PRELOADED = ["stalewise.runtime.child", "torch.utils.data", "torch._dynamo"]
"""What workers import sooner or later; optimizers import torch._dynamo when they are first used."""


_processes = threading.Lock()
"""multiprocessing polls the processes of all threads whenever one of these starts one."""

Job = tuple[str, int, Sequence[Any]]
"""Main as "module:function", number of workers, and the arguments that follow the folder."""


@dataclass(frozen=True)
class Ended:
    """How a job ended.

    Args:
        error: class of what `launch` raised; None where it returned, or its process was killed.
        message: of that error.
        cause_type: of a WorkerError: class of the worker's error.
        output: everything that any process printed.
        exit_code: of the parent; negative: killed by that signal.
        seconds_until_gone: from the fault (`mark_fault`) until the last process was gone.
        left: processes that had to be killed by the test.
        folder: where the workers may have written.
    """

    error: str | None
    message: str
    cause_type: str
    output: str
    exit_code: int
    seconds_until_gone: float
    left: tuple[int, ...]
    folder: Path


def run_jobs(jobs: dict[str, Job], folder: Path, *, at_once: int, max_restarts: int = 0) -> dict[str, Ended]:
    """Run jobs beside each other.

    Args:
        jobs: by name.
        folder: gets a folder per job.
        at_once: how many run at a time.
        max_restarts: see `launch`.
    """
    with ThreadPoolExecutor(at_once) as pool:
        futures = {}
        for name, (main, num_workers, args) in jobs.items():
            own = folder / name.replace(" ", "-")
            own.mkdir()
            futures[name] = pool.submit(run_job, main, num_workers, args, own, max_restarts)
        return {name: future.result() for name, future in futures.items()}


def run_job(
    main: str,
    num_workers: int,
    args: Sequence[Any],
    folder: Path,
    max_restarts: int = 0,
    *,
    timeout_s: float = JOB_TIMEOUT_S,
) -> Ended:
    """Run one job to its end and look what is left of it; see `run_jobs`."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    parent = context.Process(target=_parent, args=(main, num_workers, list(args), str(folder), max_restarts))
    with _processes:
        parent.start()
    assert parent.pid is not None
    multiprocessing.connection.wait([parent.sentinel], timeout_s * (1 + max_restarts))
    left = wait_until_gone(left_in_session(parent.pid), LEFT_TIMEOUT_S)
    gone = time.monotonic()
    for pid in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    with _processes:
        if parent.exitcode is None:
            parent.kill()
        parent.join()
        exit_code = parent.exitcode
        assert exit_code is not None
        parent.close()
    outcome = {"error": None, "message": "", "cause_type": ""}
    with contextlib.suppress(FileNotFoundError):
        outcome = json.loads((folder / "outcome.json").read_text())
    marks = [float(path.read_text()) for path in folder.glob("fault.*")]
    return Ended(
        **outcome,
        output=(folder / "output").read_text(),
        exit_code=exit_code,
        seconds_until_gone=gone - min(marks, default=gone),
        left=tuple(left),
        folder=folder,
    )


def mark_fault(folder: str) -> None:
    """Note the time, in a worker, right before it fails."""
    Path(folder, f"fault.{os.getpid()}").write_text(repr(time.monotonic()))


def left_in_session(session: int) -> list[int]:
    """Live processes of a session (Linux)."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            state, _, _, own_session, *_ = stat.read_text().rpartition(")")[2].split()
            if int(own_session) == session and state != "Z":
                found.append(int(stat.parent.name))
    return found


def wait_until_gone(pids: Iterable[int], timeout_s: float) -> list[int]:
    """Wait for processes, of whatever parent, to end; those that do not."""
    deadline = time.monotonic() + timeout_s
    left = []
    for pid in pids:
        try:
            descriptor = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        try:
            ended, _, _ = select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))
        finally:
            os.close(descriptor)
        if not ended:
            left.append(pid)
    return left


# -- in the parent of a job --------------------------------------------------------------------------------------


def _parent(main: str, num_workers: int, args: list[Any], folder: str, max_restarts: int) -> None:
    from stalewise.runtime import launch as launcher

    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    output = os.open(Path(folder, "output"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))
    launcher.subprocess = SimpleNamespace(Popen=_ForkedWorker, PIPE=-1)
    module, _, name = main.partition(":")
    function: Callable[..., object] = getattr(importlib.import_module(module), name)
    _ForkedWorker.fork(num_workers * (max_restarts + 1))
    try:
        launcher.launch(function, num_workers=num_workers, args=[folder, *args], max_restarts=max_restarts)
    except BaseException as error:
        outcome = {"error": type(error).__name__, "message": str(error), "cause_type": getattr(error, "cause_type", "")}
        Path(folder, "outcome.json").write_text(json.dumps(outcome))
        os._exit(1)
    os._exit(0)


class _ForkedWorker:
    """What `launch` needs of `subprocess.Popen`, by a fork of this process.

    The fork is made before `launch` starts the thread of its store: a process that is forked while another thread holds
    a lock never gets that lock. It waits for its environment, which comes over its standard input.
    """

    waiting: ClassVar[list[tuple[int, int]]] = []

    def __init__(self, command: list[str], *, env: dict[str, str], stdin: int, process_group: int) -> None:
        assert process_group == 0
        self.pid, write = self.waiting.pop(0)
        self.returncode: int | None = None
        self.stdin = os.fdopen(write, "wb")
        text = json.dumps(env).encode()
        self.stdin.write(len(text).to_bytes(8) + text)
        self.stdin.flush()

    @classmethod
    def fork(cls, count: int) -> None:
        """Make processes that will be workers."""
        for _ in range(count):
            read, write = os.pipe()
            pid = os.fork()
            if pid == 0:
                _become_worker(read)
            with contextlib.suppress(PermissionError, ProcessLookupError):
                os.setpgid(pid, pid)
            os.close(read)
            cls.waiting.append((pid, write))

    def poll(self) -> int | None:
        return self.returncode if self.returncode is not None else self._wait(os.WNOHANG)

    def wait(self) -> int:
        code = self.returncode if self.returncode is not None else self._wait(0)
        assert code is not None
        return code

    def _wait(self, options: int) -> int | None:
        pid, status = os.waitpid(self.pid, options)
        if pid:
            self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode


def _become_worker(stdin: int) -> None:
    code = 70
    try:
        os.setpgid(0, 0)
        os.dup2(stdin, 0)
        os.closerange(3, 1 << 14)
        env = json.loads(_read(int.from_bytes(_read(8))))
        os.environ.clear()
        os.environ.update(env)
        import torch

        from stalewise.runtime.child import import_and_run

        torch.set_num_threads(1)
        # True where the tests run on two cores, and no part of what they look for.
        warnings.filterwarnings("ignore", message=r"\d+ ranks on this host run")
        import_and_run()
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    finally:
        os._exit(code)


def _read(size: int) -> bytes:
    data = b""
    while len(data) < size:
        more = os.read(0, size - len(data))
        if not more:
            os._exit(71)
        data += more
    return data
