"""From the first batch to a plan: measure the layers on the devices that will run them, all at the same time.

    rank 0: the batch ──► every rank: profile_layers ──► all: median of each layer, slow-down of each rank ──► plan

The ranks measure together because they will compute together: they share caches, memory and, on one GPU, the device.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from stalewise.engine.feed import check_batch
from stalewise.engine.precision import FULL_PRECISION, Precision
from stalewise.engine.split import Chain
from stalewise.engine.stage import LossFunction
from stalewise.engine.tree import flatten, unflatten
from stalewise.errors import ConfigError
from stalewise.plan.partition import LayerCost
from stalewise.plan.planner import BatchBytes
from stalewise.plan.profile import profile_layers
from stalewise.runtime.exchange import all_gather_json, broadcast_json, broadcast_tensors
from stalewise.runtime.job import Job

__all__ = ["JITTER_REPEATS", "Measured", "measure", "optimizer_copies", "parse_bytes", "share_batch"]

JITTER_REPEATS = 12
"""Timed passes of each layer where the variation of steps matters."""

SAME_SPEED = 0.15
"""Devices whose times differ by less count as equally fast: so much may be noise."""

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What a plan needs to know.

    Args:
        layers: with the times of a device of middle speed.
        slowdowns: of each rank's device against that, 1 for equally fast ones.
        inputs: bytes of the batch's inputs.
        targets: bytes of its targets.
        passes: [rank][layer][pass], seconds of each timed pass.
    """

    layers: tuple[LayerCost, ...]
    slowdowns: tuple[float, ...]
    inputs: int
    targets: int
    passes: tuple[tuple[tuple[float, ...], ...], ...]

    def batch(self, optimizer_copies: float) -> BatchBytes:
        """The sizes of the batch, with those of the optimizer's state."""
        return BatchBytes(inputs=self.inputs, targets=self.targets, optimizer_copies=optimizer_copies)


def share_batch(first: Sequence[Any], job: Job | None) -> list[Any]:
    """The first batch of rank 0 on every rank, or nothing where there is none; collective in a job.

    Raises:
        ConfigError: where the batch is not valid.
    """
    for batch in first:
        check_batch(batch)
    if job is None:
        return list(first)
    described, tensors = None, None
    if job.rank == 0:
        leaves, described = flatten(list(first), "a batch")
        tensors = {str(index): leaf.cpu() for index, leaf in enumerate(leaves)}
    structure = broadcast_json(described, 0, job.group)
    received = broadcast_tensors(tensors, 0, job.group)
    return list(first) if job.rank == 0 else list(unflatten(structure, list(received.values())))


def measure(
    chain: Chain,
    batch: Any,
    loss_fn: LossFunction,
    *,
    device: torch.device,
    job: Job | None,
    num_stages: int,
    precision: Precision = FULL_PRECISION,
    repeats: int = 3,
) -> Measured:
    """Profile every layer with a batch; collective in a job.

    Args:
        chain: the model.
        batch: (inputs, targets), the same on all ranks.
        loss_fn: see `Pipeline`.
        device: of this rank.
        job: of the ranks; None: one process.
        num_stages: K.
        precision: of the passes.
        repeats: timed passes of each layer, see `profile_layers`.

    Raises:
        PlanError: where a layer cannot be timed.
    """
    inputs, targets = batch
    own = profile_layers(
        chain.layers,
        inputs,
        targets,
        loss_fn,
        device=device,
        names=chain.names,
        region=precision.region,
        repeats=repeats,
    )
    measured = [own]
    if job is not None:
        everyone = all_gather_json([vars(cost) for cost in own], job.group)
        measured = [[LayerCost(**cost) for cost in costs] for costs in everyone]
    layers = tuple(_middle(same) for same in zip(*measured, strict=True))
    usual = _total_s(layers)
    slowdowns = [_total_s(costs) / usual if usual else 1.0 for costs in measured]
    return Measured(
        layers=layers,
        slowdowns=tuple(1.0 if abs(slowdown - 1) < SAME_SPEED else slowdown for slowdown in slowdowns)
        if job is not None
        else (1.0,) * num_stages,
        inputs=_nbytes(inputs),
        targets=_nbytes(targets),
        passes=tuple(tuple(tuple(cost.passes_s or ()) for cost in costs) for costs in measured),
    )


def optimizer_copies(recipe: Callable[[Any], Optimizer]) -> float:
    """Elements of state that an optimizer keeps per trained weight: 0 for SGD, 1 with momentum, 2 for Adam.

    Calls the recipe with a small parameter of its own and lets it step once.
    """
    size = 1024
    weight = nn.Parameter(torch.zeros(size))
    weight.grad = torch.ones(size)
    optimizer = recipe([weight])
    optimizer.step()
    return (
        sum(
            value.numel()
            for state in optimizer.state.values()
            for value in state.values()
            if isinstance(value, Tensor) and value.numel() >= size
        )
        / size
    )


def parse_bytes(value: int | str) -> int:
    """A number of bytes: 2_000_000, "2GB", "1.5GiB".

    Raises:
        ConfigError: where it is none.
    """
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return value
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmg]i?|)b?\s*", value.lower()) if isinstance(value, str) else None
    if match is None or not (size := round(float(match[1]) * _UNITS[match[2]])):
        raise ConfigError(f'memory_limit is {value!r}; give bytes, such as 2000000, "500MB" or "2GiB".')
    return size


def _middle(same: Sequence[LayerCost]) -> LayerCost:
    """One layer, measured on several devices."""
    forward = [cost.forward_s for cost in same if cost.forward_s is not None]
    backward = [cost.backward_s for cost in same if cost.backward_s is not None]
    passes = None if same[0].passes_s is None else tuple(same[0].passes_s)
    return replace(
        same[0], forward_s=statistics.median(forward), backward_s=statistics.median(backward), passes_s=passes
    )


def _total_s(layers: Sequence[LayerCost]) -> float:
    return sum((cost.forward_s or 0.0) + (cost.backward_s or 0.0) for cost in layers)


def _nbytes(tree: Any) -> int:
    return sum(leaf.numel() * leaf.element_size() for leaf in flatten(tree)[0])
