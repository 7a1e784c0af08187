"""A training job that saves every few batches, fails once, and goes on from its newest checkpoint."""

from __future__ import annotations

import errno
import os
import resource
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from dist_jobs import mark_fault
from resume_runs import SESSIONS, batches, method_of, pipeline

from stalewise.checkpoint import folder as folders
from stalewise.checkpoint import stage_file, writer
from stalewise.engine.stage import Stage
from stalewise.runtime.job import restart_count

EVERY = 3


def train(folder: str, label: str = "dsp", fault: str = "none", rank: int = 0, nth: int = 1) -> None:
    """Train all sessions of `resume_runs`; in its first life, one rank fails where `fault` says, for the n-th time."""
    torch.set_num_threads(1)
    pipe = pipeline(method_of(label))
    if restart_count() == 0 and pipe.rank == rank:
        FAULTS[fault](folder, nth)
    point = pipe.resume(Path(folder, "checkpoints"), positioned=True, missing_ok=True)
    first, seen = (0, []) if point is None else point.extra
    for session in range(first, len(SESSIONS)):
        given: Any = batches(session)
        if point is not None and session == first:
            given = given[point.session_batches :] if point.session_batches is not None else []
        for loss in pipe.train(given if pipe.rank == 0 else None, drain=SESSIONS[session][1]):
            seen.append(loss)
            if len(seen) % EVERY == 0:
                pipe.save(Path(folder, "checkpoints"), keep=2, extra=[session, seen])
    pipe.wait_saved()
    outcome = {"losses": seen, "state": pipe.state_dict(), "optimizer": pipe.optimizer_state_dict()}
    torch.save(outcome, Path(folder, f"result-{dist.get_rank() if dist.is_initialized() else 'alone'}"))


def _kill(folder: str) -> None:
    mark_fault(folder)
    os.kill(os.getpid(), signal.SIGKILL)


def _before(owner: Any, name: str, nth: int, fault: Callable[[], object], *, after: bool = False) -> None:
    """Let the n-th call of a function fail before (or after) it does its work."""
    function = getattr(owner, name)
    calls = 0

    def failing(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == nth and not after:
            fault()
        result = function(*args, **options)
        if calls == nth and after:
            fault()
        return result

    setattr(owner, name, failing)


def _no_space(folder: str) -> None:
    mark_fault(folder)
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _small_files(folder: str) -> None:
    """From now on the system refuses larger files, amid writing them."""
    mark_fault(folder)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


FAULTS: dict[str, Callable[[str, int], None]] = {
    "none": lambda folder, nth: None,
    "killed in a step": lambda folder, nth: _before(Stage, "update", nth, lambda: _kill(folder)),
    "killed while saving": lambda folder, nth: _before(
        stage_file, "file_checksum", nth, lambda: _kill(folder), after=True
    ),
    "killed before the rename": lambda folder, nth: _before(writer, "publish", nth, lambda: _kill(folder)),
    "killed after the rename": lambda folder, nth: _before(writer, "publish", nth, lambda: _kill(folder), after=True),
    "killed while deleting": lambda folder, nth: _before(folders.shutil, "rmtree", nth, lambda: _kill(folder)),
    "full disk": lambda folder, nth: _before(stage_file, "save_file", nth, lambda: _no_space(folder), after=True),
    "files that may not grow": lambda folder, nth: _before(stage_file, "save_file", nth, lambda: _small_files(folder)),
}
