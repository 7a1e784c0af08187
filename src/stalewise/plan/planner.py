"""Cuts and what every stage keeps, chosen together: the fastest plan that the memory allows.

    layers with times and sizes ─┐
    method (staleness)          ─┼─► for every span of layers on every stage, with and without recompute:
    memory limit, link, speeds  ─┘     time  = slowdown_k * (forward + backward (+ forward once more))
                                               at least what the link into the stage needs for a batch
                                       bytes = the most that the stage ever holds  (plan.memory)
                                 ──► dynamic programming over spans (plan.split)

The slowest stage decides how long a step takes (docs/timing.md), so its time is the objective. Where the method
leaves it to the plan (`DSP(activations="auto")`), a stage stores its graphs only if recomputing would bring it near
the slowest one: a faster stage would only wait longer, and graphs take memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stalewise.errors import PlanError
from stalewise.methods.method import Activations, Method
from stalewise.plan.depth import Depth
from stalewise.plan.memory import Holdings, StageMemory, predict_memory, span_bytes, stage_holdings
from stalewise.plan.partition import LayerCost, Partition, check_cuts, check_room, fixed_partition
from stalewise.plan.split import NEVER, Spans, Split, best_split, in_units, span_sums

__all__ = ["BatchBytes", "Link", "Plan", "plan_stages"]

HEADROOM = 0.9
"""A stage recomputes where that leaves it below this part of the slowest one; closer ones meet each other's jitter."""

_SCORE_BITS = 50


@dataclass(frozen=True, kw_only=True)
class BatchBytes:
    """Bytes of one batch as it is loaded.

    Args:
        inputs: of the model.
        targets: that travel along with the activations.
        optimizer_copies: of the trained weights in the optimizer's state: 0 for SGD, 1 with momentum, 2 for Adam.
    """

    inputs: int
    targets: int
    optimizer_copies: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Link:
    """What joins two stages, the same in both directions.

    Args:
        bytes_per_s: that it carries.
        latency_s: of a message; stages without slack wait for it.
    """

    bytes_per_s: float = float("inf")
    latency_s: float = 0.0

    def __post_init__(self) -> None:
        if not self.bytes_per_s > 0 or not self.latency_s >= 0:
            raise PlanError(
                f"a link of {self.bytes_per_s} bytes/s and {self.latency_s} s cannot be; give a rate above 0 and a "
                "latency of at least 0."
            )


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How a model is run as stages.

    Args:
        method: with what every stage keeps.
        partition: the cuts, with the cost of each stage on a device of ordinary speed.
        slowdowns: of each stage's device against the one that was measured.
        link: between stages.
        memory: the most that each stage will hold, the slow stage's queues full; None where sizes are unknown.
        memory_limit: bytes that each stage may hold, or None.
        depth: how the staleness was chosen; None where it was given.
    """

    method: Method
    partition: Partition
    slowdowns: tuple[float, ...]
    link: Link
    memory: tuple[StageMemory, ...] | None
    memory_limit: int | None
    depth: Depth | None = None

    @property
    def activations(self) -> tuple[Activations | None, ...]:
        """What each stage keeps of a forward; None where its backward follows at once."""
        return tuple(
            "recompute" if stage.recomputes else "stored" if stage.backward_lag else None
            for stage in self.method.program().stages
        )

    @property
    def stage_s(self) -> tuple[float | None, ...]:
        """Seconds that each stage computes per batch, on its own device."""
        return tuple(
            None if cost is None else cost * slowdown
            for cost, slowdown in zip(self.partition.stage_costs_s, self.slowdowns, strict=True)
        )

    @property
    def link_s(self) -> tuple[float | None, ...]:
        """Seconds that each link k -> k+1 carries a batch's activations; None where a size is unknown."""
        ends = self.partition.cuts
        sizes = [self.partition.layers[end - 1].output_bytes for end in ends]
        return tuple(None if size is None else size / self.link.bytes_per_s for size in sizes)


