"""Programs: which actions each stage takes, in which order.

A stage repeats one *local step*. Its slots say what the step does and how far each action lags behind the
step: in local step n a slot with lag m acts on batch n - m. Where that batch does not exist (before the first,
after the last) the slot is silent, and that alone gives the three parts of a stage's life:

    local step     0    1    2        3        4    ..    N      N+1
    slot F, lag 0  F0   F1   F2       F3       F4
    slot B, lag 2            B0       B1       B2         B_{N-2} B_{N-1}
                   └ prologue ┘└──── period, repeated ───┘└ epilogue ┘

So a program has the size of one period, however many batches it is run for.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from stalewise.errors import ProgramError
from stalewise.protocol.actions import COMPUTE, Action, Kind
from stalewise.protocol.elastic import Elastic
from stalewise.protocol.policy import PLAIN, StagePolicy
from stalewise.protocol.staleness import Staleness

__all__ = ["NO_PROGRAM", "Program", "Slot", "StageProgram"]


@dataclass(frozen=True, slots=True)
class Slot:
    """One place in a local step.

    Args:
        kind: the kind of action.
        lag: local steps by which the action follows the arrival of its batch.
        micro_batch: the micro-batch it acts on, or None.
    """

    kind: Kind
    lag: int = 0
    micro_batch: int | None = None


@dataclass(frozen=True)
class StageProgram:
    """The local step of one stage.

    Args:
        slots: in the order in which they are executed.
        policy: what they do it with.
    """

    slots: tuple[Slot, ...]
    policy: StagePolicy = PLAIN

    @property
    def max_lag(self) -> int:
        """Steps of the prologue, and of the epilogue."""
        return max((slot.lag for slot in self.slots), default=0)

    @property
    def recomputes(self) -> bool:
        """Whether a forward keeps no graph, because a recompute builds it."""
        return any(slot.kind is Kind.RECOMPUTE for slot in self.slots)

    @property
    def backward_lag(self) -> int:
        """Steps between a batch's forward and its backward: m_k; 0 for a program without backwards."""
        return max((slot.lag for slot in self.slots if slot.kind is Kind.BACKWARD), default=0)

    @property
    def stores_graphs_over_updates(self) -> bool:
        """Whether weights change while a graph that was built with them waits for its backward."""
        return self.backward_lag > 0 and not self.recomputes

    @property
    def drain_steps(self) -> int:
        """Steps after the last batch until nothing is left to do."""
        return max(self.max_lag, int(self.policy.accumulate > 1))

    def step(self, index: int, num_batches: int | None = None, *, first_batch: int = 0) -> Iterator[Action]:
        """The actions of local step `index`, in order.

        Args:
            index: local step, from 0.
            num_batches: batches that exist; None while no end is in sight.
            first_batch: global index of batch 0, by which batches are grouped where gradients accumulate.
        """
        for slot in self.slots:
            batch = index - slot.lag
            if slot.kind is Kind.UPDATE and self.policy.accumulate > 1:
                if self._updates_after(batch, index, num_batches, first_batch):
                    yield Action(Kind.UPDATE)
            elif batch >= 0 and (num_batches is None or batch < num_batches):
                yield Action(slot.kind, None if slot.kind is Kind.UPDATE else batch, slot.micro_batch)

    def _updates_after(self, batch: int, index: int, num_batches: int | None, first_batch: int) -> bool:
        """Whether a group of batches is complete with this one, or a drain flushes the remainder.

        That a batch is the last is known one step after it was loaded, so a stage without lag flushes in the step
        after its last backward.
        """
        group = self.policy.accumulate
        if num_batches is not None and (first_batch + num_batches) % group:
            lag = index - batch
            if num_batches and index == max(num_batches - 1 + lag, num_batches):
                return True
        exists = batch >= 0 and (num_batches is None or batch < num_batches)
        return exists and (first_batch + batch + 1) % group == 0

    def actions(self, num_batches: int) -> Iterator[Action]:
        """All actions of a run of `num_batches` batches that ends with a drain."""
        for index in range(num_batches + self.drain_steps if num_batches else 0):
            yield from self.step(index, num_batches)


NO_PROGRAM = StageProgram(())
"""Of a stage that is asked to do things one by one."""


@dataclass(frozen=True, kw_only=True)
class Program:
    """The local steps of all stages, and the staleness that they claim to realise.

    Args:
        stages: their local steps. Of an elastic program these are the steps of a run that is as stale as it may be.
        staleness: m_k; of an elastic program the bound.
        elastic: how stages decide at run time what to do next; None: they repeat their local step.
    """

    stages: tuple[StageProgram, ...]
    staleness: Staleness
    elastic: Elastic | None = None

    def __post_init__(self) -> None:
        if len(self.stages) != len(self.staleness):
            raise ProgramError(
                f"the program has {len(self.stages)} stages and staleness {self.staleness} names "
                f"{len(self.staleness)}; give one entry per stage."
            )

    @property
    def num_stages(self) -> int:
        """K."""
        return len(self.stages)

    @property
    def max_lag(self) -> int:
        """Steps after which every stage is in its period."""
        return max(stage.max_lag for stage in self.stages)

    @property
    def drain_steps(self) -> int:
        """Steps of a drain: after them every stage is done."""
        return max(stage.drain_steps for stage in self.stages)

    @property
    def loss_lag(self) -> int:
        """Steps after which the loss of a batch is known on every stage."""
        kinds = (Kind.BACKWARD, Kind.RECEIVE_LOSS)
        return max(max(slot.lag for slot in stage.slots if slot.kind in kinds) for stage in self.stages)

    def grid(self, num_steps: int, *, num_batches: int | None = None, links: bool = False) -> str:
        """The program as text, a line a stage and a column a local step.

        Args:
            num_steps: columns.
            num_batches: batches after which the stages drain; None for a run without end.
            links: also show what is received and sent.
        """
        rows = [["step", *map(str, range(num_steps))]]
        for index, stage in enumerate(self.stages):
            cells = (
                " ".join(str(action) for action in stage.step(step, num_batches) if links or action.kind in COMPUTE)
                for step in range(num_steps)
            )
            rows.append([f"stage {index}", *(cell or "-" for cell in cells)])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = (
            " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
        )
        return "\n".join(lines)
