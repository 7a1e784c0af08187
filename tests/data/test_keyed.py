"""Keyed random bits: the published generator, and independence of what should not matter."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stalewise.data.keyed import Stream, _mix, keyed_bits
from stalewise.errors import ConfigError

WORD = 2**64
words = st.integers(0, WORD - 1)


def mix(x: int) -> int:
    """SplitMix64's output for the state `x`, in Python's integers."""
    x = (x + 0x9E3779B97F4A7C15) % WORD
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % WORD
    x = (x ^ x >> 27) * 0x94D049BB133111EB % WORD
    return x ^ x >> 31


def test_the_published_sequence() -> None:
    """The first outputs of SplitMix64 from seed 1234567, as its reference implementation prints them."""
    states = (1234567 + np.arange(5, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)).astype(np.uint64)
    assert _mix(states).tolist() == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]


@given(seed=words, epoch=words, stream=st.sampled_from(Stream), index=st.integers(0, 2**63 - 1))
def test_bits_are_those_of_the_formula(seed: int, epoch: int, stream: Stream, index: int) -> None:
    bits = keyed_bits(np.array([index]), seed=seed, epoch=epoch, stream=stream)
    assert int(bits[0]) == mix(mix(mix(mix(seed) ^ epoch) ^ stream) ^ index)


@given(indices=st.lists(st.integers(0, 10**6), min_size=1, max_size=20), seed=words)
def test_an_index_has_its_bits_in_any_company(indices: list[int], seed: int) -> None:
    together = keyed_bits(np.array(indices), seed=seed, epoch=3, stream=Stream.ORDER)
    alone = [keyed_bits(np.array([index]), seed=seed, epoch=3, stream=Stream.ORDER)[0] for index in indices]
    assert together.tolist() == alone


def test_keys_that_differ_give_bits_that_differ() -> None:
    indices = np.arange(1000)
    keys = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (WORD - 1, 0, 0)]
    bits = [keyed_bits(indices, seed=s, epoch=e, stream=Stream(k)) for s, e, k in keys]
    assert len(np.unique(np.concatenate(bits))) == len(keys) * len(indices)


def test_every_bit_is_set_half_of_the_time() -> None:
    bits = keyed_bits(np.arange(20_000), seed=7, epoch=0, stream=Stream.AUGMENTATION)
    shares = [((bits >> np.uint64(place)) & np.uint64(1)).mean() for place in range(64)]
    assert np.abs(np.array(shares) - 0.5).max() < 5 * 0.5 / np.sqrt(20_000)


@pytest.mark.parametrize("bad", [-1, WORD, 1.5, True, None])
def test_seed_and_epoch_are_words(bad: object) -> None:
    with pytest.raises(ConfigError, match="seed is"):
        keyed_bits(np.arange(2), seed=bad, epoch=0, stream=Stream.ORDER)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="epoch is"):
        keyed_bits(np.arange(2), seed=0, epoch=bad, stream=Stream.ORDER)  # type: ignore[arg-type]
