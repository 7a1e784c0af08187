"""Groups for payloads that go from GPU to GPU.

NCCL needs a GPU per rank. Each direction of each link gets a group of its own, so that activations and
gradients never wait for each other.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from stalewise.runtime.exchange import all_gather_json
from stalewise.runtime.job import Job

__all__ = ["nccl_fits", "payload_groups"]


def nccl_fits(job: Job, device: torch.device) -> bool:
    """Whether every rank of several has a GPU to itself, and torch knows NCCL. Collective: all ranks call it."""
    places = all_gather_json([job.members[job.rank].host, device.type, device.index], job.group)
    own_gpus = all(kind == "cuda" for _, kind, _ in places) and len({tuple(place) for place in places}) == len(places)
    return own_gpus and job.world_size > 1 and dist.is_nccl_available()


def payload_groups(job: Job, device: torch.device) -> dict[tuple[int, int], dist.ProcessGroup]:
    """NCCL groups by (source, destination); empty where ranks share a GPU, or work on CPUs.

    Collective: all ranks call it.
    """
    if not nccl_fits(job, device):
        return {}
    directions = [direction for rank in range(job.world_size - 1) for direction in ((rank, rank + 1), (rank + 1, rank))]
    groups = {direction: dist.new_group(sorted(direction), backend="nccl") for direction in directions}
    return {direction: group for direction, group in groups.items() if job.rank in direction}
