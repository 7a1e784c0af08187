"""Times sides in turn: in every round each of them runs some steps, in an order that changes."""

from __future__ import annotations

import random
import statistics
import sys
from collections.abc import Mapping

from sides import Side
from vs_torch_pipelining import steady_step_s

from stalewise.runtime.exchange import all_gather_json
from stalewise.runtime.job import Job

LEAST_STEPS = 8


def interleaved(sides: Mapping[str, Side], job: Job, *, rounds: int, seconds: float) -> dict[str, list[float]]:
    """Seconds per step of each side in each round; collective.

    A side that has no updates on a rank leaves that rank idle; it counts by those that have.

    Args:
        sides: by name, the same on all ranks.
        job: of the ranks.
        rounds: after two of warm-up.
        seconds: per side and round, about.
    """
    times: dict[str, list[float]] = {name: [] for name in sides}
    for index in range(-2, rounds):
        order = list(sides)
        random.Random(f"round {index}").shuffle(order)
        for name in order:
            side, known = sides[name], times[name]
            count = LEAST_STEPS + 3 * side.depth
            if known:
                count = max(count, round((seconds if index >= 0 else seconds / 4) / statistics.median(known)))
            all_gather_json(None, job.group)
            everyone = [ends for ends in all_gather_json(side.run(count), job.group) if ends]
            step_s = steady_step_s(everyone, skipped=max(2 + side.depth, count // 5))
            # What the warm-up took says how many steps the first round needs, and nothing else.
            times[name] = [*(known if index > 0 else []), step_s]
        if job.rank == 0:
            print(f"round {index + 1} of {rounds}" if index >= 0 else "warm-up", file=sys.stderr, flush=True)
    return times
