"""Random bits that depend on their key alone: a counter-based generator with nothing to carry along.

    bits(seed, epoch, stream, index) = m(m(m(m(seed) ^ epoch) ^ stream) ^ index)

    m(x):   x = x + 9E3779B97F4A7C15
            x = (x ^ x >> 30) * BF58476D1CE4E5B9          all modulo 2**64
            x = (x ^ x >> 27) * 94D049BB133111EB
            x ^ x >> 31

So a sample's randomness is the same in any batch, order or process, and on any machine and version of NumPy.

Source: Steele, Lea and Flood, Fast Splittable Pseudorandom Number Generators, OOPSLA 2014 (m is their
SplitMix64); keys in place of state as in Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3, SC 2011.
"""

from __future__ import annotations

import enum

import numpy as np
from numpy.typing import NDArray

from stalewise.errors import ConfigError

__all__ = ["Stream", "keyed_bits", "keyed_uniforms"]


class Stream(enum.IntEnum):
    """What random bits are for; different uses of one (seed, epoch, index) are independent."""

    AUGMENTATION = 0
    ORDER = 1


def keyed_bits(indices: NDArray[np.int64], *, seed: int, epoch: int, stream: Stream) -> NDArray[np.uint64]:
    """64 random bits for each index.

    Args:
        indices: of the samples, each at least 0.
        seed: 0 .. 2**64 - 1.
        epoch: 0 .. 2**64 - 1.
        stream: what they are for.

    Raises:
        ConfigError: where seed or epoch is out of its range.
    """
    for name, value in (("seed", seed), ("epoch", epoch)):
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**64:
            raise ConfigError(f"{name} is {value!r}; it must be an integer in 0 .. 2**64 - 1.")
    key = np.zeros(1, dtype=np.uint64)  # an array, not a scalar: NumPy warns when scalars wrap around
    for part in (seed, epoch, stream):
        key = _mix(key ^ np.uint64(part))
    return _mix(key ^ indices.astype(np.uint64))


def keyed_uniforms(index: int, count: int, *, seed: int, epoch: int, stream: Stream) -> NDArray[np.float64]:
    """Several random numbers for one index, each uniform in 0 .. 1 (below 1) with 53 bits: m(bits ^ 1), m(bits ^ 2), ..

    Args:
        index: of the sample.
        count: how many.
        seed: as for `keyed_bits`.
        epoch: likewise.
        stream: likewise.
    """
    bits = keyed_bits(np.array([index]), seed=seed, epoch=epoch, stream=stream)
    mixed = _mix(bits ^ np.arange(1, count + 1, dtype=np.uint64)) >> np.uint64(11)
    return mixed.astype(np.float64) * 2.0**-53


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
