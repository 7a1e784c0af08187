"""What a plan for a run needs, measured once: layers, devices, links, and what a user might do instead.

K processes measure at the same time, with the threads that the stages will have:

    every layer with a whole batch                  the stages
    every layer with a K-th of a batch              data parallelism
    messages from rank to rank                      the links
    every layer with all cores, rank 0 alone        one process

A profile is kept in the cache, by everything that it depends on.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from stalewise._version import __version__
from stalewise.arguments import resolve_device
from stalewise.data import default_cache_dir
from stalewise.engine.precision import Precision
from stalewise.engine.split import Chain
from stalewise.errors import ConfigError
from stalewise.experiments.config import TrainConfig
from stalewise.experiments.environment import processor_name
from stalewise.experiments.optimizers import optimizer_recipe
from stalewise.experiments.run_data import load_run_data, training_batches
from stalewise.experiments.run_model import build_run_model, check_run_model
from stalewise.experiments.run_writer import write_json
from stalewise.plan.partition import LayerCost
from stalewise.plan.planner import BatchBytes
from stalewise.plan.profile import profile_layers
from stalewise.plan.tree import map_tensors
from stalewise.planning import JITTER_REPEATS, measure, optimizer_copies, share_batch
from stalewise.runtime.cores import threads_per_process, usable_cores
from stalewise.runtime.exchange import all_gather_json, broadcast_json
from stalewise.runtime.job import Job, current_job
from stalewise.runtime.launch import launch
from stalewise.runtime.link_speed import measure_link

__all__ = ["ModelProfile", "first_batch", "profile_run"]

_MATTERS = (
    "model",
    "data",
    "data_dir",
    "stages",
    "batch_size",
    "device",
    "threads",
    "channels_last",
    "autocast",
    "momentum",
)
"""Fields of a configuration that a profile depends on."""


@dataclass(frozen=True, kw_only=True)
class ModelProfile:
    """What was measured; times in seconds per batch.

    Args:
        layers: with the times of a device of middle speed.
        slowdowns: of each rank's device against that.
        inputs: bytes of a batch's inputs.
        targets: bytes of its targets.
        optimizer_copies: elements of optimizer state per trained weight.
        threads: of a stage.
        link_bytes_per_s: that one direction of a link carries.
        link_latency_s: of a small message.
        one_process_s: forward and backward of a batch in one process with all cores.
        data_parallel_s: forward and backward of a K-th of a batch in each of K processes, the slowest one.
        batch_size: samples.
        passes: [rank][layer][pass], seconds of each timed pass: how much they vary.
    """

    layers: tuple[LayerCost, ...]
    slowdowns: tuple[float, ...]
    inputs: int
    targets: int
    optimizer_copies: float
    threads: int
    link_bytes_per_s: float
    link_latency_s: float
    one_process_s: float
    data_parallel_s: float | None
    batch_size: int
    passes: tuple[tuple[tuple[float, ...], ...], ...]

    @property
    def batch(self) -> BatchBytes:
        """Sizes for a plan."""
        return BatchBytes(inputs=self.inputs, targets=self.targets, optimizer_copies=self.optimizer_copies)

    def as_dict(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ModelProfile:
        """What `as_dict` gave."""
        layers = tuple(
            LayerCost(**{**layer, "passes_s": None if layer["passes_s"] is None else tuple(layer["passes_s"])})
            for layer in values["layers"]
        )
        passes = tuple(tuple(map(tuple, of_rank)) for of_rank in values["passes"])
        return cls(**{**values, "layers": layers, "slowdowns": tuple(values["slowdowns"]), "passes": passes})


def profile_run(config: TrainConfig, *, refresh: bool = False) -> tuple[ModelProfile, Path, bool]:
    """Measure what a run of this configuration needs to know, or read it from the cache.

    Starts a process per stage and blocks until they are done.

    Args:
        config: of the run; its method does not matter.
        refresh: measure, whatever the cache holds.

    Returns:
        The profile, its file, and whether it was measured now.

    Raises:
        ConfigError: where the model or the data are not valid.
        WorkerError: where a process failed.
    """
    path = default_cache_dir() / "profiles" / f"{_key(config)}.json"
    if not refresh:
        try:
            return ModelProfile.from_dict(json.loads(path.read_text(encoding="utf-8"))["profile"]), path, False
        except (OSError, ValueError, TypeError, KeyError):
            pass
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"cannot keep a profile in {path.parent}: {error.strerror}. Set STALEWISE_CACHE to a folder for it."
        ) from None
    check_run_model(config)
    with tempfile.TemporaryDirectory(prefix="stalewise-profile-") as folder:
        write_json(Path(folder) / "config.json", config.as_dict())
        launch(profile_worker, num_workers=config.stages, args=[folder])
        found = json.loads((Path(folder) / "profile.json").read_text(encoding="utf-8"))
    profile = ModelProfile.from_dict(found)
    write_json(path, {"of": _describe(config), "profile": profile.as_dict()})
    return profile, path, True


def profile_worker(folder: str) -> None:
    """What each rank measures; rank 0 leaves profile.json in the folder."""
    config = TrainConfig.read(Path(folder) / "config.json")
    profile = measure_run(config, current_job())
    if current_job().rank == 0:
        write_json(Path(folder) / "profile.json", profile.as_dict())


def measure_run(config: TrainConfig, job: Job) -> ModelProfile:
    """Measure; collective, in a job of one rank per stage."""
    cores = usable_cores()
    threads = config.threads or threads_per_process(job.world_size)
    torch.set_num_threads(threads)
    device = resolve_device(config.device, job)
    first, num_classes = first_batch(config) if job.rank == 0 else ([], 0)
    num_classes = broadcast_json(num_classes, 0, job.group)
    (batch,) = share_batch(first, job)
    chain = Chain(build_run_model(config, num_classes=num_classes)).built()
    precision = Precision(config.autocast)
    measured = measure(
        chain,
        batch,
        cross_entropy,
        device=device,
        job=job,
        num_stages=job.world_size,
        precision=precision,
        repeats=JITTER_REPEATS,
    )

    def total_s(samples: int) -> float:
        inputs, targets = (map_tensors(lambda tensor: tensor[:samples], part) for part in batch)
        layers = profile_layers(
            chain.layers,
            inputs,
            targets,
            cross_entropy,
            device=device,
            names=chain.names,
            region=precision.region,
        )
        return sum((layer.forward_s or 0.0) + (layer.backward_s or 0.0) for layer in layers)

    part = config.batch_size // job.world_size
    data_parallel_s = max(all_gather_json(total_s(part), job.group)) if part else None
    bytes_per_s, latency_s = measure_link(job.group)
    one_process_s = 0.0
    if job.rank == 0:
        torch.set_num_threads(cores)
        one_process_s = total_s(config.batch_size)
        torch.set_num_threads(threads)
    return ModelProfile(
        layers=measured.layers,
        slowdowns=measured.slowdowns,
        inputs=measured.inputs,
        targets=measured.targets,
        optimizer_copies=optimizer_copies(optimizer_recipe(config)),
        threads=threads,
        link_bytes_per_s=bytes_per_s,
        link_latency_s=latency_s,
        one_process_s=broadcast_json(one_process_s, 0, job.group),
        data_parallel_s=data_parallel_s,
        batch_size=config.batch_size,
        passes=measured.passes,
    )


def first_batch(config: TrainConfig) -> tuple[list[Any], int]:
    """The first batch of a run, in a list, and the number of classes."""
    data = load_run_data(config)
    batches = training_batches(replace(config, loader_workers=0), data, 0)
    return list(islice(batches, 1)), data.num_classes


def _describe(config: TrainConfig) -> dict[str, Any]:
    """Everything that a profile depends on."""
    values = config.as_dict()
    return {
        **{name: values[name] for name in _MATTERS},
        "processor": processor_name(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "stalewise": __version__,
    }


def _key(config: TrainConfig) -> str:
    return hashlib.sha256(json.dumps(_describe(config), sort_keys=True).encode()).hexdigest()[:24]
