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
from stalewise.protocol.actions import Action, Kind
from stalewise.protocol.staleness import Staleness

__all__ = ["Program", "Slot", "StageProgram"]


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
    """

    slots: tuple[Slot, ...]

    @property
    def max_lag(self) -> int:
        """Steps of the prologue, and of the epilogue."""
        return max((slot.lag for slot in self.slots), default=0)

    @property
    def recomputes(self) -> bool:
        """Whether a forward keeps no graph, because a recompute builds it."""
        return any(slot.kind is Kind.RECOMPUTE for slot in self.slots)

    def step(self, index: int, num_batches: int | None = None) -> Iterator[Action]:
        """The actions of local step `index`, in order.

        Args:
            index: local step, from 0.
            num_batches: batches that exist; None while no end is in sight.
        """
        for slot in self.slots:
            batch = index - slot.lag
            if batch < 0 or (num_batches is not None and batch >= num_batches):
                continue
            yield Action(slot.kind, None if slot.kind is Kind.UPDATE else batch, slot.micro_batch)

    def actions(self, num_batches: int) -> Iterator[Action]:
        """All actions of a run of `num_batches` batches that ends with a drain."""
        for index in range(num_batches + self.max_lag if num_batches else 0):
            yield from self.step(index, num_batches)


@dataclass(frozen=True, kw_only=True)
class Program:
    """The local steps of all stages, and the staleness that they claim to realise."""

    stages: tuple[StageProgram, ...]
    staleness: Staleness

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

    def grid(self, num_steps: int, *, num_batches: int | None = None, links: bool = False) -> str:
        """The program as text, a line a stage and a column a local step.

        Args:
            num_steps: columns.
            num_batches: batches after which the stages drain; None for a run without end.
            links: also show what is received and sent.
        """
        hidden = (
            ()
            if links
            else (
                Kind.LOAD,
                Kind.RECEIVE_ACTIVATION,
                Kind.SEND_ACTIVATION,
                Kind.RECEIVE_GRADIENT,
                Kind.SEND_GRADIENT,
            )
        )
        rows = [["step", *map(str, range(num_steps))]]
        for index, stage in enumerate(self.stages):
            cells = (
                " ".join(str(action) for action in stage.step(step, num_batches) if action.kind not in hidden)
                for step in range(num_steps)
            )
            rows.append([f"stage {index}", *(cell or "-" for cell in cells)])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = (
            " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
        )
        return "\n".join(lines)
