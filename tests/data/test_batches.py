"""The batches of an epoch: every sample once, the same for any number of workers, and no one else's randomness used."""

import pickle
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from stalewise.data import Batches, ImageDataset, augment, normalise
from stalewise.errors import ConfigError

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)

# Python 3.12 and later warn of forking while threads run, which is how the loader starts its workers on
# Linux.
workers = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")


def numbered(count: int, *, flip: bool = True) -> ImageDataset:
    """Samples that are known by their label, which is their index."""
    generator = torch.Generator().manual_seed(0)
    return ImageDataset(
        name="numbered",
        images=torch.randint(0, 256, (count, 3, 8, 8), generator=generator).to(torch.uint8),
        labels=torch.arange(count),
        class_names=tuple(map(str, range(count))),
        flip=flip,
    )


def batches(dataset: ImageDataset, **options) -> Batches:
    defaults = {"batch_size": 8, "seed": 1, "epoch": 0, "shuffle": True, "augment": True}
    return Batches(dataset, MEAN, STD, **(defaults | options))


def same(one: list[tuple[Tensor, Tensor]], other: list[tuple[Tensor, Tensor]]) -> bool:
    return len(one) == len(other) and all(
        torch.equal(x, u) and torch.equal(y, v) for (x, y), (u, v) in zip(one, other, strict=True)
    )


def labels(epoch: Batches) -> list[int]:
    return [label for _, batch in epoch for label in batch.tolist()]


@settings(max_examples=30, deadline=None)
@given(count=st.integers(1, 40), size=st.integers(1, 45), drop=st.booleans(), seed=st.integers(0, 2**64 - 1))
def test_every_sample_comes_once(count: int, size: int, drop: bool, seed: int) -> None:
    if drop and count < size:
        return
    epoch = batches(numbered(count), batch_size=size, drop_last=drop, seed=seed)
    seen = list(epoch)
    assert len(seen) == len(epoch)
    assert [len(batch) for _, batch in seen[:-1]] == [size] * (len(seen) - 1)
    order = labels(epoch)
    if drop:
        assert len(order) == count // size * size
        assert len(set(order)) == len(order)
    else:
        assert sorted(order) == list(range(count))


def test_shapes_and_dtypes() -> None:
    for images, batch in batches(numbered(20)):
        assert images.dtype is torch.float32
        assert images.shape[1:] == (3, 8, 8)
        assert batch.dtype is torch.int64
        assert len(images) == len(batch)


def test_without_shuffle_the_order_is_that_of_the_data() -> None:
    assert labels(batches(numbered(20), shuffle=False)) == list(range(20))


