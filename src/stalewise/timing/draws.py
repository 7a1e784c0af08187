"""Which row of its table each local step of each stage takes, over replicas."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from stalewise.protocol.program import Program

__all__ = ["Rows", "by_update", "draw_rows"]

Rows: TypeAlias = NDArray[np.int32]


def by_update(program: Program, of_updates: NDArray[np.integer], num_steps: int) -> Rows:
    """From rows per local update to rows per local step.

    Step n of stage k makes update n - m_k, so the forwards of the warm-up belong to update 0.

    Args:
        program: gives m_k.
        of_updates: [stages, updates, replicas]; steps beyond the last update take its row.
        num_steps: of a run.
    """
    steps = np.arange(num_steps)
    last = of_updates.shape[1] - 1
    return np.stack(
        [
            of_updates[stage, np.clip(steps - steps_of.backward_lag, 0, last)]
            for stage, steps_of in enumerate(program.stages)
        ]
    ).astype(np.int32)


def draw_rows(num_stages: int, num_steps: int, num_rows: int, *, replicas: int, seed: int) -> Rows:
    """A row for each step, all equally likely, [stages, steps, replicas].

    A stage's draws do not depend on the number of stages.
    """
    return np.stack(
        [
            np.random.default_rng((seed, stage)).integers(num_rows, size=(num_steps, replicas), dtype=np.int32)
            for stage in range(num_stages)
        ]
    )
