"""Where a model is cut into stages, and what that costs.

    layers   0 1 2 3 | 4 5 | 6 7 8 9        cuts = (4, 6): the first layer of each stage but stage 0
    stage       0       1       2

    cost of stage k = its forwards + its backwards + its forwards once more, where it recomputes

In the steady state the stages work at the same time, so a step takes as long as the slowest of them
(docs/timing.md). The last stage of DSP does not recompute, so a good partition gives it more layers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from stalewise.errors import PlanError
from stalewise.plan.split import best_cuts

__all__ = ["LayerCost", "Partition", "StageCost", "check_cuts", "check_room", "fixed_partition", "partition"]

_MEMORY_FIELDS = (
    "graph_bytes",
    "unsaved_output_bytes",
    "saved_input_bytes",
    "weight_bytes",
    "gradient_bytes",
    "saved_weight_bytes",
)


@dataclass(frozen=True, kw_only=True)
class LayerCost:
    """What one layer costs for one batch.

    Args:
        forward_s: seconds of its forward; None where it is unknown.
        backward_s: seconds of its backward; None where it is unknown.
        output_bytes: size of its output; None where it is unknown.
        graph_bytes: what its forward leaves for the backward, and its output, but neither its input nor its weights
            (of the last layer: with the loss for an output); None where it is unknown.
        unsaved_output_bytes: of that, the part of its output that no backward needs, neither its own nor that of the
            layers after it: it is let go unless the stage ends here; None where it is unknown.
        saved_input_bytes: of its input, what the backward needs, its own or that of a layer to which it hands the
            input on; None where it is unknown.
        changes_input: whether its input is changed in place; None where it is unknown.
        weight_bytes: of its parameters and buffers; None where it is unknown.
        gradient_bytes: of its parameters that are trained; None where it is unknown.
        saved_weight_bytes: of its parameters that the backward needs, which stashing copies; None where it is unknown.
        passes_s: seconds of each timed pass, forward and backward, in their order; None where they are unknown.
        parameters: number of weights, frozen ones included.
        name: its place in the model, such as "blocks.3".
        type: its class, such as "BasicBlock".

    Raises:
        PlanError: where a number is negative, infinite or not a number.
    """

    forward_s: float | None = None
    backward_s: float | None = None
    output_bytes: int | None = None
    graph_bytes: int | None = None
    unsaved_output_bytes: int | None = None
    saved_input_bytes: int | None = None
    changes_input: bool | None = None
    weight_bytes: int | None = None
    gradient_bytes: int | None = None
    saved_weight_bytes: int | None = None
    passes_s: tuple[float, ...] | None = None
    parameters: int
    name: str
    type: str

    def __post_init__(self) -> None:
        for field in ("forward_s", "backward_s", "output_bytes", *_MEMORY_FIELDS, "parameters"):
            value = getattr(self, field)
            real = isinstance(value, int | float) and not isinstance(value, bool)
            if value is not None and not (real and math.isfinite(value) and value >= 0):
                raise PlanError(
                    f"{field} of layer {self.name!r} is {value}; a cost is a finite number >= 0. Leave "
                    "a time or a size out where it is not known."
                )


@dataclass(frozen=True, kw_only=True)
class StageCost:
    """What one stage costs for one batch; a time is None where that of one of its layers is.

    Args:
        start: its first layer.
        end: the layer after its last one.
        parameters: number of weights.
        forward_s: seconds of its forwards.
        recompute_s: seconds of its second forwards; 0 where it does not recompute.
        backward_s: seconds of its backwards.
    """

    start: int
    end: int
    parameters: int
    forward_s: float | None
    recompute_s: float | None
    backward_s: float | None

    @property
    def total_s(self) -> float | None:
        """Seconds of all three."""
        return _sum((self.forward_s, self.recompute_s, self.backward_s))


@dataclass(frozen=True, kw_only=True)
class Partition:
    """A model cut into stages; `partition` and `fixed_partition` make it.

    Args:
        layers: the L layers in order.
        cuts: K - 1 increasing layer indices: stage 0 is `layers[:cuts[0]]`, the last one `layers[cuts[-1]:]`.
        recompute: for each of the K stages, whether it forwards a second time before its backward.
    """

    layers: tuple[LayerCost, ...]
    cuts: tuple[int, ...]
    recompute: tuple[bool, ...]

    @property
    def num_stages(self) -> int:
        """K."""
        return len(self.recompute)

    @property
    def stages(self) -> tuple[StageCost, ...]:
        """The cost of each stage."""
        bounds = (0, *self.cuts, len(self.layers))
        return tuple(
            self._stage(start, end, recompute)
            for (start, end), recompute in zip(pairwise(bounds), self.recompute, strict=True)
        )

    @property
    def stage_costs_s(self) -> tuple[float | None, ...]:
        """Seconds per batch of each stage; None where it is unknown."""
        return tuple(stage.total_s for stage in self.stages)

    @property
    def slowest_stage(self) -> int | None:
        """The first of the slowest stages; None where a stage's cost is unknown."""
        slowest = self.predicted_step_s
        return None if slowest is None else self.stage_costs_s.index(slowest)

    @property
    def predicted_step_s(self) -> float | None:
        """Seconds per batch in the steady state, links not counted; None where a stage's cost is unknown."""
        known = _known(self.stage_costs_s)
        return None if known is None else max(known)

    @property
    def balance(self) -> float | None:
        """Mean over maximum of the stage costs, in (0, 1], 1 for equal stages; None where one is unknown."""
        known = _known(self.stage_costs_s)
        if known is None:
            return None
        return math.fsum(known) / len(known) / max(known) if max(known) else 1.0

    def table(self) -> str:
        """The stages as an aligned table, a line each: `first-last` layer, times, and `?` for the unknown."""
        slowest = self.predicted_step_s
        header = ["stage", "layers", "parameters", "forward ms", "recompute ms", "backward ms", "total ms"]
        rows = [[*header, "share of slowest"]]
        for index, stage in enumerate(self.stages):
            times = (stage.forward_s, stage.recompute_s, stage.backward_s, stage.total_s)
            share = None if stage.total_s is None or slowest is None else stage.total_s / (slowest or 1.0)
            rows.append(
                [
                    str(index),
                    f"{stage.start}-{stage.end - 1}",
                    f"{stage.parameters:,}",
                    *("?" if time is None else f"{1e3 * time:.3f}" for time in times),
                    "?" if share is None else f"{share:.1%}",
                ]
            )
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)

    def as_dict(self) -> dict[str, Any]:
        """The plan as JSON: `cuts`, `layers` with their stage, and `stages` with `layers` as [start, end).

        Times are seconds and sizes bytes; null where they are unknown.
        """
        stages = self.stages
        stage_of = [index for index, stage in enumerate(stages) for _ in range(stage.start, stage.end)]
        return {
            "cuts": list(self.cuts),
            "layers": [
                {
                    "index": index,
                    "name": layer.name,
                    "type": layer.type,
                    "parameters": layer.parameters,
                    "stage": stage_of[index],
                    "forward_s": layer.forward_s,
                    "backward_s": layer.backward_s,
                    "output_bytes": layer.output_bytes,
                    **{field: getattr(layer, field) for field in (*_MEMORY_FIELDS, "changes_input")},
                }
                for index, layer in enumerate(self.layers)
            ],
            "stages": [
                {
                    "stage": index,
                    "layers": [stage.start, stage.end],
                    "parameters": stage.parameters,
                    "predicted_s": stage.total_s,
                }
                for index, stage in enumerate(stages)
            ],
        }

    def _stage(self, start: int, end: int, recompute: bool) -> StageCost:
        layers = self.layers[start:end]
        forward_s = _sum(layer.forward_s for layer in layers)
        return StageCost(
            start=start,
            end=end,
            parameters=sum(layer.parameters for layer in layers),
            forward_s=forward_s,
            recompute_s=forward_s if recompute else 0.0,
            backward_s=_sum(layer.backward_s for layer in layers),
        )


