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

from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from typing import Literal

from stalewise.errors import PlanError
from stalewise.plan.partition import LayerCost, Partition
from stalewise.protocol.actions import Kind
from stalewise.protocol.program import Program, StageProgram
from stalewise.protocol.validate import DryRun, StageState, check

__all__ = ["StageMemory", "predict_memory"]

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
    check(program)
    sizes = _stage_bytes(partition, input_bytes, target_bytes, optimizer_copies)
    everyone = range(program.num_stages)
    if timing == "lockstep":
        return _peaks(program, sizes, slow=None)
    return [_peaks(program, sizes, slow=stage)[stage] for stage in everyone]


@dataclass(frozen=True, kw_only=True)
class _StageBytes:
    """Bytes of a stage; those that depend on a batch are of a whole one."""

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


def _stage_bytes(
    partition: Partition, input_bytes: int, target_bytes: int, optimizer_copies: float
) -> list[_StageBytes]:
    sizes: list[_StageBytes] = []
    for cost in partition.stages:
        layers = partition.layers[cost.start : cost.end]
        trained = sum(_known(layer, "gradient_bytes") for layer in layers)
        output = _known(layers[-1], "output_bytes")
        # The last output stays with the graph, whether a formula needs it or not: the backward starts from it.
        let_go = sum(_known(layer, "unsaved_output_bytes") for layer in layers[:-1])
        sizes.append(
            _StageBytes(
                weights=sum(_known(layer, "weight_bytes") for layer in layers),
                trained=trained,
                saved_weights=sum(_known(layer, "saved_weight_bytes") for layer in layers),
                optimizer=round(optimizer_copies * trained),
                input=sizes[-1].output if sizes else input_bytes,
                target=target_bytes,
                output=output,
                graph=sum(_known(layer, "graph_bytes") for layer in layers) - let_go,
                saved_input=_known(layers[0], "saved_input_bytes"),
                copies_input=bool(_known(layers[0], "changes_input")),
            )
        )
    return sizes


def _known(layer: LayerCost, field: str) -> int:
    value = getattr(layer, field)
    if value is None:
        raise PlanError(
            f"layer {layer.name!r} ({layer.type}) has no known {field}; memory follows from what every layer keeps. "
            "Measure the layers with profile_layers."
        )
    return int(value)


def _peaks(program: Program, sizes: list[_StageBytes], *, slow: int | None) -> list[StageMemory]:
    """The account of the moment at which each stage holds the most.

    Args:
        program: to run.
        sizes: of each stage.
        slow: the stage that acts only when no other can; None: all keep step.
    """
    batches = 2 * program.max_lag + 4 + max(stage.policy.accumulate for stage in program.stages)
    run = DryRun(program, [list(stage.actions(batches)) for stage in program.stages], batches)
    accounts = [
        _Account(stage, size, is_first=index == 0, is_last=index == run.last)
        for index, (stage, size) in enumerate(zip(program.stages, sizes, strict=True))
    ]
    peaks = [StageMemory()] * program.num_stages

    def look(stage: int) -> None:
        waiting = len(run.activations[stage]), len(run.gradients[stage])
        peaks[stage] = max(
            peaks[stage], accounts[stage].memory(run.stages[stage], *waiting), key=lambda memory: memory.total
        )

    for stage in _lockstep(run, program, batches) if slow is None else _as_far_as_they_get(run, slow):
        look(stage)
        accounts[stage].before(run.streams[stage][0].kind, _unit(run, stage), run.stages[stage].updates)
        run.act(stage)
        look(stage)
    return peaks


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
    """What a stage holds, in bytes.

    Args:
        program: of the stage.
        size: of what it can hold.
        is_first: whether it gets batches whole and keeps no input gradient.
        is_last: whether its output is a loss.
    """

    def __init__(self, program: StageProgram, size: _StageBytes, *, is_first: bool, is_last: bool) -> None:
        self._program = program
        self._size = size
        self._is_first = is_first
        self._is_last = is_last
        self._version: dict[Unit, int] = {}

    def before(self, kind: Kind, unit: Unit | None, updates: int) -> None:
        """Remember with which weights a batch is forwarded."""
        if kind is Kind.FORWARD and unit is not None:
            self._version[unit] = updates

    def memory(self, state: StageState, activations: int, gradients: int) -> StageMemory:
        """The account now.

        Args:
            state: of the stage.
            activations: that wait for it.
            gradients: that wait for it.
        """
        size, parts = self._size, self._program.policy.micro_batches
        message = size.input + size.target
        arrived = len(state.received) + activations
        stored = message * len(state.stored) / parts
        queued = message * arrived / parts
        if self._is_first:
            # Micro-batches are views of the batch as it was loaded, which the last of them keeps alive.
            batches = {batch for batch, _ in state.stored}
            stored = message * len(batches)
            queued = message * len({batch for batch, _ in state.received} - batches)
        else:
            queued += size.input * len(state.input_gradients) / parts
        queued += size.output * (len(state.gradients) + gradients) / parts
        if self._program.recomputes and not self._is_last:
            queued += size.output * len(state.outputs) / parts
        kept = len(state.predicted & state.graphs)
        stored += size.output * len(state.predicted) / parts
        return StageMemory(
            weights=size.weights,
            stashed=self._weight_copies(state),
            optimizer=size.optimizer if state.updates else 0,
            gradients=size.trained if state.pending else 0,
            inputs=round(stored),
            graphs=round(
                (size.graph * len(state.graphs) + size.saved_input * self._copies(state) - size.output * kept) / parts
            ),
            queues=round(queued),
        )

    def _copies(self, state: StageState) -> int:
        """Graphs that began with a copy of the input: all where layers change it, else that of the first pass."""
        if self._size.copies_input:
            return len(state.graphs)
        return 0 if self._program.recomputes else len(state.graphs & {(0, 0), (0, None)})

    def _weight_copies(self, state: StageState) -> int:
        policy = self._program.policy
        if not self._program.stores_graphs_over_updates:
            return 0
        if policy.weights == "stashed":
            versions = {self._version[unit] for unit in state.graphs} - {state.updates}
            return self._size.saved_weights * len(versions)
        if policy.correction is None or policy.correction.discrepancy_decay is None:
            return 0
        # The averages, and from the backward to the update the estimates that it used.
        return self._size.trained + (self._size.saved_weights if state.pending else 0)
