"""Random streams that a recompute can repeat.

Each pass of batch n over stage k draws from a stream of its own, seeded by

    blake2b("seed/stage/batch/micro_batch", 8 bytes, little endian)        (micro_batch 0 where there is none)

so that forward and recompute drop the same units, whatever ran in between, on any engine and any number of
processes. The caller's own random state is as before after every pass.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from hashlib import blake2b
from typing import Any

import numpy as np
import torch

__all__ = [
    "preserved_random_state",
    "process_random_state",
    "random_stream",
    "restore_process_random_state",
    "stream_seed",
]


def stream_seed(seed: int, stage: int, batch: int, micro_batch: int | None = None) -> int:
    """The seed of one pass, in [0, 2^63)."""
    key = f"{seed}/{stage}/{batch}/{micro_batch or 0}".encode()
    return int.from_bytes(blake2b(key, digest_size=8).digest(), "little") >> 1


@contextmanager
def preserved_random_state(device: torch.device) -> Iterator[None]:
    """Leave torch's random state, on the CPU and on `device`, as it was."""
    cpu_state = torch.get_rng_state()
    cuda_state = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    try:
        yield
    finally:
        torch.set_rng_state(cpu_state)
        if cuda_state is not None:
            torch.cuda.set_rng_state(cuda_state, device)


@contextmanager
def random_stream(seed: int, device: torch.device) -> Iterator[None]:
    """Draw from the stream of `seed` inside, on the CPU and on `device`."""
    with preserved_random_state(device):
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield


def process_random_state(device: torch.device) -> dict[str, Any]:
    """The random states that code of the user draws from: Python's, NumPy's, torch's on the CPU and on `device`."""
    name, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": [name, torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, gauss],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    }


def restore_process_random_state(state: Mapping[str, Any], device: torch.device) -> None:
    """The inverse of `process_random_state`."""
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)
