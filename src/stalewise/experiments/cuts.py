"""The cuts that all methods of a comparison share, from one profile of the model.

Where a stage recomputes, it has more to do, so the best cuts of DSP are not those of PipeDream. Of the best cuts of
every method, those are taken with which the method that fares worst loses the least:

    method       step with its own best cuts   with those of the other
    DSP          40 ms                         44 ms: loses 10%
    PipeDream    33 ms                         40 ms: loses 21%           so both get the cuts of PipeDream

Backpropagation has no say: its stages take turns, so a step takes as long with any cuts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from stalewise.arguments import resolve_device
from stalewise.engine.precision import Precision
from stalewise.engine.split import Chain
from stalewise.errors import PlanError
from stalewise.experiments.config import TrainConfig
from stalewise.experiments.profiling import first_batch
from stalewise.experiments.run_model import build_run_model
from stalewise.experiments.training import default_threads
from stalewise.methods import BP, Method
from stalewise.plan.memory import predict_memory
from stalewise.plan.partition import LayerCost, Partition, fixed_partition, partition
from stalewise.planning import measure, share_batch
from stalewise.runtime.exchange import broadcast_json
from stalewise.runtime.job import Job, current_job, in_launched_job

__all__ = ["common_cuts", "plan_cuts"]


def plan_cuts(config: TrainConfig, methods: Mapping[str, Method]) -> dict[str, Any]:
    """Profile the model once, choose cuts, and predict what each method needs with them; collective in a job.

    Args:
        config: what all runs share; its partition is "profile" or the cuts.
        methods: by the names of their rows.

    Returns:
        JSON values: `cuts`, `layers` and `stages` as in partition.json of a run, `method` ("profile" or "fixed"), and
        for each row its predicted step and its predicted memory per stage.

    Raises:
        PlanError: where the model cannot be cut so.
    """
    layers: Sequence[LayerCost] = ()
    job = current_job() if in_launched_job() and config.engine == "distributed" else None
    torch.set_num_threads(config.threads or default_threads(config))
    first, num_classes = first_batch(config) if job is None or job.rank == 0 else ([], 0)
    (batch,) = share_batch(first, job)
    try:
        layers = _profile(config, batch, num_classes, job)
    except PlanError:
        # A layer that cannot be timed by itself; with given cuts that costs the predictions alone.
        if config.partition == "profile":
            raise
    if not layers:
        return {"method": "fixed", "cuts": list(config.partition), "predicted": {}}
    best = {
        name: partition(layers, recompute=[stage.recomputes for stage in method.program().stages])
        for name, method in methods.items()
    }
    if isinstance(config.partition, tuple):
        cuts = config.partition
    else:
        cuts = common_cuts({name: plan for name, plan in best.items() if not isinstance(methods[name], BP)} or best)
    chosen = {name: fixed_partition(layers, cuts, recompute=plan.recompute) for name, plan in best.items()}
    plain = fixed_partition(layers, cuts, recompute=[False] * config.stages)
    return {
        "method": "profile" if config.partition == "profile" else "fixed",
        **plain.as_dict(),
        "predicted": {
            name: {
                "step_s": plan.predicted_step_s,
                "step_with_best_cuts_s": best[name].predicted_step_s,
                "best_cuts": list(best[name].cuts),
                "memory": _memory(config, plan, methods[name], batch),
            }
            for name, plan in chosen.items()
        },
    }


def _profile(config: TrainConfig, batch: Any, num_classes: int, job: Job | None) -> Sequence[LayerCost]:
    """The layers with what was measured of them, by all ranks at the same time."""
    device = resolve_device(config.device, job)
    if job is not None:
        num_classes = broadcast_json(num_classes, 0, job.group)
    chain = Chain(build_run_model(config, num_classes=num_classes)).built()
    precision = Precision(config.autocast)
    return measure(
        chain, batch, cross_entropy, device=device, job=job, num_stages=config.stages, precision=precision
    ).layers


def common_cuts(best: Mapping[str, Partition]) -> tuple[int, ...]:
    """Of the best cuts of each method, those with which the greatest loss of any method is the smallest.

    Args:
        best: the best partition of each method, of the same layers with known times. Of equals the first is taken.
    """

    def greatest_loss(cuts: tuple[int, ...]) -> float:
        return max(
            (fixed_partition(plan.layers, cuts, recompute=plan.recompute).predicted_step_s or 0.0)
            / (plan.predicted_step_s or 1.0)
            for plan in best.values()
        )

    return min((plan.cuts for plan in best.values()), key=greatest_loss)


def _memory(config: TrainConfig, plan: Partition, method: Method, batch: Any) -> list[dict[str, int]]:
    inputs, targets = batch
    stages = predict_memory(
        plan,
        method.program(),
        input_bytes=inputs.nbytes,
        target_bytes=targets.nbytes,
        optimizer_copies=1.0 if config.momentum else 0.0,
        timing="lockstep" if config.engine == "sequential" else "slow",
    )
    return [stage.as_dict() for stage in stages]
