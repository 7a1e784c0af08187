"""Writes checkpoints from a thread of its own, one at a time.

    rank 0   stage0.* ──┐                    ┌─ manifest.json ─► rename ─► delete old ones
    rank 1   stage1.* ──┼─► .partial-TOKEN-N ┤
    rank 2   stage2.* ──┘     (file system)  └─ rank 0 waits until the last part is there

The ranks meet in the file system alone, so nobody waits for another one's disk but the thread of rank 0.
"""

from __future__ import annotations

import os
import shutil
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from stalewise.checkpoint.folder import lock, prune, publish, sweep
from stalewise.checkpoint.manifest import MANIFEST, FileRecord, Manifest, file_checksum
from stalewise.checkpoint.stage_file import StagePart, stage_files, stage_records
from stalewise.errors import SaveError

__all__ = ["Attachment", "CheckpointWriter", "Job", "wait_for_writers"]

POLL_S = 0.02


@dataclass(frozen=True, kw_only=True)
class Attachment:
    """A file of the caller's that goes into a checkpoint, as it was at the cut.

    Args:
        name: in the checkpoint.
        source: a file that only grows.
        size: bytes of it.
    """

    name: str
    source: Path
    size: int


@dataclass(frozen=True, kw_only=True)
class Job:
    """One checkpoint.

    Args:
        directory: of all checkpoints.
        number: of the checkpoint in this run, the same on all ranks.
        parts: that this process writes.
        manifest: without its files, on the rank that completes the checkpoint; None on the others.
        keep: how many checkpoints stay; None: all.
        attachments: files of the completing rank's caller.
    """

    directory: Path
    number: int
    parts: Sequence[StagePart]
    manifest: Manifest | None
    keep: int | None
    attachments: Sequence[Attachment] = ()


class _WriterThread(threading.Thread):
    """Told from the threads of others by its class."""


class CheckpointWriter:
    """See the module.

    Args:
        token: of the run, the same on all ranks and in no other run.
        patience_s: how long the completing rank waits for the others' parts.
    """

    def __init__(self, token: str, *, patience_s: float) -> None:
        self._token = token
        self._patience_s = patience_s
        self._thread: threading.Thread | None = None
        self._error: SaveError | None = None
        self.newest: Path | None = None

    def prepare(self, directory: Path, *, completes: bool) -> None:
        """Make the folder; where this rank completes checkpoints, keep it to this run and clean it up.

        Raises:
            ConfigError: where another run uses it.
            SaveError: where it cannot be made.
        """
        try:
            directory.mkdir(parents=True, exist_ok=True)
            if completes and lock(directory):
                sweep(directory, token=self._token)
        except OSError as error:
            raise SaveError(f"cannot save to {directory}: {error.strerror or error}. Choose another folder.") from None

    def submit(self, job: Job) -> None:
        """Begin to write; waits for the one before."""
        self.wait()
        # Not a daemon: what was begun is written, also where a script ends well before.
        self._thread = _WriterThread(target=self._run, args=(job,), name="checkpoint writer")
        self._thread.start()

    def wait(self) -> None:
        """Until everything is written.

        Raises:
            SaveError: where it could not be.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.check()

    def check(self) -> None:
        """Raise the error of a write that failed, once.

        Raises:
            SaveError: saying why.
        """
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _run(self, job: Job) -> None:
        partial = job.directory / f".partial-{self._token}-{job.number}"
        try:
            partial.mkdir(exist_ok=True)
            for part in job.parts:
                part.write(partial)
            if job.manifest is not None:
                self.newest = self._complete(job, job.manifest, partial)
        except OSError as error:
            reason = error.strerror or error
            self._error = SaveError(
                f"the checkpoint of batch {_batch_of(job)} could not be written to {job.directory}: {reason}. The ones "
                "before it are as they were; make room, and resume from the newest."
            )
        except SaveError as error:
            self._error = error
        if self._error is not None:
            _discard(job, partial)
            if not threading.main_thread().is_alive():
                print(f"stalewise: {self._error}", file=sys.stderr)

    def _complete(self, job: Job, manifest: Manifest, partial: Path) -> Path:
        files: dict[str, FileRecord] = {}
        for attachment in job.attachments:
            _copy_beginning(attachment, partial / attachment.name)
            files[attachment.name] = file_checksum(partial / attachment.name)
        stopped_s = []
        for stage in range(manifest.num_stages):
            records, stopped = self._wait_for(partial, job, stage)
            files.update(records)
            stopped_s.append(stopped)
        text = replace(manifest, files=files, stopped_s=stopped_s).text()
        (partial / MANIFEST).write_text(text, encoding="utf-8")
        path = publish(partial, job.directory, num_batches=manifest.num_batches)
        if job.keep is not None:
            prune(job.directory, keep=job.keep)
        return path

    def _wait_for(self, partial: Path, job: Job, stage: int) -> tuple[dict[str, FileRecord], float]:
        deadline = time.monotonic() + self._patience_s
        while (found := stage_records(partial, stage)) is None:
            if not threading.main_thread().is_alive():
                raise SaveError(f"the run ended before stage {stage} had written its part of a checkpoint.")
            if time.monotonic() > deadline:
                raise SaveError(
                    f"stage {stage} wrote no part of the checkpoint of batch {_batch_of(job)} to {job.directory} in "
                    f"{self._patience_s:.0f} s; the folder must be on a file system that all ranks share."
                )
            time.sleep(POLL_S)
        return found


def wait_for_writers() -> None:
    """Until this process writes no checkpoint any more: what a run that failed or was stopped had begun is whole then.

    Whoever looks for the newest checkpoint calls this first; else it may appear, and an older one go, meanwhile.
    """
    for thread in threading.enumerate():
        if isinstance(thread, _WriterThread):
            thread.join()


def _discard(job: Job, partial: Path) -> None:
    """Leave nothing of a checkpoint that failed; other ranks may still write to its folder."""
    if job.manifest is not None:
        shutil.rmtree(partial, ignore_errors=True)
        return
    for part in job.parts:
        for name in stage_files(part.stage):
            (partial / name).unlink(missing_ok=True)


def _batch_of(job: Job) -> str:
    return "?" if job.manifest is None else str(job.manifest.num_batches)


def _copy_beginning(attachment: Attachment, target: Path) -> None:
    left = attachment.size
    with attachment.source.open("rb") as source, target.open("wb") as copy:
        while left and (chunk := source.read(min(left, 1 << 20))):
            copy.write(chunk)
            left -= len(chunk)
        copy.flush()
        os.fsync(copy.fileno())