def plan_stages(
    layers: Sequence[LayerCost],
    method: Method,
    *,
    batch: BatchBytes | None = None,
    memory_limit: int | None = None,
    slowdowns: Sequence[float] | None = None,
    link: Link | None = None,
    cuts: Sequence[int] | None = None,
) -> Plan:
    """The plan whose slowest stage is the fastest that any has within the memory, exactly.

    Args:
        layers: L of them in order, with known times.
        method: of K stages.
        batch: sizes, for which memory is predicted.
        memory_limit: bytes that every stage may hold (`StageMemory.total`: tensors that live between actions, not the
            workspaces of a layer while it runs).
        slowdowns: K factors, how much longer each stage's device takes than the one on which `layers` were measured.
        link: between stages; None: its time does not count.
        cuts: fixed ones, for which only the activations are chosen.

    Raises:
        PlanError: where there are fewer layers than stages, a time is unknown, or nothing fits the memory; the message
            names the stage that needs the most and what would fit.
    """
    check_room(len(layers), method.num_stages)
    cuts = None if cuts is None else check_cuts(cuts, len(layers), method.num_stages)
    factors = _checked_slowdowns(slowdowns, method.num_stages)
    link = link or Link()
    ways = _ways(method)
    times = [_seconds(layers, way) for way in ways]
    total = max(factors) * max(float(of_stage.sum()) for of_way in times for of_stage in of_way)
    costs = _costs(times, total, factors, layers, link, batch)
    memory = None if batch is None or not _known(layers) else _memory(layers, ways, batch)
    if memory_limit is not None:
        if memory is None:
            raise PlanError(
                "memory_limit was given and what the layers keep is not known, so nothing can be held to it. Profile "
                "the layers with a batch, or leave memory_limit out."
            )
        costs = [
            [np.where(held > memory_limit, NEVER, spans) for spans, held in zip(of_stage, held_of, strict=True)]
            for of_stage, held_of in zip(costs, memory, strict=True)
        ]
    if cuts is not None:
        costs = _only(costs, cuts, len(layers))
    split = best_split(costs, None if len(ways) == 1 else _thrifty(costs, memory))
    if split is None:
        assert memory is not None
        assert memory_limit is not None
        raise PlanError(_what_would_fit(costs, memory, memory_limit, cuts, len(layers)))
    return _plan(layers, method, split, factors, link, batch, memory_limit)


def _checked_slowdowns(slowdowns: Sequence[float] | None, num_stages: int) -> tuple[float, ...]:
    factors = tuple(slowdowns or (1.0,) * num_stages)
    if len(factors) != num_stages or not all(0 < factor < float("inf") for factor in factors):
        raise PlanError(f"slowdowns is {slowdowns!r}; give a factor above 0 for each of the {num_stages} stages.")
    return factors


def _ways(method: Method) -> list[Method]:
    """The ways in which stages can run: one, or with recompute and with stored graphs."""
    if method.is_decided:
        return [method]
    return [method.with_activations("recompute"), method.with_activations("stored")]


def _seconds(layers: Sequence[LayerCost], method: Method) -> list[NDArray[np.float64]]:
    """Per stage, the seconds of each layer on a device of ordinary speed."""
    forward, backward = [], []
    for index, layer in enumerate(layers):
        if layer.forward_s is None or layer.backward_s is None:
            missing = "forward" if layer.forward_s is None else "backward"
            raise PlanError(
                f"layer {index} ({layer.name}, {layer.type}) has no known {missing} time; the best cuts "
                "follow from the times of all layers. Profile the layers, or give the cuts yourself."
            )
        forward.append(layer.forward_s)
        backward.append(layer.backward_s)
    once, back = np.asarray(forward), np.asarray(backward)
    return [(2 if stage.recomputes else 1) * once + back for stage in method.program().stages]


