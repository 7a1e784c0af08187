"""Which row of its table each local step of each stage takes, over replicas."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from stalewise.errors import ConfigError
from stalewise.protocol.actions import COMPUTE
from stalewise.protocol.numbers import check_real
from stalewise.protocol.program import Program
from stalewise.timing.costs import LARGEST_NS, StepCosts

__all__ = ["Rows", "by_update", "draw_rows", "jittered", "varied"]

JITTER_ROWS = 4096
"""Different steps of a stage whose times vary."""

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


def jittered(costs: StepCosts, variation: float, *, seed: int) -> StepCosts:
    """Costs that vary from step to step: each step takes a log-normal multiple of its time, all of its actions alike.

    Args:
        costs: the means; where a table has several rows, each of them varies.
        variation: standard deviation of a multiple over its mean, which is 1.
        seed: of the multiples; a stage's do not depend on the number of stages.

    Returns:
        Tables of `JITTER_ROWS` rows, for draws as in `draw_rows`; their mean is that of `costs`.

    Raises:
        ConfigError: where the variation is negative or not a number.
    """
    check_real("jitter", variation)
    if variation < 0:
        raise ConfigError(f"jitter is {variation}; it is a standard deviation over a mean, at least 0.")
    sigma = np.sqrt(np.log1p(variation**2))
    tables = []
    for stage, table in enumerate(costs.tables):
        # Not the generator of the draws: a row must not depend on who draws it.
        multiples = np.random.default_rng((seed, stage, 1)).lognormal(sigma=sigma, size=(JITTER_ROWS, 1))
        many = table[np.arange(JITTER_ROWS) % len(table)] * (multiples / multiples.mean())
        tables.append(np.clip(np.rint(many), 0, LARGEST_NS).astype(np.int64))
    return StepCosts(tuple(tables))


def varied(costs: StepCosts, program: Program, factors: Sequence[Sequence[float]]) -> StepCosts:
    """A row for each measured step: what it computes takes a multiple of its time, all of its actions alike.

    Args:
        costs: of one row.
        program: whose costs they are.
        factors: per stage, times of steps over that row.
    """
    tables = []
    for (row,), steps, of_stage in zip(costs.tables, program.stages, factors, strict=True):
        computes = np.array([slot.kind in COMPUTE for slot in steps.slots])
        tables.append(np.rint(np.where(computes, np.outer(of_stage, row), row)).astype(np.int64))
    return StepCosts(tuple(tables))
