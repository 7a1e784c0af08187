"""What a run says of slow stages: how long each was the bottleneck."""

from __future__ import annotations

from dataclasses import dataclass

from stalewise.protocol.bottleneck import Bottleneck
from stalewise.report.run_folder import RunFolder

__all__ = ["Spell", "longest_spell"]


@dataclass(frozen=True, kw_only=True)
class Spell:
    """A time in which one stage, link or loader set the pace.

    Args:
        worst: the telling with the largest factor.
        first_batch: at which it was told first.
        end_batch: at which another was told, or the batches of the run.
    """

    worst: Bottleneck
    first_batch: int
    end_batch: int


def longest_spell(run: RunFolder, *, factor: float) -> Spell | None:
    """Of all bottlenecks that were told with at least this factor; None where there was none."""
    spells: list[Spell] = []
    end = run.batches[-1].batch + 1 if run.batches else 0
    told = [*run.bottlenecks, (end, None)]
    begin, worst = 0, None
    for batch, found in told:
        if worst is not None and (found is None or (found.kind, found.stage) != (worst.kind, worst.stage)):
            spells.append(Spell(worst=worst, first_batch=begin, end_batch=batch))
            worst = None
        if found is not None and worst is None:
            begin, worst = batch, found
        elif found is not None and worst is not None and found.factor > worst.factor:
            worst = found
    slow = [spell for spell in spells if spell.worst.factor >= factor]
    return max(slow, key=lambda spell: spell.end_batch - spell.first_batch, default=None)
