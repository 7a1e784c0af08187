"""Going on with other stages, cuts or another method than those of the checkpoint.

The batches in flight belong to the old stages: each of these still owes some of them an update. So the old pipeline is
built once more, in one process, from the same layers, and drained; then every batch has changed every weight exactly
once, and weights and optimizer state go to the new stages by parameter name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stalewise.checkpoint.codec import Packer, unpack
from stalewise.checkpoint.manifest import Manifest
from stalewise.engine.engine import Engine
from stalewise.engine.sequential import SequentialEngine
from stalewise.engine.stage import Stage
from stalewise.engine.state import named_optimizer_state
from stalewise.errors import CheckpointError, ConfigError, NonFiniteLoss
from stalewise.methods import Method, rebuild_method
from stalewise.runtime.exchange import broadcast_json, broadcast_tensors
from stalewise.runtime.job import Job
from stalewise.runtime.resuming import cut_of, read_stages

__all__ = ["Moved", "move_in", "move_out", "saved_method", "share"]

_CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class Moved:
    """A drained run without its stages.

    Args:
        num_batches: that it was trained on.
        losses: of the batches that were in flight.
        seed: of its random layers.
        model: parameters and buffers by name.
        optimizer: state and groups by parameter name.
        schedulers: state of each old stage's scheduler, with the names of its parameter groups' first parameters.
        num_updates: of each old stage.
        loader: state of the iterable that was being read, or None.
    """

    num_batches: int
    losses: list[float]
    seed: int
    model: dict[str, Tensor]
    optimizer: dict[str, Any]
    schedulers: list[tuple[list[str], dict[str, Any]]]
    num_updates: list[int]
    loader: Any


def saved_method(manifest: Manifest) -> Method | None:
    """The method of a checkpoint; None for one of the user's own, which only the user can build."""
    if manifest.method is None:
        return None
    try:
        name, options = manifest.method
        return rebuild_method(name, options, num_stages=manifest.num_stages)
    except (TypeError, ValueError, ConfigError) as error:
        raise CheckpointError(f"its manifest names a method that cannot be built: {error}") from None


def move_out(path: Path, manifest: Manifest, engine: SequentialEngine) -> Moved:
    """Drain a saved run.

    Args:
        path: of the checkpoint.
        manifest: of it.
        engine: of the saved method, its cuts, and the same layers; it has done nothing yet.
    """
    _, stages = read_stages(path, range(manifest.num_stages), device=engine.held_stages[0].device)
    engine.check(stages)
    engine.restore(cut_of(manifest), stages)
    try:
        losses = [loss.item() for loss in engine.drain()]
    except NonFiniteLoss as error:
        raise CheckpointError(f"its batches in flight cannot be finished: {error}") from None
    held = engine.held_stages
    return Moved(
        num_batches=engine.num_batches,
        losses=losses,
        seed=manifest.seed,
        model=engine.state_dict(),
        optimizer=engine.optimizer_state_dict(),
        schedulers=[
            ([group["params"][0] for group in named_optimizer_state(stage)["param_groups"]], _scheduler_state(stage))
            for stage in held
            if stage.lr_scheduler is not None
        ],
        num_updates=[stage.num_updates for stage in held],
        loader=stages[0]["loader"],
    )


def share(moved: Callable[[], Moved], job: Job | None) -> Moved:
    """What rank 0 moved out, on all ranks."""
    if job is None:
        return moved()
    packer = Packer()
    problem: str | None = None
    packed = None
    if job.rank == 0:
        try:
            packed = packer.pack(vars(moved()), "the state of the run")
        except CheckpointError as error:
            problem = str(error)
    packed, problem = broadcast_json([packed, problem], 0, job.group)
    if problem is not None:
        raise CheckpointError(problem)
    tensors = broadcast_tensors(packer.tensors if job.rank == 0 else None, 0, job.group)
    return Moved(**unpack(packed, tensors, device=_CPU))


def move_in(moved: Moved, engine: Engine) -> None:
    """Put the state of a drained run into other stages, by parameter name.

    Raises:
        ConfigError: where it has no value for one of their parameters.
    """
    engine.load_state_dict(moved.model)
    engine.load_optimizer_state_dict(moved.optimizer)
    engine.continue_after(moved.num_batches)
    for stage in engine.held_stages:
        stage.seed = moved.seed
        stage.num_updates = max(moved.num_updates)
        if stage.lr_scheduler is not None and moved.schedulers:
            _load_scheduler(stage, moved.schedulers)


def _scheduler_state(stage: Stage) -> dict[str, Any]:
    assert stage.lr_scheduler is not None
    return dict(stage.lr_scheduler.state_dict())


def _load_scheduler(stage: Stage, saved: list[tuple[list[str], dict[str, Any]]]) -> None:
    """Take the state of a stage with as many parameter groups; else what no group has a part in."""
    assert stage.lr_scheduler is not None
    groups = len(named_optimizer_state(stage)["param_groups"])
    states = [state for names, state in saved if len(names) == groups]
    if states:
        stage.lr_scheduler.load_state_dict(states[0])
        return
    counters: Mapping[str, Any] = {
        name: value for name, value in saved[0][1].items() if not isinstance(value, list | tuple | dict)
    }
    stage.lr_scheduler.load_state_dict({**stage.lr_scheduler.state_dict(), **counters})
