"""The data-parallel baseline of a comparison, as a run folder without timeline and partition."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from stalewise.arguments import resolve_device
from stalewise.data import DataSplit
from stalewise.engine.compiled import backend_of
from stalewise.engine.memory import resident_bytes
from stalewise.engine.precision import Precision
from stalewise.experiments.config import TrainConfig
from stalewise.experiments.environment import describe_environment, typed_command
from stalewise.experiments.optimizers import optimizer_recipe, schedule_recipe
from stalewise.experiments.run_data import (
    accuracy,
    evaluation_batches,
    is_evaluated_after,
    load_run_data,
    training_batches,
)
from stalewise.experiments.run_model import build_run_model
from stalewise.experiments.run_writer import RunWriter, write_json
from stalewise.experiments.training import default_threads
from stalewise.report import write_report
from stalewise.runtime.data_parallel import DataParallel
from stalewise.runtime.job import current_job
from stalewise.runtime.launch import launch

__all__ = ["data_parallel_worker", "run_data_parallel"]


def run_data_parallel(config: TrainConfig, path: Path, *, ranks: int) -> None:
    """Train the whole model on so many processes, each with its part of every batch; fill the run folder.

    Args:
        config: of the unsplit model: one stage.
        path: of the run folder, which exists and is empty.
        ranks: processes.

    Raises:
        WorkerError: where a process failed.
    """
    write_json(path / "config.json", {**config.as_dict(), "baseline": "data-parallel", "processes": ranks})
    launch(data_parallel_worker, num_workers=ranks, args=[str(path), typed_command()])


def data_parallel_worker(folder: str, command: str) -> None:
    """What each rank does; rank 0 keeps the records.

    Args:
        folder: of the run; holds its configuration.
        command: by which the run was started, for the record.
    """
    path = Path(folder)
    config = TrainConfig.read(path / "config.json")
    threads = config.threads or default_threads(config)
    torch.set_num_threads(threads)
    data = load_run_data(config)
    model = build_run_model(config, num_classes=data.num_classes)
    parallel = DataParallel(
        model if isinstance(model, nn.Sequential) else nn.Sequential(*model),
        loss_fn=nn.functional.cross_entropy,
        optimizer=optimizer_recipe(config),
        lr_scheduler=schedule_recipe(config, num_updates=config.epochs * len(training_batches(config, data, 0))),
        device=resolve_device(config.device, current_job()),
        seed=config.seed,
        clip_grad_norm=config.clip_grad_norm,
        precision=Precision(config.autocast),
        compile=backend_of(config.compile),
    )
    devices = parallel.gather(parallel.device)
    if parallel.rank == 0:
        write_json(path / "environment.json", describe_environment(command, devices, threads))
        with RunWriter(path) as writer:
            summary = _train(config, data, parallel, writer)
    else:
        summary = _train(config, data, parallel, None)
    resident = parallel.gather(resident_bytes())
    if parallel.rank == 0:
        memory = [
            {"stage": rank, "measured": None, "predicted": None, "resident": b} for rank, b in enumerate(resident)
        ]
        save_file(
            {name: value.contiguous() for name, value in parallel.state_dict().items()}, path / "model.safetensors"
        )
        write_json(path / "summary.json", {**summary, "memory": memory})
        write_report(path)


def _train(config: TrainConfig, data: DataSplit, parallel: DataParallel, writer: RunWriter | None) -> dict[str, Any]:
    """Train all epochs; rank 0 has a writer for the records."""
    start = time.perf_counter()
    batch = 0
    training_s = 0.0
    result: dict[str, Any] = {}

    def record(values: dict[str, Any]) -> None:
        if writer is not None:
            writer.add({**values, "time_s": time.perf_counter() - start})

    for epoch in range(config.epochs):
        begin = time.perf_counter()
        losses = []
        for loss in parallel.train(training_batches(config, data, epoch)):
            losses.append(loss)
            lr = parallel.learning_rate
            record({"event": "batch", "epoch": epoch + 1, "batch": batch, "loss": loss, "lr": lr})
            batch += 1
        epoch_s = time.perf_counter() - begin
        training_s += epoch_s
        evaluates = is_evaluated_after(config, epoch)
        result = {
            "event": "epoch",
            "epoch": epoch + 1,
            "train_loss": sum(losses) / len(losses),
            "test_accuracy": parallel.evaluate(evaluation_batches(config, data), accuracy) if evaluates else None,
            "lr": parallel.learning_rate,
            "samples_per_s": len(data.train) / epoch_s,
            "epoch_s": epoch_s,
        }
        record(result)
        if writer is not None:
            writer.flush()
    return {
        "test_accuracy": result["test_accuracy"],
        "train_loss": result["train_loss"],
        "wall_time_s": time.perf_counter() - start,
        "training_s": training_s,
        "samples_per_s": config.epochs * len(data.train) / training_s,
        "batches": batch,
        "epochs": config.epochs,
    }
