"""A plan for a method that leaves its staleness to it: cuts first, then the depth that their jitter needs, then again.

The second plan is for the depth that was chosen, because queues take memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from stalewise.methods.method import Method
from stalewise.plan.depth import Jitter, choose_depth
from stalewise.plan.partition import LayerCost
from stalewise.plan.planner import Plan, plan_stages
from stalewise.protocol.actions import Kind
from stalewise.timing import LinkCost, Links

__all__ = ["jitter_of_passes", "plan_links", "plan_times", "plan_with_depth"]

Passes = Sequence[Sequence[Sequence[float]]]
"""[rank][layer][pass], seconds."""


def plan_with_depth(
    layers: Sequence[LayerCost],
    method: Method,
    jitter: Callable[[tuple[int, ...]], Jitter],
    *,
    target_bytes: int = 0,
    **options: Any,
) -> Plan:
    """`plan_stages`, and where the method leaves its staleness to the plan, the depth, too.

    Args:
        layers: see `plan_stages`.
        method: of K stages.
        jitter: cuts -> jitter of the stages; asked only where staleness is to be chosen.
        target_bytes: of a batch, which travel with the activations.
        options: see `plan_stages`.

    Raises:
        PlanError: see `plan_stages`.
    """
    plan = plan_stages(layers, method, **options)
    if method.knows_staleness:
        return plan
    links = plan_links(plan, target_bytes)
    depth = choose_depth(
        lambda staleness: plan.method.with_staleness(staleness).program(),
        plan_times(plan),
        jitter(plan.partition.cuts),
        links=links,
    )
    return replace(plan_stages(layers, method.with_staleness(depth.staleness), **options), depth=depth)


def jitter_of_passes(passes: Passes, cuts: Sequence[int]) -> Jitter:
    """Of stages, from repeated timings of their layers on their own ranks.

    Args:
        passes: of every layer on every rank; where there is one rank, it stands for all.
        cuts: of the stages.
    """
    num_layers = len(passes[0])
    bounds = [0, *cuts, num_layers]
    times = []
    for stage in range(len(cuts) + 1):
        own = passes[stage if len(passes) > 1 else 0][bounds[stage] : bounds[stage + 1]]
        times.append([sum(moment) for moment in zip(*own, strict=False)])
    return Jitter.of_times(times)


def plan_times(plan: Plan) -> dict[Kind, list[int]]:
    """Nanoseconds of each stage's passes over a batch, on its own device."""
    stages = plan.partition.stages
    times = {
        kind: [
            round(1e9 * (cost or 0.0) * slowdown)
            for cost, slowdown in zip((getattr(stage, field) for stage in stages), plan.slowdowns, strict=True)
        ]
        for kind, field in ((Kind.FORWARD, "forward_s"), (Kind.BACKWARD, "backward_s"))
    }
    return {**times, Kind.RECOMPUTE: times[Kind.FORWARD]}


def plan_links(plan: Plan, target_bytes: int = 0) -> Links:
    """What a batch's messages cost between the stages."""
    sizes = [plan.partition.layers[cut - 1].output_bytes or 0 for cut in plan.partition.cuts]
    speed = {"latency_s": plan.link.latency_s, "bytes_per_s": plan.link.bytes_per_s}
    return Links(
        activations=tuple(LinkCost.of_bytes(size + target_bytes, **speed) for size in sizes),
        gradients=tuple(LinkCost.of_bytes(size, **speed) for size in sizes),
        token=LinkCost(latency_ns=round(1e9 * plan.link.latency_s)),
    )
