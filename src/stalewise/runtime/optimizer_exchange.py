"""The optimizer state of a rank, on all ranks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from stalewise.runtime.exchange import broadcast_json, broadcast_tensors
from stalewise.runtime.job import Job

__all__ = ["share_optimizer_state"]


def share_optimizer_state(own: Mapping[str, Any], rank: int, job: Job) -> dict[str, Any]:
    """The optimizer state of one rank, on all ranks: tensors by name, everything else as JSON.

    Args:
        own: of this rank.
        rank: whose state is wanted; all ranks call with the same.
        job: of the ranks.
    """
    mine = rank == job.rank
    tensors = {
        f"{name}\n{key}": value
        for name, values in own["state"].items()
        for key, value in values.items()
        if isinstance(value, Tensor)
    }
    plain = {
        "state": {
            name: {key: value for key, value in values.items() if not isinstance(value, Tensor)}
            for name, values in own["state"].items()
        },
        "param_groups": [
            {key: value.item() if isinstance(value, Tensor) else value for key, value in group.items()}
            for group in own["param_groups"]
        ],
    }
    shared: dict[str, Any] = broadcast_json(plain if mine else None, rank, job.group)
    for group in shared["param_groups"]:
        group.update({key: tuple(value) for key, value in group.items() if isinstance(value, list)})
        group["params"] = list(group["params"])
    for joined, value in broadcast_tensors(tensors if mine else None, rank, job.group).items():
        name, key = joined.split("\n")
        shared["state"][name][key] = value
    return shared