def _costs(
    times: list[list[NDArray[np.float64]]],
    total: float,
    factors: Sequence[float],
    layers: Sequence[LayerCost],
    link: Link,
    batch: BatchBytes | None,
) -> list[list[Spans]]:
    """[stage][way]: what every span costs in units: its compute, at least the time of the link into it."""
    arrival = np.zeros(len(layers) + 1)
    if link.bytes_per_s != float("inf"):
        targets = 0 if batch is None else batch.targets
        for start, layer in enumerate(layers[:-1], 1):
            arrival[start] = ((layer.output_bytes or 0) + targets) / link.bytes_per_s
    total = max(total, float(arrival.sum()))
    least = in_units(arrival, total)[:, None]
    return [
        [np.maximum(span_sums(of_way[stage] * factor, total), least) for of_way in times]
        for stage, factor in enumerate(factors)
    ]


def _thrifty(
    costs: list[list[Spans]], memory: list[list[NDArray[np.float64]]] | None
) -> Callable[[int, int], list[list[Spans]]]:
    """Among the fastest plans the one that needs the least memory; recompute (way 0) where there is headroom."""

    if memory is None:
        nothing, something = np.zeros(costs[0][0].shape), np.ones(costs[0][0].shape)
        memory = [[nothing, something] for _ in costs]
    most = max(float(held.max()) for of_stage in memory for held in of_stage)

    def scores(slowest: int, limit: int) -> list[list[Spans]]:
        chosen = []
        for (recompute, stored), held in zip(costs, memory, strict=True):
            near = recompute > HEADROOM * slowest
            allowed = [(recompute <= limit) & ~(near & (stored <= limit)), stored <= limit]
            chosen.append(
                [np.where(fits, _scaled(needed, most), NEVER) for fits, needed in zip(allowed, held, strict=True)]
            )
        return chosen

    return scores


def _scaled(values: NDArray[np.float64], most: float) -> Spans:
    return np.rint(values / max(most, 1.0) * 2.0**_SCORE_BITS).astype(np.int64)


def _only(costs: list[list[Spans]], cuts: Sequence[int], num_layers: int) -> list[list[Spans]]:
    """The costs of the spans that the cuts make; no others are allowed."""
    kept = []
    for (start, end), of_stage in zip(pairwise((0, *cuts, num_layers)), costs, strict=True):
        masked = [np.full(spans.shape, NEVER) for spans in of_stage]
        for mask, spans in zip(masked, of_stage, strict=True):
            mask[start, end] = spans[start, end]
        kept.append(masked)
    return kept


def _known(layers: Sequence[LayerCost]) -> bool:
    fields = ("graph_bytes", "unsaved_output_bytes", "saved_input_bytes", "weight_bytes", "output_bytes")
    return all(getattr(layer, field) is not None for layer in layers for field in (*fields, "changes_input"))


def _memory(layers: Sequence[LayerCost], ways: list[Method], batch: BatchBytes) -> list[list[NDArray[np.float64]]]:
    """[stage][way]: the most bytes that every span ever holds, as if its stage were the slow one."""
    holdings = [stage_holdings(way.program(), timing="slow") for way in ways]
    sizes = _span_sizes(layers, batch)
    return [
        [_most_bytes(_undominated(of_way[stage]), sizes) for of_way in holdings] for stage in range(len(holdings[0]))
    ]


_Sizes = dict[str, NDArray[np.float64]]


def _span_sizes(layers: Sequence[LayerCost], batch: BatchBytes) -> _Sizes:
    """The fields of `StageBytes` for every span i:j at [i, j]; empty spans hold anything."""
    count = len(layers)
    fields = list(vars(span_bytes(layers, 0, 1, batch.inputs, batch.targets, batch.optimizer_copies)))
    sizes = {field: np.zeros((count + 1, count + 1)) for field in fields}
    sums = ("weights", "trained", "saved_weights", "optimizer")
    for start in range(count):
        ahead: dict[str, float] = dict.fromkeys((*sums, "graph"), 0.0)
        let_go = 0
        for end in range(start + 1, count + 1):
            one = vars(span_bytes(layers, end - 1, end, batch.inputs, batch.targets, batch.optimizer_copies))
            for field in sums:
                ahead[field] += one[field]
                sizes[field][start, end] = ahead[field]
            sizes["graph"][start, end] = ahead["graph"] - let_go + one["graph"]
            ahead["graph"] += one["graph"]
            let_go += layers[end - 1].unsaved_output_bytes or 0
            sizes["output"][start, end] = one["output"]
        first = vars(span_bytes(layers, start, start + 1, batch.inputs, batch.targets, batch.optimizer_copies))
        for field in ("input", "target", "saved_input", "copies_input"):
            sizes[field][start] = first[field]
    return sizes


