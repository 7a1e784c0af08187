"""The checkpoints of a training run: how far it was, and the metrics so far, beside what the pipeline keeps."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from stalewise.checkpoint.writer import Attachment
from stalewise.errors import CheckpointError
from stalewise.experiments.config import TrainConfig
from stalewise.pipeline import Pipeline
from stalewise.runtime.job import restart_count
from stalewise.runtime.resuming import ResumePoint

__all__ = ["CHECKPOINTS", "METRICS", "Progress", "RunCheckpoints", "times_resumed"]

CHECKPOINTS = "checkpoints"
_RESUMED = "resumed.jsonl"
METRICS = "metrics.jsonl"


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a run is; the same on all ranks but for what rank 0 alone records.

    Args:
        epoch: that is trained, from 0.
        batch: losses seen.
        losses: seen in this epoch.
        measured: gradient differences recorded.
        training_s: time of the epochs before, in seconds.
        epoch_s: time of this epoch so far.
        elapsed_s: time since the run began.
        metrics_size: bytes of `metrics.jsonl`.
        skipped: batches left out because their loss was not finite.
    """

    epoch: int = 0
    batch: int = 0
    losses: tuple[float, ...] = ()
    measured: int = 0
    training_s: float = 0.0
    epoch_s: float = 0.0
    elapsed_s: float = 0.0
    metrics_size: int = 0
    skipped: int = 0


class RunCheckpoints:
    """Saves a run every so many batches, and brings it back.

    Args:
        config: of the run.
        pipeline: of the run.
        folder: of the run.
    """

    def __init__(self, config: TrainConfig, pipeline: Pipeline, folder: Path) -> None:
        self._every = config.checkpoint_every
        self._keep = config.keep
        self._pipeline = pipeline
        self._folder = folder
        self._begins_within = False
        self._start_batch: int | None = None
        self._on_the_way: tuple[float, ...] = ()
        self.point: ResumePoint | None = None
        self.progress = Progress()

    def resume(self) -> None:
        """Go on from the newest checkpoint of the run, where there is one; all ranks call it."""
        point = self._pipeline.resume(self._folder / CHECKPOINTS, positioned=True, missing_ok=True)
        if point is None:
            return
        try:
            known = {entry.name for entry in fields(Progress)}
            values: dict[str, Any] = {name: value for name, value in point.extra.items() if name in known}
            self.progress = Progress(**{**values, "losses": tuple(values["losses"])})
        except (AttributeError, TypeError, KeyError) as error:
            raise CheckpointError(f"{point.path} is not of a training run ({error}).") from None
        self.point = point
        self._begins_within = True
        self._start_batch = point.session_batches
        self._on_the_way = point.losses

    @property
    def losses_on_the_way(self) -> int:
        """Losses that came while a run moved to another pipeline, and belong to the first epoch."""
        return len(self._on_the_way)

    def take_losses_on_the_way(self) -> tuple[float, ...]:
        """These losses, once."""
        losses, self._on_the_way = self._on_the_way, ()
        return losses

    def start_batch(self, epoch: int) -> int | None:
        """Batches of this epoch that were trained on before; None where all were."""
        if not self._begins_within or epoch != self.progress.epoch:
            return 0
        return self._start_batch

    def metrics(self) -> bytes:
        """What `metrics.jsonl` held at the checkpoint."""
        return b"" if self.point is None else (self.point.path / METRICS).read_bytes()

    def is_due(self, batch: int) -> bool:
        """Whether to save after so many losses."""
        return self._every is not None and batch % self._every == 0

    def save(self, progress: Progress) -> None:
        """Save; all ranks call it after the same loss."""
        attachments = []
        if self._pipeline.rank == 0:
            attachments.append(
                Attachment(name=METRICS, source=self._folder / METRICS, size=progress.metrics_size),
            )
        self._pipeline.save(
            self._folder / CHECKPOINTS, keep=self._keep, extra=asdict(progress), attachments=attachments
        )

    def tell(self) -> str:
        """What was done, in a sentence; also kept in the run folder."""
        did = "there is no checkpoint yet; the run begins anew" if self.point is None else self.point.did
        exact = self.point is None or self.point.exact
        now = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        record = {"time": now, "restart": restart_count(), "exact": exact, "did": did}
        with (self._folder / _RESUMED).open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        return did


def times_resumed(folder: Path) -> int:
    """How often the run in this folder was taken up."""
    file = folder / _RESUMED
    return len(file.read_bytes().splitlines()) if file.is_file() else 0
