"""Rank 0's side of a run: it feeds the pipeline, keeps the records and drives the display."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from typing import Any

from stalewise.data import DataSplit
from stalewise.experiments.config import TrainConfig
from stalewise.experiments.display import Display
from stalewise.experiments.run_checkpoints import Progress, RunCheckpoints
from stalewise.experiments.run_data import accuracy, evaluation_batches, is_evaluated_after, training_batches
from stalewise.experiments.run_method import kept_activations
from stalewise.experiments.run_writer import RunWriter, write_json
from stalewise.pipeline import Pipeline
from stalewise.protocol.bottleneck import BottleneckWatch

__all__ = ["Recorder"]


class Recorder:
    """Trains all epochs of a run, on rank 0.

    Args:
        config: of the run.
        data: of the run.
        pipeline: trains and evaluates; the other ranks call the same.
        num_batches: in an epoch.
        writer: of the records.
        display: is shown every record.
        checkpoints: of the run; they say where it begins.
    """

    def __init__(
        self,
        config: TrainConfig,
        data: DataSplit,
        pipeline: Pipeline,
        num_batches: int,
        writer: RunWriter,
        display: Display,
        checkpoints: RunCheckpoints,
    ) -> None:
        self._config = config
        self._data = data
        self._pipeline = pipeline
        self._num_batches = num_batches
        self._writer = writer
        self._display = display
        self._checkpoints = checkpoints
        self._progress = progress = checkpoints.progress
        self._start = time.perf_counter() - progress.elapsed_s
        self._epoch_begin_s = progress.elapsed_s - progress.epoch_s
        self._batch = progress.batch
        self._measured = progress.measured
        self._losses: list[float] = list(progress.losses)
        self._training_s = progress.training_s
        self._skips = config.on_nan == "skip"
        self._skipped = progress.skipped
        self._keeps_partition = checkpoints.point is None or not checkpoints.point.exact
        locked = config.engine == "sequential" or 0 in config.build_method().staleness.slack[:-1]
        self._watch = BottleneckWatch(config.stages, locked=locked)

    def train(self) -> dict[str, Any]:
        """Train all epochs and return the summary."""
        config = self._config
        self._display.begin(config, self._num_batches, len(self._data.train))
        result: dict[str, Any] = {}
        for epoch in range(self._progress.epoch, config.epochs):
            evaluates = is_evaluated_after(config, epoch)
            mean_loss = self._train_epoch(epoch, drain=evaluates)
            epoch_s = self._elapsed() - self._epoch_begin_s
            self._training_s += epoch_s
            result = {
                "event": "epoch",
                "epoch": epoch + 1,
                "train_loss": mean_loss,
                "test_accuracy": self._evaluate() if evaluates else None,
                "lr": self._pipeline.learning_rate,
                "samples_per_s": len(self._data.train) / epoch_s,
                "epoch_s": epoch_s,
                "time_s": self._elapsed(),
                **self._staleness_counts(),
            }
            self._record(result)
            self._writer.flush()
            self._epoch_begin_s = self._elapsed()
        return {
            "test_accuracy": result["test_accuracy"],
            "train_loss": result["train_loss"],
            "wall_time_s": self._elapsed(),
            "training_s": self._training_s,
            "samples_per_s": config.epochs * len(self._data.train) / self._training_s,
            "batches": self._batch,
            **({"skipped_batches": self._skipped} if self._skips else {}),
            "epochs": config.epochs,
        }

    def _train_epoch(self, epoch: int, *, drain: bool) -> float | None:
        """Mean loss of the batches whose losses came in this epoch; batches left in flight count in the next."""
        start = self._checkpoints.start_batch(epoch)
        batches: Any = () if start is None else training_batches(self._config, self._data, epoch, start_batch=start)
        for loss in self._checkpoints.take_losses_on_the_way():
            self._record_loss(loss)
        for loss in self._pipeline.train(batches, drain=drain):
            self._record_loss(loss)
            self._record_gradient_differences()
            self._name_bottleneck()
            if self._checkpoints.is_due(self._batch):
                self._checkpoints.save(self._progress_in(epoch))
        losses, self._losses = self._losses, []
        return sum(losses) / len(losses) if losses else None

    def _record_loss(self, loss: float) -> None:
        if self._keeps_partition and self._pipeline.partition is not None:
            self._keep_partition()
        if self._skips and not math.isfinite(loss):
            self._skipped += 1
        else:
            self._losses.append(loss)
        self._record(
            {
                "event": "batch",
                "epoch": self._batch // self._num_batches + 1,
                "batch": self._batch,
                "loss": loss,
                "lr": self._pipeline.learning_rate,
                "time_s": self._elapsed(),
            }
        )
        self._batch += 1

    def _progress_in(self, epoch: int) -> Progress:
        return Progress(
            epoch=epoch,
            batch=self._batch,
            losses=tuple(self._losses),
            measured=self._measured,
            training_s=self._training_s,
            epoch_s=self._elapsed() - self._epoch_begin_s,
            elapsed_s=self._elapsed(),
            metrics_size=self._writer.flush(),
            skipped=self._skipped,
        )

    def _record_gradient_differences(self) -> None:
        for batch, stages in self._pipeline.gradient_differences[self._measured :]:
            self._measured += 1
            self._record(
                {
                    "event": "gradient_difference",
                    "epoch": batch // self._num_batches + 1,
                    "batch": batch,
                    "stages": stages,
                    "time_s": self._elapsed(),
                }
            )

    def _name_bottleneck(self) -> None:
        if self._watch.update(self._pipeline.statuses()):
            found = self._watch.current
            self._record(
                {
                    "event": "bottleneck",
                    "batch": self._batch - 1,
                    **({"kind": None} if found is None else found.as_dict()),
                    "time_s": self._elapsed(),
                }
            )

    def _staleness_counts(self) -> dict[str, Any]:
        """Of elastic stages: backwards so far by realised staleness, per stage."""
        counts = [status.get("staleness_counts") for status in self._pipeline.statuses()]
        return {"staleness_counts": counts} if counts and all(counts) else {}

    def _keep_partition(self) -> None:
        self._keeps_partition = False
        partition = self._pipeline.partition
        assert partition is not None
        fixed = isinstance(self._config.partition, tuple)
        depth = None if self._pipeline.plan is None else self._pipeline.plan.depth
        chosen = {} if depth is None else {"staleness": depth.as_dict(), "why": depth.why()}
        write_json(
            self._writer.path / "partition.json",
            {
                "method": "fixed" if fixed else "profile",
                "activations": kept_activations(self._pipeline.method),
                **partition.as_dict(),
                **chosen,
            },
        )
        if depth is not None:
            # From now on the run is one of this staleness: for those who resume, replay or report it.
            decided = replace(self._config, staleness=depth.staleness)
            write_json(self._writer.path / "config.json", decided.as_dict())
        self._display.partition(partition, depth)

    def _evaluate(self) -> float:
        return self._pipeline.evaluate(evaluation_batches(self._config, self._data), accuracy)

    def _record(self, record: dict[str, Any]) -> None:
        self._writer.add(record)
        self._display.show(record, self._pipeline.statuses())

    def _elapsed(self) -> float:
        return time.perf_counter() - self._start