def _most_bytes(moments: Sequence[Holdings], sizes: _Sizes) -> NDArray[np.float64]:
    most = np.zeros(sizes["weights"].shape)
    for held in moments:
        copies = np.where(sizes["copies_input"] > 0, held.graphs, held.copied_inputs)
        most = np.maximum(
            most,
            sizes["weights"]
            + sizes["saved_weights"] * held.saved_weights
            + sizes["trained"] * (held.averages + held.gradients)
            + sizes["optimizer"] * held.optimizer
            + (sizes["input"] + sizes["target"]) * (held.stored + held.queued)
            + sizes["output"] * (held.stored_outputs - held.outputs_in_both + held.queued_outputs)
            + sizes["graph"] * held.graphs
            + sizes["saved_input"] * copies
            + sizes["input"] * held.queued_inputs,
        )
    return most


def _undominated(moments: Sequence[Holdings]) -> list[Holdings]:
    """Without those that hold no more of anything than another does."""
    rows = np.asarray([list(vars(held).values()) for held in moments], float)
    rows[:, list(vars(moments[0])).index("outputs_in_both")] *= -1
    kept: list[int] = []
    for index in np.argsort(-rows.sum(axis=1), kind="stable"):
        if not kept or not (rows[kept] >= rows[index]).all(axis=1).any():
            kept.append(int(index))
    return [moments[index] for index in sorted(kept)]


def _plan(
    layers: Sequence[LayerCost],
    method: Method,
    split: Split,
    factors: tuple[float, ...],
    link: Link,
    batch: BatchBytes | None,
    memory_limit: int | None,
) -> Plan:
    if not method.is_decided:
        names: tuple[Activations, ...] = ("recompute", "stored")
        # What a stage without lag would keep makes no difference; said as of stage 0, "stored" may be that of all.
        method = method.with_activations(
            [names[way if lag else split.ways[0]] for way, lag in zip(split.ways, method.staleness, strict=True)]
        )
    program = method.program()
    recompute = [stage.recomputes for stage in program.stages]
    plan = fixed_partition(layers, split.cuts, recompute=recompute)
    memory = None
    if batch is not None and _known(layers):
        memory = predict_memory(
            plan,
            program,
            input_bytes=batch.inputs,
            target_bytes=batch.targets,
            optimizer_copies=batch.optimizer_copies,
            timing="slow",
        )
    return Plan(
        method=method,
        partition=plan,
        slowdowns=factors,
        link=link,
        memory=None if memory is None else tuple(memory),
        memory_limit=memory_limit,
    )


def _what_would_fit(
    costs: list[list[Spans]],
    memory: list[list[NDArray[np.float64]]],
    memory_limit: int,
    cuts: Sequence[int] | None,
    num_layers: int,
) -> str:
    """Why no plan fits, and the least limit with which one does."""
    stages = range(len(memory))
    whole: list[list[Any]] = [[np.rint(held).astype(np.int64) for held in memory[stage]] for stage in stages]
    empty = np.tri(num_layers + 1, dtype=bool)
    whole = [[np.where(empty, NEVER, held) for held in ways] for ways in whole]
    least = best_split(_only(whole, cuts, num_layers) if cuts is not None else whole)
    assert least is not None
    bounds = list(pairwise((0, *least.cuts, num_layers)))
    needs = [int(whole[k][least.ways[k]][bounds[k]]) for k in stages]
    most = max(stages, key=needs.__getitem__)
    start, end = bounds[most]
    with_these = "with these cuts" if cuts is not None else "however the model is cut"
    return (
        f"no plan fits {memory_limit:,} bytes per stage {with_these}: at best stage {most} (layers {start}-{end - 1}) "
        f"needs {least.worst:,}. Raise the limit to that, use smaller batches or more stages, or less staleness."
    )
