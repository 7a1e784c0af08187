"""How much memory a stage takes: the account that is kept of it, and its prediction from a program.

    weights     parameters and buffers; a synthesizer's too
    stashed     copies of weights that stored graphs need, PipeMare's averages of their change
    optimizer   its state
    gradients   of the weights
    inputs      stored inputs and targets: m_k + 1 of them; outputs that a synthesizer is yet to be trained with
    graphs      what autograd saved for backwards that have not run, and the outputs they start from
    queues      what was received and not used yet, or made and not sent yet

A storage that belongs to several of them counts in the first.

`predict_memory` runs a program dry, without tensors, and counts at every action what each stage holds. When stages
act is up to the machines, and moves the slack of a link between its two queues; so it can be predicted for stages
that keep step, as in the sequential engine, or for each stage as if it were the slow one and its queues were full.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Literal

from stalewise.errors import PlanError
from stalewise.plan.partition import LayerCost, Partition
from stalewise.protocol.actions import Kind
from stalewise.protocol.program import Program, StageProgram
from stalewise.protocol.validate import DryRun, StageState, check

__all__ = ["Holdings", "StageBytes", "StageMemory", "predict_memory", "span_bytes", "stage_holdings"]

Timing = Literal["lockstep", "slow"]
Unit = tuple[int, int | None]


@dataclass(frozen=True, kw_only=True)
class StageMemory:
    """Bytes that one stage holds, by what they are for; see above."""

    weights: int = 0
    stashed: int = 0
    optimizer: int = 0
    gradients: int = 0
    inputs: int = 0
    graphs: int = 0
    queues: int = 0

    @property
    def total(self) -> int:
        """Bytes of all of them."""
        return sum(asdict(self).values())

    def as_dict(self) -> dict[str, int]:
        """All of them by name, and `total`."""
        return {**asdict(self), "total": self.total}

    def maximum(self, other: StageMemory) -> StageMemory:
        """The larger of each: a bound, for they need not be of one moment."""
        return StageMemory(
            **{field.name: max(getattr(self, field.name), getattr(other, field.name)) for field in fields(self)}
        )


def predict_memory(
    partition: Partition,
    program: Program,
    *,
    input_bytes: int,
    target_bytes: int,
    optimizer_copies: float = 1.0,
    timing: Timing = "lockstep",
) -> list[StageMemory]:
    """The largest total that each stage holds between two actions, by category.

    What a layer needs while it runs (workspaces, activations that no backward needs) is not part of it, nor are a
    synthesizer's weights, which no layer tells. A micro-batch is taken to need its share of what a batch needs.

    Args:
        partition: of layers with known memory, as `profile_layers` measures it with one batch.
        program: of the method.
        input_bytes: of the inputs of one batch.
        target_bytes: of its targets, which travel along with the activations.
        optimizer_copies: of the trained weights in the optimizer's state: 0 for SGD, 1 with momentum, 2 for Adam.
        timing: "lockstep": every stage completes one step after another, as in the sequential engine; the slack of a
            link then waits as gradients. "slow": each stage as if it were slower than all others, so that as much
            waits for it as can; an upper bound for any timing.

    Raises:
        PlanError: where partition and program have different numbers of stages, or a layer's memory is unknown.
        ProgramError: where the program breaks a rule of `protocol.validate`.
    """
    if partition.num_stages != program.num_stages:
        raise PlanError(
            f"the partition has {partition.num_stages} stages and the program {program.num_stages}; predict with the "
            "program that the partition was made for."
        )
    if timing not in ("lockstep", "slow"):
        raise PlanError(f'timing is {timing!r}; it must be "lockstep" or "slow".')
    sizes = stage_bytes(partition, input_bytes, target_bytes, optimizer_copies)
    return [
        max((held.bytes(size) for held in moments), key=lambda memory: memory.total)
        for size, moments in zip(sizes, stage_holdings(program, timing=timing), strict=True)
    ]


def stage_holdings(program: Program, *, timing: Timing) -> list[list[Holdings]]:
    """What each stage holds between its actions: every state that a run of the program meets, each once.

    Args:
        program: of the method.
        timing: as for `predict_memory`.

    Raises:
        ProgramError: where the program breaks a rule of `protocol.validate`.
    """
    check(program)
    everyone = range(program.num_stages)
    if timing == "lockstep":
        return _moments(program, slow=None)
    return [_moments(program, slow=stage)[stage] for stage in everyone]


@dataclass(frozen=True, kw_only=True)
class StageBytes:
    """Bytes of what a stage can hold; those that depend on a batch are of a whole one.

    Args:
        weights: parameters and buffers.
        trained: parameters that are trained.
        saved_weights: parameters that a backward needs.
        optimizer: its state.
        input: of the stage.
        target: that travels along.
        output: of the stage.
        graph: what the forward keeps for the backward, and the output.
        saved_input: of the input, what the backward needs.
        copies_input: whether the first layer changes its input, which is copied then.
    """

    weights: int
    trained: int
    saved_weights: int
    optimizer: int
    input: int
    target: int
    output: int
    graph: int
    saved_input: int
    copies_input: bool


def stage_bytes(partition: Partition, input_bytes: int, target_bytes: int, optimizer_copies: float) -> list[StageBytes]:
    """Of each stage of a partition."""
    return [
        span_bytes(partition.layers, cost.start, cost.end, input_bytes, target_bytes, optimizer_copies)
        for cost in partition.stages
    ]


def span_bytes(
    layers: Sequence[LayerCost], start: int, end: int, input_bytes: int, target_bytes: int, optimizer_copies: float
) -> StageBytes:
    """Of a stage of the layers start .. end-1.

    Raises:
        PlanError: where a layer's memory is unknown.
    """
    span = layers[start:end]
    trained = sum(_known(layer, "gradient_bytes") for layer in span)
    # The last output stays with the graph, whether a formula needs it or not: the backward starts from it.
    let_go = sum(_known(layer, "unsaved_output_bytes") for layer in span[:-1])
    return StageBytes(
        weights=sum(_known(layer, "weight_bytes") for layer in span),
        trained=trained,
        saved_weights=sum(_known(layer, "saved_weight_bytes") for layer in span),
        optimizer=round(optimizer_copies * trained),
        input=_known(layers[start - 1], "output_bytes") if start else input_bytes,
        target=target_bytes,
        output=_known(span[-1], "output_bytes"),
        graph=sum(_known(layer, "graph_bytes") for layer in span) - let_go,
        saved_input=_known(span[0], "saved_input_bytes"),
        copies_input=bool(_known(span[0], "changes_input")),
    )


def _known(layer: LayerCost, field: str) -> int:
    value = getattr(layer, field)
    if value is None:
        raise PlanError(
            f"layer {layer.name!r} ({layer.type}) has no known {field}; memory follows from what every layer keeps. "
            "Measure the layers with profile_layers."
        )
    return int(value)


@dataclass(frozen=True, kw_only=True)
class Holdings:
    """What a stage holds at a moment, counted in whole batches (micro-batches are fractions of one).

    Args:
        saved_weights: copies of the weights that stored graphs need.
        averages: of the change of the trained weights (PipeMare).
        optimizer: whether it has a state.
        gradients: whether there are gradients of weights.
        stored: inputs with their targets.
        stored_outputs: that a synthesizer is yet to be trained with.
        graphs: that wait for their backward.
        copied_inputs: graphs that began with a copy of the input, where the first layer leaves it alone.
        outputs_in_both: of the stored outputs, those that a graph ends with.
        queued: inputs with their targets in the queues.
        queued_inputs: gradients of the input in the queues.
        queued_outputs: outputs and their gradients in the queues.
    """

    saved_weights: int
    averages: int
    optimizer: int
    gradients: int
    stored: float
    stored_outputs: float
    graphs: float
    copied_inputs: float
    outputs_in_both: float
    queued: float
    queued_inputs: float
    queued_outputs: float

    def bytes(self, size: StageBytes) -> StageMemory:
        """The account for a stage of that size."""
        copies = self.graphs if size.copies_input else self.copied_inputs
        return StageMemory(
            weights=size.weights,
            stashed=size.saved_weights * self.saved_weights + size.trained * self.averages,
            optimizer=size.optimizer * self.optimizer,
            gradients=size.trained * self.gradients,
            inputs=round((size.input + size.target) * self.stored + size.output * self.stored_outputs),
            graphs=round(size.graph * self.graphs + size.saved_input * copies - size.output * self.outputs_in_both),
            queues=round(
                (size.input + size.target) * self.queued
                + size.input * self.queued_inputs
                + size.output * self.queued_outputs
            ),
        )


def _moments(program: Program, *, slow: int | None) -> list[list[Holdings]]:
    """The distinct moments of each stage.

    Args:
        program: to run.
        slow: the stage that acts only when no other can; None: all keep step.
    """
    batches = 2 * program.max_lag + 4 + max(stage.policy.accumulate for stage in program.stages)
    run = DryRun(program, [list(stage.actions(batches)) for stage in program.stages], batches)
    accounts = [
        _Account(stage, is_first=index == 0, is_last=index == run.last) for index, stage in enumerate(program.stages)
    ]
    moments: list[dict[Holdings, None]] = [{} for _ in program.stages]

    def look(stage: int) -> None:
        waiting = len(run.activations[stage]), len(run.gradients[stage])
        moments[stage][accounts[stage].holdings(run.stages[stage], *waiting)] = None

    for stage in _lockstep(run, program, batches) if slow is None else _as_far_as_they_get(run, slow):
        look(stage)
        accounts[stage].before(run.streams[stage][0].kind, _unit(run, stage), run.stages[stage].updates)
        run.act(stage)
        look(stage)
    return [list(found) for found in moments]


def _unit(run: DryRun, stage: int) -> Unit | None:
    action = run.streams[stage][0]
    return None if action.batch is None else (action.batch, action.micro_batch)


def _lockstep(run: DryRun, program: Program, batches: int) -> Iterator[int]:
    """The stages in the order in which the sequential engine lets them act."""
    for step in range(batches + program.drain_steps):
        left = [len(list(stage.step(step, batches))) for stage in program.stages]
        while any(left):
            for stage in range(program.num_stages):
                while left[stage] and run.ready(stage):
                    yield stage
                    left[stage] -= 1


def _as_far_as_they_get(run: DryRun, slow: int) -> Iterator[int]:
    """All stages but one act as soon as they can, that one when none of them can."""
    order = [*(stage for stage in range(run.last + 1) if stage != slow), slow]
    while any(run.streams):
        yield next(stage for stage in order if run.ready(stage))


class _Account:
    """Counts what a stage holds.

    Args:
        program: of the stage.
        is_first: whether it gets batches whole and keeps no input gradient.
        is_last: whether its output is a loss.
    """

    def __init__(self, program: StageProgram, *, is_first: bool, is_last: bool) -> None:
        self._program = program
        self._is_first = is_first
        self._is_last = is_last
        self._version: dict[Unit, int] = {}

    def before(self, kind: Kind, unit: Unit | None, updates: int) -> None:
        """Remember with which weights a batch is forwarded."""
        if kind is Kind.FORWARD and unit is not None:
            self._version[unit] = updates

    def holdings(self, state: StageState, activations: int, gradients: int) -> Holdings:
        """The account now.

        Args:
            state: of the stage.
            activations: that wait for it.
            gradients: that wait for it.
        """
        parts = self._program.policy.micro_batches
        stored = len(state.stored) / parts
        queued = (len(state.received) + activations) / parts
        if self._is_first:
            # Micro-batches are views of the batch as it was loaded, which the last of them keeps alive.
            batches = {batch for batch, _ in state.stored}
            stored = len(batches)
            queued = len({batch for batch, _ in state.received} - batches)
        outputs = len(state.gradients) + gradients
        if self._program.recomputes and not self._is_last:
            outputs += len(state.outputs)
        saved_weights, averages = self._weight_copies(state)
        return Holdings(
            saved_weights=saved_weights,
            averages=averages,
            optimizer=int(bool(state.updates)),
            gradients=int(bool(state.pending)),
            stored=stored,
            stored_outputs=len(state.predicted) / parts,
            graphs=len(state.graphs) / parts,
            copied_inputs=0 if self._program.recomputes else len(state.graphs & {(0, 0), (0, None)}) / parts,
            outputs_in_both=len(state.predicted & state.graphs) / parts,
            queued=queued,
            queued_inputs=0 if self._is_first else len(state.input_gradients) / parts,
            queued_outputs=outputs / parts,
        )

    def _weight_copies(self, state: StageState) -> tuple[int, int]:
        """Copies of the saved weights, and averages."""
        policy = self._program.policy
        if not self._program.stores_graphs_over_updates:
            return 0, 0
        if policy.weights == "stashed":
            return len({self._version[unit] for unit in state.graphs} - {state.updates}), 0
        if policy.correction is None or policy.correction.discrepancy_decay is None:
            return 0, 0
        # The averages, and from the backward to the update the estimates that it used.
        return int(bool(state.pending)), 1
