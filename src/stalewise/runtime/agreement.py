"""All ranks compare what they were given, so that a difference is an error everywhere and never a hang."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

from stalewise.errors import ConfigError
from stalewise.runtime.exchange import all_gather_json
from stalewise.runtime.job import Job

__all__ = ["check_agreement"]


def check_agreement(job: Job, given: Mapping[str, Any], *, num_stages: int) -> None:
    """Compare settings of all ranks; collective.

    Args:
        given: to this rank, by the name of the argument: JSON values. Of a model, a list of layers, only the first that
            differs is told.
        num_stages: of the method.

    Raises:
        ConfigError: on all ranks, where two differ, or where there is not one rank for each stage.
    """
    everyone = all_gather_json(dict(given), job.group)
    for rank, other in enumerate(everyone):
        for field, value in other.items():
            expected = everyone[0][field]
            if value != expected:
                if field == "model":
                    pairs = itertools.zip_longest(expected, value)
                    expected, value = next(pair for pair in pairs if pair[0] != pair[1])
                raise ConfigError(
                    f"rank {rank} and rank 0 were given another {field}: {value!r} against {expected!r}. All "
                    "ranks must build the pipeline from the same arguments."
                )
    if job.world_size != num_stages:
        raise ConfigError(
            f"the method has {num_stages} stages and the job {job.world_size} ranks; rank k is stage "
            f"k. Start {num_stages} workers, or use a method of {job.world_size} stages."
        )
