"""Elastic runs that are saved amid them and go on in other processes, for tests of their records."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import dist_net
import torch

import stalewise
from stalewise.runtime.job import current_job

BOUND = (5, 3, 0)
STOPS = (1, 6, 14, 18, 22, 25, 32)
"""Losses after which a run is saved: in warm-up, amid a session, at its end, in a drain, in the next cycle."""

SESSIONS = ((12, False), (10, True), (10, True))
"""(batches, drain) of each call of `train`."""


def pipeline(activations: str = "recompute", **options: Any) -> stalewise.Pipeline:
    """BatchNorm, dropout, AdamW, clipping, a schedule; see `dist_net`."""
    method = stalewise.DSP(staleness=BOUND, elastic=True, activations=activations)  # type: ignore[arg-type]
    return dist_net.pipeline(3, method=method, **options)


def batches(session: int) -> list[Any]:
    """Of one session."""
    return dist_net.batches(SESSIONS[session][0], session + 1, last=3)


def train(
    pipe: stalewise.Pipeline,
    *,
    folder: Path | None = None,
    stop: int | None = None,
    between: bool = False,
    losses: Sequence[float] = (),
) -> dict[str, Any]:
    """Train all sessions; with a folder, save amid them, or go on from there.

    Args:
        pipe: to train.
        folder: of checkpoints.
        stop: losses after which it is saved; the run goes on.
        between: save at the end of the session in which that loss comes instead.
        losses: all of the run that was saved, where it is resumed.
    """
    seen: list[float] = []
    point = None
    if folder is not None and stop is None:
        point = pipe.resume(folder, positioned=True)
        assert point is not None
        assert point.exact
        seen = list(losses[: point.extra[1]])
    first = 0 if point is None else point.extra[0]
    for session in range(first, len(SESSIONS)):
        given = batches(session)
        if point is not None and session == first and point.extra[2]:
            given = [] if point.session_batches is None else given[point.session_batches :]
        due = False
        for loss in pipe.train(given if pipe.rank == 0 else None, drain=SESSIONS[session][1]):
            seen.append(loss)
            due = due or len(seen) == stop
            if len(seen) == stop and not between:
                assert folder is not None
                pipe.save(folder, extra=[session, len(seen), True])
        if due and between:
            assert folder is not None
            pipe.save(folder, extra=[session + 1, len(seen), False])
    pipe.wait_saved()
    return {
        "losses": seen,
        "state": pipe.state_dict(),
        "optimizer": pipe.optimizer_state_dict(),
        "orders": pipe.orders(),
    }


SLOW = (
    stalewise.Straggler(probability=0.2, pause_s=0.004, duration=2, seed=1),
    stalewise.Straggler(stages=(1,), probability=0.3, pause_s=0.006, seed=2),
)
CASES = [
    *(("recompute", stop, False) for stop in STOPS),
    *(("recompute", stop, True) for stop in (5, 20)),
    ("stored", 9, False),
]
"""(activations, losses, between sessions)"""


DEEP = tuple(
    tuple(letters(count) for count in (22, 10))
    for letters in (
        lambda count: "F" * 6 + "RBF" * (count - 6) + "RB" * 6,
        lambda count: "F" + "RFB" * (count - 1) + "RB",
        lambda count: "FB" * count,
    )
)
"""An order in which stage 0 is as far ahead as it may be while stage 1 is not, and recomputes before it forwards."""


def worker(folder: str) -> None:
    """Save and resume in each case, and repeat a record with an interruption; leave what came of it."""
    torch.set_num_threads(1)
    rank = current_job().rank
    for number, (activations, stop, between) in enumerate(CASES):
        place = Path(folder, f"case{number}")
        saved = train(pipeline(activations, stragglers=SLOW), folder=place, stop=stop, between=between)
        torch.save(saved, f"{place}.saved.{rank}")
        torch.save(train(pipeline(activations), folder=place, losses=saved["losses"]), f"{place}.resumed.{rank}")
    recorded = torch.load(Path(folder, f"case2.saved.{rank}"))["orders"]
    for name, orders, stop in (("again", recorded, 20), ("deep", DEEP, 14)):
        place = Path(folder, name)
        saved = train(pipeline(replay=orders), folder=place, stop=stop)
        torch.save(saved, f"{place}.saved.{rank}")
        again = train(pipeline(replay=orders), folder=place, losses=saved["losses"])
        torch.save(again, f"{place}.resumed.{rank}")
