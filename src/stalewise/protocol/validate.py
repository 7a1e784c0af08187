"""The rules that every program keeps, checked by a dry run without tensors.

    V1  a stage's actions fit its place: only the first loads, only the last sends no activation, ...
    V2  every batch is forwarded exactly once on every stage, in order (FIFO)
    V3  every batch is backwarded exactly once on every stage, in order (FIFO)
    V4  an action finds what it needs: its input, its graph (a recompute where the forward kept none), its gradient
    V5  realised staleness = declared: when B j runs, the newest forwarded batch is j + m_k, less only in the drain;
        F n uses the weights after n - m_k updates (over accumulate, where gradients accumulate). Of an elastic
        program m_k is a bound: the newest forwarded batch is at most j + m_k, the updates are n - m_k or more
    V6  every message is received once, in the order in which it was sent
    V7  a stage holds at most m_k + 1 stored inputs
    V8  a link holds at most m_k + 1 batches in warm-up and d_k + 1 after it, whoever runs ahead (where gradients are
        predicted: their delay and the difference of the delays, plus 1; of an elastic program always m_k + 1)
    V9  no deadlock: some stage can always go on until all are done
    V10 every backward is followed by an update, and nothing is left at the end: no input, graph, message or gradient

The dry run covers prologue, several periods and epilogue; what follows repeats (see `protocol.program`). It is run
twice, once with the first stages as far ahead as they can get and once with the last, because V8 must hold whatever
any device does. What a stage may hold, and how far it may run ahead (V7 and V8), follows from m and d:
docs/notation.md.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from stalewise.errors import ProgramError
from stalewise.protocol.actions import Action, Kind
from stalewise.protocol.program import Program, StageProgram

__all__ = ["DryRun", "StageState", "check", "violations"]

Unit = tuple[int, int | None]
"""Batch and micro-batch."""


def check(program: Program) -> None:
    """Raise the first violation of a rule.

    Raises:
        ProgramError: naming rule, stage and action.
    """
    for violation in violations(program):
        raise ProgramError(violation)


def violations(program: Program, *, num_batches: int | None = None) -> list[str]:
    """Every violation found in a run of `num_batches` batches.

    Args:
        program: what to check.
        num_batches: None for enough to see prologue, three periods and epilogue.
    """
    batches = (
        2 * program.max_lag + 4 + max(stage.policy.accumulate for stage in program.stages)
        if num_batches is None
        else num_batches
    )
    streams = [list(stage.actions(batches)) for stage in program.stages]
    return run_streams(program, streams, batches)


def run_streams(program: Program, streams: list[list[Action]], num_batches: int) -> list[str]:
    """The same for explicit streams of actions, one per stage, that claim to execute `program`."""
    found: dict[str, None] = {}
    for upstream_first in (True, False):
        found.update(dict.fromkeys(DryRun(program, streams, num_batches).run(upstream_first=upstream_first)))
    return list(found)


@dataclass
class StageState:
    """Which batches (and micro-batches) a stage holds, by what it holds of them."""

    forwarded: list[Unit] = field(default_factory=list)
    backwarded: list[Unit] = field(default_factory=list)
    received: set[Unit] = field(default_factory=set)
    last_received: Unit | None = None
    stored: set[Unit] = field(default_factory=set)
    graphs: set[Unit] = field(default_factory=set)
    outputs: set[Unit] = field(default_factory=set)
    gradients: set[Unit] = field(default_factory=set)
    input_gradients: set[Unit] = field(default_factory=set)
    losses: set[Unit] = field(default_factory=set)
    predicted: set[Unit] = field(default_factory=set)
    pending: set[int] = field(default_factory=set)
    updates: int = 0


class DryRun:
    """Executes streams on states that only remember which batches are where.

    Args:
        program: that the streams claim to execute.
        streams: the actions of each stage.
        num_batches: that enter.

    Attributes:
        streams: what is left of them.
        stages: what each stage holds.
        activations: on their way to each stage, from the one before.
        gradients: on their way to each stage, from the one after.
    """

    def __init__(self, program: Program, streams: list[list[Action]], num_batches: int) -> None:
        self.program = program
        self.num_batches = num_batches
        self.last = program.num_stages - 1
        self.streams = [deque(stream) for stream in streams]
        self.stages = [StageState() for _ in streams]
        self.activations: list[deque[Unit]] = [deque() for _ in streams]
        self.gradients: list[deque[Unit]] = [deque() for _ in streams]
        self.losses: list[deque[Unit]] = [deque() for _ in streams]
        self.tokens: deque[Unit] = deque()
        self.gradient_lag = [_lag(stage, Kind.RECEIVE_GRADIENT) for stage in program.stages]
        self.sending_lag = [_lag(stage, Kind.SEND_GRADIENT) for stage in program.stages]
        self.predicts = [any(slot.kind is Kind.SYNTHESIZE for slot in stage.slots) for stage in program.stages]

    def run(self, *, upstream_first: bool) -> Iterator[str]:
        order = range(self.last + 1) if upstream_first else range(self.last, -1, -1)
        while any(self.streams):
            stage = next((stage for stage in order if self.ready(stage)), None)
            if stage is None:
                blocked = ", ".join(
                    f"stage {stage} waits at {stream[0]}" for stage, stream in enumerate(self.streams) if stream
                )
                yield f"V9: deadlock: {blocked}, and no message is on its way."
                return
            yield from self.act(stage)
        yield from self._at_the_end()

    def act(self, stage: int) -> list[str]:
        """Execute the next action of a stage that is ready; returns the violations."""
        action = self.streams[stage].popleft()
        return [f"{rule}: stage {stage}, {action}: {text}" for rule, text in self._execute(stage, action)]

    def ready(self, stage: int) -> bool:
        """Whether a stage has an action left, and what that needs of others is there."""
        if not self.streams[stage]:
            return False
        kind = self.streams[stage][0].kind
        if kind is Kind.RECEIVE_ACTIVATION and stage > 0:
            return bool(self.activations[stage])
        if kind is Kind.RECEIVE_GRADIENT and stage < self.last:
            return bool(self.gradients[stage])
        if kind is Kind.RECEIVE_LOSS and stage < self.last:
            return bool(self.losses[stage])
        return kind is not Kind.RECEIVE_TOKEN or bool(self.tokens)

    def _execute(self, stage: int, action: Action) -> Iterable[tuple[str, str]]:
        state = self.stages[stage]
        unit = (-1 if action.batch is None else action.batch, action.micro_batch)
        match action.kind:
            case Kind.LOAD:
                if stage != 0:
                    yield "V1", "only stage 0 loads."
                parts = self.program.stages[stage].policy.micro_batches
                for part in range(parts) if parts > 1 else (None,):
                    yield from _arrive(state, (unit[0], part))
            case Kind.RECEIVE_ACTIVATION:
                if stage == 0:
                    yield "V1", "stage 0 has no stage before it."
                else:
                    yield from self._take(self.activations[stage], unit)
                yield from _arrive(state, unit)
            case Kind.FORWARD:
                yield from self._forward(stage, state, unit)
            case Kind.SEND_ACTIVATION:
                if stage == self.last:
                    yield "V1", "the last stage has nobody to send an activation to."
                    return
                yield from _remove("V4", state.outputs, unit, "has no output to send")
                self.activations[stage + 1].append(unit)
                yield from self._link_bound(stage)
            case Kind.RECOMPUTE:
                if unit not in state.stored:
                    yield "V4", "has no stored input to recompute from."
                if unit in state.graphs:
                    yield "V4", "has its graph already."
                state.graphs.add(unit)
            case Kind.RECEIVE_GRADIENT:
                if stage == self.last:
                    yield "V1", "the last stage gets its gradient from the loss."
                else:
                    yield from self._take(self.gradients[stage], unit)
                state.gradients.add(unit)
            case Kind.BACKWARD:
                yield from self._backward(stage, state, unit)
            case Kind.SEND_GRADIENT:
                if stage == 0:
                    yield "V1", "stage 0 has nobody to send a gradient to."
                    return
                yield from _remove("V4", state.input_gradients, unit, "has no gradient to send")
                self.gradients[stage - 1].append(unit)
            case Kind.SYNTHESIZE:
                if unit not in state.forwarded:
                    yield "V4", "has no output to predict a gradient for."
                if unit in state.predicted:
                    yield "V4", "was predicted before."
                state.gradients.add(unit)
                state.predicted.add(unit)
            case Kind.TRAIN_SYNTHESIZER:
                yield from _remove("V4", state.gradients, unit, "has no gradient to train with")
                yield from _remove("V4", state.predicted, unit, "was not predicted")
            case Kind.SEND_LOSS:
                if stage == 0:
                    yield "V1", "stage 0 has nobody to tell a loss."
                    return
                yield from _remove("V4", state.losses, unit, "has no loss to tell")
                self.losses[stage - 1].append(unit)
            case Kind.RECEIVE_LOSS:
                if stage == self.last:
                    yield "V1", "the last stage computes the loss."
                else:
                    yield from self._take(self.losses[stage], unit)
                if stage > 0:
                    state.losses.add(unit)
            case Kind.SEND_TOKEN:
                if stage != self.last or unit not in state.forwarded:
                    yield "V1", "only the last stage tells that it has forwarded a batch, and only then."
                self.tokens.append(unit)
            case Kind.RECEIVE_TOKEN:
                if stage != 0:
                    yield "V1", "only stage 0 waits for a forward of the last stage."
                if self.tokens:
                    yield from self._take(self.tokens, unit)
            case Kind.UPDATE:
                if not state.pending:
                    yield "V10", "there is no gradient to update with."
                group = self.program.stages[stage].policy.accumulate
                newest = max(state.pending, default=-1)
                if (newest + 1) % group and newest != self.num_batches - 1:
                    yield "V10", f"comes after batch {newest}, within a group of {group}."
                state.pending.clear()
                state.updates += 1
                if state.graphs and not self.program.stages[stage].stores_graphs_over_updates:
                    batches = sorted(batch for batch, _ in state.graphs)
                    yield "V4", f"changes the weights that the graphs of batches {batches} were built with."

    def _forward(self, stage: int, state: StageState, unit: Unit) -> Iterable[tuple[str, str]]:
        yield from _remove("V4", state.received, unit, "was not received")
        yield from _in_order("V2", state.forwarded, unit)
        state.forwarded.append(unit)
        due = max(0, unit[0] - self.program.staleness[stage]) // self.program.stages[stage].policy.accumulate
        if state.updates < due or (state.updates > due and self.program.elastic is None):
            yield "V5", f"uses weights after {state.updates} updates; its staleness wants {due}."
        state.stored.add(unit)
        bound = self.program.staleness[stage] + 1
        if len({batch for batch, _ in state.stored}) > bound:
            yield "V7", f"{len(state.stored)} inputs are stored; at most m_{stage} + 1 = {bound} may be."
        if not self.program.stages[stage].recomputes:
            state.graphs.add(unit)
        if stage < self.last:
            state.outputs.add(unit)

    def _backward(self, stage: int, state: StageState, unit: Unit) -> Iterable[tuple[str, str]]:
        yield from _in_order("V3", state.backwarded, unit)
        yield from _remove("V4", state.graphs, unit, "has no graph")
        if stage < self.last:
            yield from _remove("V4", state.gradients, unit, "has no gradient")
        state.stored.discard(unit)
        state.backwarded.append(unit)
        newest = max((batch for batch, _ in state.forwarded), default=-1)
        declared = self.program.staleness[stage]
        ahead = min(unit[0] + declared, self.num_batches - 1)
        if newest > ahead or (newest < ahead and self.program.elastic is None):
            yield (
                "V5",
                f"batch {newest} is the newest forward; staleness {declared} wants {unit[0] + declared}.",
            )
        if stage > 0:
            state.input_gradients.add(unit)
        if stage == self.last and self.predicts[stage - 1]:
            state.losses.add(unit)
        pending = len(state.pending - {unit[0]})
        if pending >= self.program.stages[stage].policy.accumulate:
            yield "V10", f"no update followed the backward of batch {max(state.pending)}."
        state.pending.add(unit[0])

    def _take(self, link: deque[Unit], unit: Unit) -> Iterable[tuple[str, str]]:
        head = link.popleft()
        if head != unit:
            yield "V6", f"the message at the head of the link is of batch {head[0]}."

    def _link_bound(self, stage: int) -> Iterable[tuple[str, str]]:
        here, after = self.stages[stage], self.stages[stage + 1]
        in_it = (*self.activations[stage + 1], *self.gradients[stage], *here.gradients)
        held = len({batch for batch, _ in in_it})
        warm = bool(after.backwarded)
        if self.predicts[stage]:
            depth = self.gradient_lag[stage]
            slack = depth - self.sending_lag[stage + 1]
        else:
            depth, slack = self.program.staleness[stage], self.program.staleness.slack[stage]
        # The stage below an elastic one may hold fewer batches than its bound; the link then holds more.
        bound = (slack if warm and self.program.elastic is None else depth) + 1
        if held > bound:
            yield "V8", f"link {stage} -> {stage + 1} holds {held} batches; at most {bound} may be in it."

    def _at_the_end(self) -> Iterator[str]:
        for stage, state in enumerate(self.stages):
            for rule, name, done in (
                ("V2", "forwarded", state.forwarded),
                ("V3", "backwarded", state.backwarded),
            ):
                missing = set(range(self.num_batches)) - {batch for batch, _ in done}
                if missing:
                    yield f"{rule}: stage {stage} never {name} batches {sorted(missing)}."
            left = {
                "inputs": state.stored or state.received,
                "graphs": state.graphs,
                "gradients": state.gradients or state.input_gradients or self.gradients[stage],
                "activations": state.outputs or self.activations[stage],
                "losses": state.losses or self.losses[stage],
                "predictions": state.predicted,
                "tokens": self.tokens if stage == 0 else (),
            }
            for name, units in left.items():
                if units:
                    yield f"V10: stage {stage} ends with {name} of batches {sorted(batch for batch, _ in units)}."
            if state.pending:
                yield f"V10: stage {stage} ends with gradients that no update used."


def _lag(stage: StageProgram, kind: Kind) -> int:
    return max((slot.lag for slot in stage.slots if slot.kind is kind), default=0)


def _remove(rule: str, units: set[Unit], unit: Unit, text: str) -> Iterable[tuple[str, str]]:
    if unit not in units:
        yield rule, f"batch {unit[0]} {text}."
    units.discard(unit)


def _arrive(state: StageState, unit: Unit) -> Iterable[tuple[str, str]]:
    if unit in state.received or unit in state.forwarded:
        yield "V2", "came before."
    elif state.last_received is not None and (unit[0], unit[1] or 0) < (
        state.last_received[0],
        state.last_received[1] or 0,
    ):
        yield "V2", f"comes after batch {state.last_received[0]}; batches keep their order."
    state.received.add(unit)
    state.last_received = unit


def _in_order(rule: str, done: list[Unit], unit: Unit) -> Iterable[tuple[str, str]]:
    if unit in done:
        yield rule, "was done before."
    elif done and (unit[0], unit[1] or 0) < (done[-1][0], done[-1][1] or 0):
        yield rule, f"comes after batch {done[-1][0]}; batches keep their order."
    elif not done and unit[0] != 0:
        yield rule, "comes first; batches start at 0."
