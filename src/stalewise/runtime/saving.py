"""Saving a run while it goes on: who copies what when, and who writes it.

save()   copy of the own stages' state ─► messages of the cut, as they come ─► writer's thread ─► files
         └ this is all that the stage waits for ┘
"""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from stalewise._version import __version__
from stalewise.checkpoint.manifest import Manifest
from stalewise.checkpoint.stage_file import StagePart
from stalewise.checkpoint.writer import Attachment, CheckpointWriter, Job
from stalewise.engine.engine import Engine
from stalewise.engine.randomness import process_random_state
from stalewise.runtime.resuming import environment

__all__ = ["RunDescription", "Saver"]


@dataclass(frozen=True, kw_only=True)
class RunDescription:
    """What a checkpoint says of the run that it is of; see `Manifest`."""

    num_stages: int
    cuts: tuple[int, ...]
    layers: tuple[str, ...]
    method: tuple[str, Mapping[str, Any]] | None
    method_text: str
    seed: int
    settings: Mapping[str, Any]


class Saver:
    """Saves the stages of one engine.

    Args:
        engine: whose stages they are.
        rank: of this process; rank 0 completes each checkpoint.
        description: of the run.
        token: of the run, the same on all ranks and in no other run.
        patience_s: how long rank 0 waits for the others' parts.
    """

    def __init__(
        self, engine: Engine, *, rank: int, description: RunDescription, token: str, patience_s: float
    ) -> None:
        self._engine = engine
        self._rank = rank
        self._description = description
        self.writer = CheckpointWriter(token, patience_s=patience_s)
        self._number = 0
        self._parts: list[StagePart] = []
        self._incomplete = 0
        self._job: Job | None = None

    def save(
        self,
        directory: Path,
        *,
        keep: int | None,
        extra: Any,
        data: str,
        loader: Any,
        attachments: Sequence[Attachment],
    ) -> None:
        """Copy the state of the stages, and have it written; see `Pipeline.save`.

        Args:
            directory: of all checkpoints.
            keep: how many stay.
            extra: JSON, for the manifest.
            data: see `Manifest`.
            loader: state of the iterable of batches, or None.
            attachments: files.
        """
        begin = time.perf_counter()
        self.flush()
        self.writer.prepare(directory, completes=self._rank == 0)
        self._number += 1
        self._parts = []
        stages = [stage.index for stage in self._engine.held_stages]
        self._incomplete = len(stages)
        own = {
            stages[0]: {"random": process_random_state(self._engine.held_stages[0].device), "loader": loader},
        }

        def take(stage: int, state: dict[str, Any]) -> Callable[[dict[str, Any]], None]:
            part = StagePart(stage, {**state, **own.get(stage, {"random": None, "loader": None})})
            self._parts.append(part)
            return partial(self._add_messages, part)

        cut = self._engine.snapshot(take)
        manifest = Manifest(
            stalewise=__version__,
            created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            num_stages=self._description.num_stages,
            cuts=list(self._description.cuts),
            layers=list(self._description.layers),
            method=None if self._description.method is None else list(self._description.method),
            method_text=self._description.method_text,
            seed=self._description.seed,
            settings=dict(self._description.settings),
            environment=environment(),
            cut=asdict(cut),
            data="none" if cut.session_batches is None else data,
            extra=extra,
            stopped_s=[],
            files={},
        )
        for part in self._parts:
            part.stopped_s = time.perf_counter() - begin
        self._job = Job(
            directory=directory,
            number=self._number,
            parts=self._parts,
            manifest=manifest if self._rank == 0 else None,
            keep=keep,
            attachments=attachments,
        )
        self._submit_if_complete()

    def flush(self) -> None:
        """Wait until everything that was saved is written.

        Raises:
            SaveError: where it could not be.
        """
        self._engine.complete_snapshots()
        self.writer.wait()

    def _add_messages(self, part: StagePart, messages: Mapping[str, Any]) -> None:
        part.add_messages(messages)
        self._incomplete -= 1
        self._submit_if_complete()

    def _submit_if_complete(self) -> None:
        if self._job is not None and not self._incomplete:
            job, self._job = self._job, None
            self.writer.submit(job)
