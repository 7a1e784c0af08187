"""Reading a checkpoint on every rank, so that all go on with it or none does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from stalewise.checkpoint.folder import find_checkpoint, verify
from stalewise.checkpoint.manifest import MANIFEST, Manifest
from stalewise.checkpoint.stage_file import read_stage, stage_files
from stalewise.checkpoint.writer import wait_for_writers
from stalewise.engine.engine import Cut
from stalewise.errors import CheckpointError
from stalewise.runtime.exchange import all_gather_json, broadcast_json
from stalewise.runtime.job import Job

__all__ = ["ResumePoint", "agreed", "cut_of", "environment", "locate", "read_stages"]

Value = TypeVar("Value")


@dataclass(frozen=True, kw_only=True)
class ResumePoint:
    """Where a resumed run goes on.

    Args:
        path: of the checkpoint.
        batches: that entered the pipeline before: the global index of the next one.
        session_batches: of them, taken from the iterable that was being read; None where the checkpoint was saved
            between two calls of `train`.
        exact: whether the run goes on bitwise as it would have without the interruption.
        losses: of the batches in flight, where they were finished on the way to another pipeline; else empty.
        did: what was done, in a sentence.
        extra: what was given to `save`.
    """

    path: Path
    batches: int
    session_batches: int | None
    exact: bool
    losses: tuple[float, ...]
    did: str
    extra: Any


def environment() -> dict[str, Any]:
    """What the rounding of a run may depend on; see `Manifest`."""
    return {"torch": torch.__version__, "threads": torch.get_num_threads()}


def locate(directory: Path, job: Job | None, *, missing_ok: bool) -> Path | None:
    """The checkpoint that all ranks take: rank 0 looks. None where there is none and that is all right.

    Raises:
        CheckpointError: where there is none, on all ranks.
    """

    def found() -> str:
        if job is not None and job.rank != 0:
            return ""
        try:
            return str(find_checkpoint(directory))
        except CheckpointError:
            if missing_ok:
                return ""
            raise

    wait_for_writers()
    text = agreed(found, job)
    if job is not None:
        text = broadcast_json(text, 0, job.group)
    return Path(text) if text else None


def read_stages(path: Path, stages: Sequence[int], *, device: torch.device) -> tuple[Manifest, dict[int, Any]]:
    """Verify and read the parts of some stages.

    Raises:
        CheckpointError: where a byte of them is not as it was written.
    """
    names = frozenset(name for stage in stages for name in stage_files(stage))
    manifest = verify(path, names=names)
    for name in names:
        if name not in manifest.files:
            raise CheckpointError(f"{path / MANIFEST} is malformed: it does not list {name}.")
    return manifest, {stage: read_stage(path, stage, device=device) for stage in stages}


def cut_of(manifest: Manifest) -> Cut:
    """Where the run stood.

    Raises:
        CheckpointError: where the manifest does not say.
    """
    try:
        cut = Cut(**manifest.cut)
    except TypeError as error:
        raise CheckpointError(f"its manifest is malformed: {error}.") from None
    differences = [(batch, list(stages)) for batch, stages in cut.gradient_differences]
    return Cut(**{**manifest.cut, "gradient_differences": differences})


def agreed(read: Callable[[], Value], job: Job | None) -> Value:
    """What `read` gives, if it gives something on all ranks.

    Raises:
        CheckpointError: that of the first rank that has one, on all ranks.
    """
    error: CheckpointError | None = None
    value: Value | None = None
    try:
        value = read()
    except CheckpointError as problem:
        error = problem
    if job is not None:
        texts = all_gather_json(None if error is None else str(error), job.group)
        error = next((CheckpointError(text) for text in texts if text is not None), None)
    if error is not None:
        raise error
    assert value is not None
    return value
