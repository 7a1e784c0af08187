"""Random costs: which row of its table each local step of each stage takes, over replicas.

A slow step covers all actions of the local step. Replicas are independent; one seed gives the same draws to every
method, because a draw belongs to a stage and a local update, not to a time.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from stalewise.errors import ConfigError
from stalewise.protocol.program import Program

__all__ = ["Rows", "by_update", "draw_rows", "slow_updates"]

Rows = NDArray[np.int16]
BoolArray = NDArray[np.bool_]


def slow_updates(
    num_stages: int,
    num_updates: int,
    *,
    replicas: int,
    seed: int,
    probability: float,
    duration: int = 1,
    stages: tuple[int, ...] | None = None,
) -> BoolArray:
    """Which steps are slow, [stages, updates, replicas].

    Args:
        num_stages: K.
        num_updates: local updates of each.
        replicas: R.
        seed: of all draws.
        probability: that a slow spell begins in a step.
        duration: steps of a spell; spells that overlap are one longer spell.
        stages: those that can be slow; None: each, drawn for itself.

    Raises:
        ConfigError: where a value is out of its range.
    """
    if not 0 <= probability <= 1:
        raise ConfigError(f"the probability of a slow step is {probability}; it must lie between 0 and 1.")
    if duration < 1 or replicas < 1:
        raise ConfigError(f"duration {duration} and replicas {replicas} must both be at least 1.")
    slow = np.zeros((num_stages, num_updates, replicas), np.bool_)
    for stage in range(num_stages):
        # A stream per stage, so that a stage's draws do not depend on how many stages or updates there are.
        random = np.random.default_rng((seed, stage))
        begins = random.random((num_updates, replicas), np.float32) < probability
        if stages is not None and stage not in stages:
            continue
        for back in range(min(duration, num_updates)):
            slow[stage, back:] |= begins[: num_updates - back]
    return slow


def by_update(program: Program, of_updates: NDArray[np.integer], num_steps: int) -> Rows:
    """From rows per local update to rows per local step.

    Step n of stage k makes update n - m_k, so the forwards of the warm-up belong to update 0.

    Args:
        program: gives m_k.
        of_updates: [stages, updates, replicas].
        num_steps: of a run.
    """
    steps = np.arange(num_steps)
    last = of_updates.shape[1] - 1
    return np.stack(
        [
            of_updates[stage, np.clip(steps - steps_of.backward_lag, 0, last)]
            for stage, steps_of in enumerate(program.stages)
        ]
    ).astype(np.int16)


def draw_rows(num_stages: int, num_steps: int, num_rows: int, *, replicas: int, seed: int) -> Rows:
    """A row for each step, all equally likely, [stages, steps, replicas]."""
    return np.stack(
        [
            np.random.default_rng((seed, stage)).integers(num_rows, size=(num_steps, replicas), dtype=np.int16)
            for stage in range(num_stages)
        ]
    )
