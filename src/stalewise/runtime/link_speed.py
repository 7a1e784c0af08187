"""How fast messages are between two ranks, all neighbours at the same time."""

from __future__ import annotations

import statistics
import time

import torch
import torch.distributed as dist

from stalewise.runtime.exchange import all_gather_json

__all__ = ["measure_link"]

SMALL_BYTES = 1024
LARGE_BYTES = 8 << 20
ROUNDS = 8


def measure_link(group: dist.ProcessGroup) -> tuple[float, float]:
    """Bytes per second that one direction carries, and seconds of a small message; the slowest link counts.

    Every rank passes a message around the ring at the same time, so links share what they will share.
    """
    rank, size = dist.get_rank(), dist.get_world_size()
    if size == 1:
        return float("inf"), 0.0
    seconds = []
    for num_bytes in (SMALL_BYTES, LARGE_BYTES):
        sent, received = torch.ones(num_bytes, dtype=torch.uint8), torch.empty(num_bytes, dtype=torch.uint8)
        times = []
        for _ in range(ROUNDS):
            group.barrier().wait()
            start = time.perf_counter()
            sending = dist.isend(sent, (rank + 1) % size, group=group)
            dist.recv(received, (rank - 1) % size, group=group)
            assert sending is not None
            sending.wait()
            times.append(time.perf_counter() - start)
        seconds.append(max(all_gather_json(statistics.median(times), group)))
    latency_s, large_s = seconds
    return (LARGE_BYTES - SMALL_BYTES) / max(large_s - latency_s, 1e-9), latency_s
