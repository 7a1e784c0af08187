"""One training run, from its configuration to its folder.

`run` starts the workers; each of them executes `train_worker`, and rank 0 keeps the records:

    config ─► launch ─► K x train_worker:  model, Pipeline ─► epochs: train, evaluate ─► timeline, model, report
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save_file
from torch import nn

from stalewise.engine.nonfinite import NonFinitePolicy
from stalewise.experiments.config import TrainConfig
from stalewise.experiments.display import Display, make_display
from stalewise.experiments.environment import describe_environment, typed_command
from stalewise.experiments.optimizers import optimizer_recipe, schedule_recipe
from stalewise.experiments.recorder import Recorder
from stalewise.experiments.replay import order_summary, read_orders, write_orders
from stalewise.experiments.run_checkpoints import Progress, RunCheckpoints, times_resumed
from stalewise.experiments.run_data import accuracy, is_evaluated_after, load_run_data, training_batches
from stalewise.experiments.run_model import build_run_model, check_run_model
from stalewise.experiments.run_plan import predict_step
from stalewise.experiments.run_writer import RunWriter, write_json, write_timeline
from stalewise.pipeline import Pipeline
from stalewise.protocol.actions import Kind
from stalewise.report import Timeline, write_chrome_trace, write_report
from stalewise.runtime.allocator import keep_freed_memory
from stalewise.runtime.cores import threads_per_process, usable_cores
from stalewise.runtime.job import in_launched_job, restart_count
from stalewise.runtime.launch import launch

__all__ = ["default_threads", "run", "train_worker"]

STEADY_STEPS = 200
"""From the middle of the run, over which a step is timed."""

MAX_TRACE_RECORDS = 500_000
"""Actions in `trace.json`, about 160 bytes each; of a longer run it holds so many from the middle."""


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
    check_run_model(config)
    with _config_kept_unless_resumed(path) if resume else nullcontext():
        write_json(path / "config.json", config.as_dict())
        _run(config, path, resume=resume, max_restarts=max_restarts)


@contextmanager
def _config_kept_unless_resumed(path: Path) -> Iterator[None]:
    """What a run is resumed with becomes its configuration once the checkpoint is taken up, not where that fails."""
    before, taken_up = json.loads((path / "config.json").read_bytes()), times_resumed(path)
    try:
        yield
    finally:
        if times_resumed(path) == taken_up:
            write_json(path / "config.json", before)


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
    data = load_run_data(config)
    model = build_run_model(config, num_classes=data.num_classes)
    num_batches = len(training_batches(config, data, 0))
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
            summary = Recorder(config, data, pipeline, num_batches, writer, display, checkpoints).train()
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
        evaluates = is_evaluated_after(config, epoch)
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
