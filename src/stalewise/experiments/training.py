"""One training run, from its configuration to its folder.

`run` starts the workers; each of them executes `train_worker`, and rank 0 keeps the records:

    config ─► launch ─► K x train_worker:  model, Pipeline ─► epochs: train, evaluate ─► timeline, model, report
"""

from __future__ import annotations

import math
import os
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from stalewise.data import Batches, DataSplit, load_data
from stalewise.engine.nonfinite import NonFinitePolicy
from stalewise.experiments.config import TrainConfig
from stalewise.experiments.display import Display, make_display
from stalewise.experiments.environment import describe_environment, typed_command
from stalewise.experiments.optimizers import optimizer_recipe, schedule_recipe
from stalewise.experiments.replay import order_summary, read_orders, write_orders
from stalewise.experiments.run_checkpoints import Progress, RunCheckpoints, times_resumed
from stalewise.experiments.run_method import kept_activations
from stalewise.experiments.run_model import build_run_model
from stalewise.experiments.run_plan import predict_step
from stalewise.experiments.run_writer import RunWriter, write_json, write_timeline
from stalewise.pipeline import Pipeline
from stalewise.protocol.actions import Kind
from stalewise.protocol.bottleneck import BottleneckWatch
from stalewise.report import Timeline, write_chrome_trace, write_report
from stalewise.runtime.allocator import keep_freed_memory
from stalewise.runtime.cores import threads_per_process, usable_cores
from stalewise.runtime.job import in_launched_job, restart_count
from stalewise.runtime.launch import launch

__all__ = ["accuracy", "run", "train_worker"]

STEADY_STEPS = 200
"""From the middle of the run, over which a step is timed."""

MAX_TRACE_RECORDS = 500_000
"""Actions in `trace.json`, about 160 bytes each; of a longer run it holds so many from the middle."""


def accuracy(output: Tensor, target: Tensor) -> Tensor:
    """Fraction of samples whose largest logit is the target's. output [B, classes], target [B]."""
    return (output.argmax(dim=1) == target).float().mean()


def run(config: TrainConfig, path: Path, *, resume: bool = False, max_restarts: int = 0) -> None:
    """Train as configured and fill the run folder. Blocks until done.

    Args:
        config: of the run.
        path: of its folder, which exists; it is empty but where the run is resumed.
        resume: go on from the newest checkpoint in the folder.
        max_restarts: how often the job starts again, from its newest checkpoint, after a worker failed.

    Raises:
        ConfigError: where the configuration, model or data are not valid.
        WorkerError: where a worker failed.
    """
    with _config_kept_unless_resumed(path) if resume else nullcontext():
        write_json(path / "config.json", config.as_dict())
        _run(config, path, resume=resume, max_restarts=max_restarts)


@contextmanager
def _config_kept_unless_resumed(path: Path) -> Iterator[None]:
    """What a run is resumed with becomes its configuration once the checkpoint is taken up, not where that fails."""
    before, taken_up = (path / "config.json").read_bytes(), times_resumed(path)
    try:
        yield
    finally:
        if times_resumed(path) == taken_up:
            (path / "config.json").write_bytes(before)


def _run(config: TrainConfig, path: Path, *, resume: bool, max_restarts: int) -> None:
    if config.engine == "sequential":
        keep_freed_memory()
        train_worker(str(path), typed_command(), resume)
    else:
        launch(
            train_worker,
            num_workers=config.stages,
            args=[str(path), typed_command(), resume],
            max_restarts=max_restarts,
        )


def train_worker(folder: str, command: str, resume: bool = False) -> None:
    """What each rank does.

    Args:
        folder: of the run; holds its configuration.
        command: by which the run was started, for the record.
        resume: whether to go on from the newest checkpoint; a job that was started again always does.
    """
    warnings.formatwarning = _sentence
    path = Path(folder)
    config = TrainConfig.read(path / "config.json")
    threads = config.threads or default_threads(config)
    torch.set_num_threads(threads)
    data = load_data(
        config.data,
        data_dir=None if config.data_dir is None else Path(config.data_dir),
        train_limit=config.train_limit,
        test_limit=config.test_limit,
    )
    model = build_run_model(config, num_classes=data.num_classes)
    num_batches = len(_training_batches(config, data, 0))
    pipeline = Pipeline(
        model,
        method=config.build_method(),
        loss_fn=nn.functional.cross_entropy,
        optimizer=optimizer_recipe(config),
        lr_scheduler=schedule_recipe(config, num_updates=config.epochs * num_batches),
        partition=config.partition if isinstance(config.partition, tuple) else "profile",
        memory_limit=config.memory_limit,
        engine="sequential" if config.engine == "sequential" else "auto",
        device=config.device,
        seed=config.seed,
        clip_grad_norm=config.clip_grad_norm,
        recv_timeout_s=config.recv_timeout_s,
        measure_memory=config.measure_memory,
        gradient_difference_every=config.gradient_difference_every,
        verbose=False,
        stragglers=config.stragglers,
        autocast=config.autocast,
        compile=config.compile,
        nonfinite_loss=cast("NonFinitePolicy", config.on_nan),
        nonfinite_folder=path / "nonfinite",
        replay=None if config.replay is None else read_orders(Path(config.replay), config.build_method().program()),
    )
    checkpoints = RunCheckpoints(config, pipeline, path)
    resumes = resume or restart_count() > 0
    if resumes:
        checkpoints.resume()
    if pipeline.rank == 0:
        if resumes:
            print(f"stalewise: {checkpoints.tell()}", file=sys.stderr, flush=True)
        write_json(path / "environment.json", describe_environment(command, pipeline.devices, threads))
        with (
            make_display(config.display, path) as display,
            RunWriter(path, beginning=checkpoints.metrics()) as writer,
        ):
            summary = _Recorder(config, data, pipeline, num_batches, writer, display, checkpoints).train()
            display.end(summary)
            _finish(path, pipeline, display, {**summary, **_usage(config, pipeline)})
    else:
        _follow(config, pipeline, checkpoints)
        _usage(config, pipeline)
        _finish(path, pipeline, None, {})


