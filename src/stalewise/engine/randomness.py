"""Random streams that a recompute can repeat.

Each pass of batch n over stage k draws from a stream of its own, seeded by

    blake2b("seed/stage/batch/micro_batch", 8 bytes, little endian)        (micro_batch 0 where there is none)

so that forward and recompute drop the same units, whatever ran in between, on any engine and any number of
processes. The caller's own random state is as before after every pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import blake2b

import torch

__all__ = ["preserved_random_state", "random_stream", "stream_seed"]


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