def test_the_order_depends_on_seed_and_epoch() -> None:
    data = numbered(100)
    orders = {tuple(labels(batches(data, seed=seed, epoch=epoch))) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9
    assert labels(batches(data)) == labels(batches(data))


def test_the_order_is_kept_over_versions() -> None:
    assert labels(batches(numbered(12), seed=5, epoch=2)) == [4, 8, 3, 6, 9, 11, 2, 1, 10, 7, 0, 5]


def test_places_are_spread_evenly() -> None:
    """Where sample 0 of 10 comes, over 2,000 epochs."""
    data = numbered(10)
    places = [labels(batches(data, epoch=epoch, augment=False, batch_size=10)).index(0) for epoch in range(2000)]
    counts = np.bincount(places, minlength=10)
    assert ((counts - 200) ** 2 / 200).sum() < 9 + 5 * np.sqrt(18)


def test_a_sample_looks_the_same_wherever_it_comes() -> None:
    data = numbered(30)
    shuffled = {label: image for x, y in batches(data) for image, label in zip(x, y.tolist(), strict=True)}
    images = torch.cat([x for x, _ in batches(data, shuffle=False, batch_size=7)])
    assert all(torch.equal(images[index], shuffled[index]) for index in range(30))
    expected = augment(data.images, torch.arange(30), seed=1, epoch=0, flip=True)
    assert torch.equal(images, normalise(expected, MEAN, STD))


def test_without_augmentation_images_are_only_normalised() -> None:
    data = numbered(10)
    images = torch.cat([x for x, _ in batches(data, shuffle=False, augment=False)])
    assert torch.equal(images, normalise(data.images, MEAN, STD))


def test_the_data_set_decides_on_mirroring() -> None:
    for flip in (True, False):
        data = numbered(64, flip=flip)
        images = torch.cat([x for x, _ in batches(data, shuffle=False)])
        expected = augment(data.images, torch.arange(64), seed=1, epoch=0, flip=flip)
        assert torch.equal(images, normalise(expected, MEAN, STD))


@workers
@pytest.mark.parametrize("num_workers", [1, 2])
def test_workers_change_nothing(num_workers: int) -> None:
    data = numbered(50)
    inline = list(batches(data))
    epoch = batches(data, num_workers=num_workers)
    assert same(list(epoch), inline)
    assert len(epoch) == len(inline)
    assert all(type(batch) is tuple for batch in epoch)


@workers
@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_middle_of_an_epoch_is_the_same_when_resumed(num_workers: int) -> None:
    data = numbered(50)
    whole = list(batches(data))
    for start in (0, 3, 6, 7):
        resumed = batches(data, start_batch=start, num_workers=num_workers)
        assert len(resumed) == 7 - start
        assert same(list(resumed), whole[start:])


@workers
@pytest.mark.parametrize("num_workers", [0, 2])
def test_no_other_random_state_is_touched_or_read(num_workers: int) -> None:
    data = numbered(20)
    expected = list(batches(data))
    torch.manual_seed(123)
    random.seed(123)
    np.random.seed(123)
    before = torch.get_rng_state(), random.getstate(), repr(np.random.get_state())
    assert same(list(batches(data, num_workers=num_workers)), expected)
    after = torch.get_rng_state(), random.getstate(), repr(np.random.get_state())
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]


@workers
@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_iteration_that_is_left_early_does_no_harm(num_workers: int) -> None:
    epoch = batches(numbered(50), num_workers=num_workers)
    first = next(iter(epoch))
    assert same([first], list(epoch)[:1])


def test_an_epoch_can_be_sent_to_another_process() -> None:
    """As the loader does where processes are spawned rather than forked."""
    epoch = batches(numbered(20))
    assert same(list(pickle.loads(pickle.dumps(epoch))), list(epoch))


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_change_nothing(threads: int) -> None:
    data = numbered(2000)
    expected = list(batches(data, batch_size=1000))
    torch.set_num_threads(threads)
    assert same(list(batches(data, batch_size=1000)), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0; it must be an integer >= 1"),
        ({"batch_size": True}, "batch_size is True"),
        ({"num_workers": -1}, "num_workers is -1"),
        ({"start_batch": -1}, "start_batch is -1"),
        ({"start_batch": 4}, "start_batch is 4, and an epoch of numbered has 3 batches of 8"),
        ({"seed": -1}, "seed is -1"),
        ({"epoch": -1, "shuffle": False}, "epoch is -1"),
        ({"batch_size": 21, "drop_last": True}, "20 samples, fewer than batch_size 21.*20 or less"),
    ],
)
def test_arguments_out_of_range(options: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        batches(numbered(20), **options)


@pytest.mark.parametrize(("mean", "std"), [((0.5,), (0.5,)), (MEAN, (0.5, 0.5)), (MEAN, (0.5, 0.0, 0.5))])
def test_mean_and_std_are_three_numbers(mean: tuple[float, ...], std: tuple[float, ...]) -> None:
    with pytest.raises(ConfigError, match="one number per channel"):
        Batches(numbered(4), mean, std, batch_size=2, seed=0, epoch=0, shuffle=True, augment=True)