def _sentence(message: Warning | str, category: type[Warning], *_: object, **__: object) -> str:
    """A warning for who typed a command, and has no use for the place in the code."""
    return f"warning: {message}\n" if category is UserWarning else f"warning: {category.__name__}: {message}\n"


def _follow(config: TrainConfig, pipeline: Pipeline, checkpoints: RunCheckpoints) -> None:
    """What ranks above 0 do in the epochs."""
    progress = checkpoints.progress
    batch = progress.batch + checkpoints.losses_on_the_way
    for epoch in range(progress.epoch, config.epochs):
        evaluates = _evaluates_after(config, epoch)
        for _ in pipeline.train(drain=evaluates):
            batch += 1
            if checkpoints.is_due(batch):
                checkpoints.save(Progress(epoch=epoch, batch=batch))
        if evaluates:
            pipeline.evaluate(None, accuracy)


def default_threads(config: TrainConfig) -> int:
    """The cores of this host, shared by the stages that compute at the same time."""
    if config.engine == "sequential" and not in_launched_job():
        return usable_cores()
    return threads_per_process(int(os.environ.get("LOCAL_WORLD_SIZE", config.stages)))


class _Recorder:
    """Rank 0's side of a run: reads the data, keeps the records, drives the display."""

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
            evaluates = _evaluates_after(config, epoch)
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
        batches: Any = () if start is None else _training_batches(self._config, self._data, epoch, start_batch=start)
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
        split = self._data
        batches = Batches(
            split.test,
            split.mean,
            split.std,
            batch_size=max(self._config.batch_size, 100),
            seed=self._config.seed,
            epoch=0,
            shuffle=False,
            augment=False,
        )
        return self._pipeline.evaluate(batches, accuracy)

    def _record(self, record: dict[str, Any]) -> None:
        self._writer.add(record)
        self._display.show(record, self._pipeline.statuses())

    def _elapsed(self) -> float:
        return time.perf_counter() - self._start


def _training_batches(config: TrainConfig, data: DataSplit, epoch: int, *, start_batch: int = 0) -> Batches:
    return Batches(
        data.train,
        data.mean,
        data.std,
        batch_size=config.batch_size,
        seed=config.seed,
        epoch=epoch,
        shuffle=True,
        augment=config.augment,
        num_workers=config.loader_workers,
        start_batch=start_batch,
    )


def _evaluates_after(config: TrainConfig, epoch: int) -> bool:
    return (epoch + 1) % config.evaluate_every == 0 or epoch + 1 == config.epochs


def _usage(config: TrainConfig, pipeline: Pipeline) -> dict[str, Any]:
    """What every stage sent, and held where that was measured; all ranks ask."""
    usage: dict[str, Any] = {"bytes_sent": pipeline.bytes_sent()}
    if config.measure_memory:
        memory, resident = pipeline.memory(), pipeline.resident_memory()
        usage["memory"] = [
            {"stage": stage, "measured": held.as_dict(), "resident": resident[stage]}
            for stage, held in enumerate(memory)
        ]
    return usage


def _step_times(pipeline: Pipeline, timeline: Timeline) -> dict[str, float | None]:
    """Of the steady state, in seconds: as measured, and as the plan predicted where there was one."""
    predicted = None if pipeline.plan is None else predict_step(pipeline.plan)[0]
    window = timeline.window(STEADY_STEPS)
    measured = timeline.usage(window).step_s if window.steady else None
    return {"predicted_step_s": predicted, "measured_step_s": measured}


def _finish(path: Path, pipeline: Pipeline, display: Display | None, summary: dict[str, Any]) -> None:
    """Rank 0 leaves the model, the timeline of all ranks, and what is made for people."""
    pipeline.wait_saved()
    traces, state, orders = pipeline.traces(), pipeline.state_dict(), pipeline.orders()
    if display is None:
        return
    write_orders(path, orders)
    summary = {**summary, **order_summary(orders)}
    records = sum(map(len, traces))
    if records:
        # None in a run that was resumed after its last step.
        write_timeline(path, traces)
        timeline = Timeline.from_traces(traces)
        summary = {**summary, **_step_times(pipeline, timeline)}
        steps = sum(span.kind is Kind.UPDATE for span in traces[0])
        window = timeline.window(steps * MAX_TRACE_RECORDS // records) if records > MAX_TRACE_RECORDS else None
        write_chrome_trace(timeline, path / "trace.json", window=window)
    write_json(path / "summary.json", summary)
    save_file({name: value.contiguous() for name, value in state.items()}, path / "model.safetensors")
    write_report(path)
    display.finished(path, summary)
