"""How long things take: the slots of each stage, and the links.

Times are whole nanoseconds, so that sums and maxima are exact. What a local step of a stage costs is a row of that
stage's table, one entry per slot; where steps differ (slow steps, measured ones), the table has several rows, and a
draw (`timing.draws`) says which row each step takes.

    stage 1        RECV_A     F   SEND_A     R   RECV_G     B   SEND_G    U
    row 0               0   9.0      0.2   9.0        0  18.0      0.2  1.5     an ordinary step, in ms
    row 1               0  18.0      0.4  18.0        0  36.0      0.4  3.0     a slow one
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from stalewise.errors import ConfigError
from stalewise.protocol.actions import Kind
from stalewise.protocol.numbers import check_count, check_real
from stalewise.protocol.program import Program, Slot

__all__ = ["IntArray", "LinkCost", "Links", "StepCosts"]

IntArray: TypeAlias = NDArray[np.int64]

MOST_STAGES = 10**5

LARGEST_NS = 10**12
"""Of one action or message (a thousand seconds), so that no sum of a long run leaves 64 bits."""


def _check_ns(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= LARGEST_NS:
        raise ConfigError(f"{name} is {value!r} ns; it must be a whole number from 0 to a thousand seconds.")


@dataclass(frozen=True, kw_only=True)
class LinkCost:
    """One direction of a link.

    Args:
        latency_ns: from the end of a message's transfer to its arrival; messages may overlap in it.
        transfer_ns: by which a message occupies the link; the next one waits. The part of a batch in a micro-batch
            takes that part of it, and a loss or a token none.
    """

    latency_ns: int = 0
    transfer_ns: int = 0

    def __post_init__(self) -> None:
        for name in ("latency_ns", "transfer_ns"):
            _check_ns(name, getattr(self, name))

    @classmethod
    def of_bytes(cls, num_bytes: float, *, latency_s: float, bytes_per_s: float) -> LinkCost:
        """Of messages of `num_bytes`.

        Raises:
            ConfigError: where a value is negative, or the bandwidth 0.
        """
        for name, value in (("num_bytes", num_bytes), ("latency_s", latency_s)):
            check_real(name, value)
        if bytes_per_s != math.inf:
            check_real("bytes_per_s", bytes_per_s, "a number above 0, or math.inf for no limit")
        if not bytes_per_s > 0:
            raise ConfigError(f"bytes_per_s is {bytes_per_s}; it must be above 0. For no limit give math.inf.")
        return cls(latency_ns=round(latency_s * 1e9), transfer_ns=round(num_bytes / bytes_per_s * 1e9))


@dataclass(frozen=True, kw_only=True)
class Links:
    """What messages cost.

    Args:
        activations: of link k -> k+1, one per link.
        gradients: of link k+1 -> k, one per link.
        token: of the direct way from the last stage to the first, which Features Replay and DDG use.
    """

    activations: tuple[LinkCost, ...]
    gradients: tuple[LinkCost, ...]
    token: LinkCost = LinkCost()

    @classmethod
    def equal(cls, num_stages: int, cost: LinkCost = LinkCost()) -> Links:
        """The same cost everywhere; none by default."""
        check_count("num_stages", num_stages, most=MOST_STAGES)
        each = (cost,) * (num_stages - 1)
        return cls(activations=each, gradients=each, token=LinkCost(latency_ns=cost.latency_ns))


@dataclass(frozen=True, eq=False)
class StepCosts:
    """What a local step of each stage may cost.

    Args:
        tables: per stage, int64 [rows, slots], nanoseconds of each slot of its program.

    Raises:
        ConfigError: where a table has no row, or a time is negative or above a thousand seconds.
    """

    tables: tuple[IntArray, ...]

    def __post_init__(self) -> None:
        for stage, table in enumerate(self.tables):
            if table.ndim != 2 or not len(table):
                raise ConfigError(
                    f"the costs of stage {stage} have shape {table.shape}; give [rows, slots], rows >= 1."
                )
            if table.size and not 0 <= table.min() <= table.max() <= LARGEST_NS:
                raise ConfigError(
                    f"the costs of stage {stage} reach from {table.min()} to {table.max()} ns; each must lie between "
                    "0 and a thousand seconds."
                )

    @classmethod
    def of_kinds(cls, program: Program, times_ns: Mapping[Kind, int | Sequence[int]]) -> StepCosts:
        """The same time for every action of a kind.

        Args:
            program: whose slots are timed.
            times_ns: of a whole batch, per kind, one number or one per stage; a kind that is left out takes no time. An
                action on one of M micro-batches takes an M-th of it.

        Raises:
            ConfigError: where a sequence does not have one entry per stage, or a time is out of range.
        """
        for kind, times in times_ns.items():
            if not isinstance(times, int | Sequence):
                raise ConfigError(f"{kind.name.lower()} takes {times!r}; give nanoseconds, or a list of one per stage.")
            entries = [times] if isinstance(times, int) else list(times)
            if len(entries) != (1 if isinstance(times, int) else program.num_stages):
                raise ConfigError(
                    f"{kind.name.lower()} has {len(entries)} times for {program.num_stages} stages; give one, or one "
                    "per stage."
                )
            for entry in entries:
                _check_ns(kind.name.lower(), entry)
        tables = []
        for stage, steps in enumerate(program.stages):
            row = []
            for slot in steps.slots:
                times = times_ns.get(slot.kind, 0)
                whole = times if isinstance(times, int) else times[stage]
                row.append(share(whole, slot, steps.policy.micro_batches))
            tables.append(np.array([row], np.int64))
        return cls(tuple(tables))

    @property
    def num_rows(self) -> int:
        """Of the longest table."""
        return max(map(len, self.tables))

    def mean(self) -> StepCosts:
        """One row: the mean of the rows of each table."""
        return StepCosts(tuple(np.rint(table.mean(axis=0, keepdims=True)).astype(np.int64) for table in self.tables))


def share(whole: int, slot: Slot, micro_batches: int) -> int:
    """The part of a batch's time that a slot takes; the parts of a batch add up to it."""
    if slot.micro_batch is None:
        return whole
    part = slot.micro_batch
    return whole * (part + 1) // micro_batches - whole * part // micro_batches