def partition(layers: Sequence[LayerCost], *, recompute: Sequence[bool]) -> Partition:
    """The contiguous split whose slowest stage is the fastest that any split has.

    Among the splits that reach it (to one part in 10^9), the one with the smallest sum of squared stage
    costs; among equals, the one with the lexicographically smallest cuts, which keeps the first stages short.

    Args:
        layers: the layers in order, with known times.
        recompute: for each stage, whether it forwards a second time before its backward.

    Raises:
        PlanError: where there are fewer layers than stages, no stage at all, or a time is unknown.
    """
    check_room(len(layers), len(recompute))
    forward_s, backward_s = [], []
    for index, layer in enumerate(layers):
        if layer.forward_s is None or layer.backward_s is None:
            missing = "forward" if layer.forward_s is None else "backward"
            raise PlanError(
                f"layer {index} ({layer.name}, {layer.type}) has no known {missing} time; the best cuts "
                "follow from the times of all layers. Profile the layers, or give the cuts yourself."
            )
        forward_s.append(layer.forward_s)
        backward_s.append(layer.backward_s)
    flags = tuple(bool(flag) for flag in recompute)
    return Partition(layers=tuple(layers), cuts=best_cuts(forward_s, backward_s, flags), recompute=flags)


def fixed_partition(layers: Sequence[LayerCost], cuts: Sequence[int], *, recompute: Sequence[bool]) -> Partition:
    """The partition with these cuts, whatever it costs; times may be unknown.

    Args:
        layers: the layers in order.
        cuts: the first layer of each stage but stage 0; `check_cuts` says which are valid.
        recompute: for each stage, whether it forwards a second time before its backward.

    Raises:
        PlanError: where the cuts are not valid.
    """
    return Partition(
        layers=tuple(layers),
        cuts=check_cuts(cuts, len(layers), len(recompute)),
        recompute=tuple(bool(flag) for flag in recompute),
    )


def check_cuts(cuts: Sequence[int], num_layers: int, num_stages: int) -> tuple[int, ...]:
    """`cuts` as a tuple, once they are known to give every stage at least one layer.

    Args:
        cuts: `num_stages - 1` strictly increasing integers from 1 to `num_layers - 1`.
        num_layers: L.
        num_stages: K.

    Raises:
        PlanError: where they are not; the message gives cuts that are.
    """
    check_room(num_layers, num_stages)
    even = tuple(stage * num_layers // num_stages for stage in range(1, num_stages))
    if not isinstance(cuts, Sequence):
        raise PlanError(f"cuts is {cuts!r}; it must name the first layer of each stage but stage 0, such as {even}.")
    entries = tuple(cuts)
    for index, entry in enumerate(entries):
        if isinstance(entry, bool) or not isinstance(entry, int):
            raise PlanError(
                f"cuts[{index}] is {entry!r}; a cut is the index of a stage's first layer, so it must be an "
                f"integer. {num_layers} layers and {num_stages} stages could have {even}."
            )
    if len(entries) != num_stages - 1:
        raise PlanError(
            f"cuts {entries} make {len(entries) + 1} stages of {num_layers} layers; {num_stages} stages need "
            f"{num_stages - 1} of them, such as {even}."
        )
    for index, entry in enumerate(entries):
        if not 1 <= entry < num_layers:
            raise PlanError(
                f"cuts[{index}] is {entry}; with {num_layers} layers a cut lies between 1 and "
                f"{num_layers - 1}, so that no stage is empty. {num_stages} stages could have {even}."
            )
    for index, (before, after) in enumerate(pairwise(entries)):
        if before >= after:
            ordered = tuple(sorted(entries))
            repair = ordered if len(set(ordered)) == len(ordered) else even
            raise PlanError(
                f"cuts {entries} do not grow from cuts[{index}] to cuts[{index + 1}]; they must grow "
                f"strictly, so that no stage is empty. Did you mean {repair}?"
            )
    return entries


def check_room(num_layers: int, num_stages: int) -> None:
    """Refuse a number of stages that these layers cannot fill.

    Raises:
        PlanError: where there are fewer layers than stages, or none of either.
    """
    if num_layers < 1:
        raise PlanError("the model has no layers; each stage needs at least one. Give a model with layers.")
    if num_stages < 1:
        raise PlanError(f"{num_stages} stages were asked for; a model runs on at least one. Use --stages 1 or more.")
    if num_layers < num_stages:
        plural, fewer = ("", "") if num_layers == 1 else ("s", " or fewer")
        raise PlanError(
            f"{num_layers} layer{plural} cannot fill {num_stages} stages; each stage needs at least one. "
            f"Use --stages {num_layers}{fewer}."
        )


def _known(values: Iterable[float | None]) -> list[float] | None:
    """The values, or None where one of them is unknown."""
    known = []
    for value in values:
        if value is None:
            return None
        known.append(value)
    return known


def _sum(values: Iterable[float | None]) -> float | None:
    known = _known(values)
    return None if known is None else math.fsum(known)
