"""Augmentation: what one sample gets, and that nothing else decides it."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from stalewise.data import augment, normalise
from stalewise.data.keyed import Stream, keyed_bits

seeds = st.integers(0, 2**64 - 1)


def images(count: int, height: int = 8, width: int = 8) -> Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.randint(1, 256, (count, 3, height, width), generator=generator).to(torch.uint8)


def one_by_one(batch: Tensor, indices: Tensor, *, seed: int, epoch: int, flip: bool) -> Tensor:
    """The same by slicing one image after another."""
    outputs = []
    for image, index in zip(batch, indices.tolist(), strict=True):
        key = int(keyed_bits(np.array([index]), seed=seed, epoch=epoch, stream=Stream.AUGMENTATION)[0])
        top = (key % 2**31) * 9 >> 31
        left = (key >> 32) % 2**31 * 9 >> 31
        output = F.pad(image, (4, 4, 4, 4))[:, top : top + image.shape[1], left : left + image.shape[2]]
        outputs.append(output.flip(2) if flip and key >> 31 & 1 else output)
    return torch.stack(outputs)


@settings(max_examples=40)
@given(seed=seeds, epoch=st.integers(0, 500), start=st.integers(0, 10**6), flip=st.booleans())
def test_a_batch_is_its_images_one_by_one(seed: int, epoch: int, start: int, flip: bool) -> None:
    batch, indices = images(6, 7, 9), torch.arange(start, start + 6)
    options = {"seed": seed, "epoch": epoch, "flip": flip}
    assert torch.equal(augment(batch, indices, **options), one_by_one(batch, indices, **options))


@given(seed=seeds, order=st.permutations(range(8)), cut=st.integers(1, 7))
def test_neither_order_nor_batch_matters(seed: int, order: list[int], cut: int) -> None:
    batch, indices = images(8), torch.arange(100, 108)
    options = {"seed": seed, "epoch": 2, "flip": True}
    whole = augment(batch, indices, **options)
    parts = [augment(batch[part], indices[part], **options) for part in torch.tensor(order).split(cut)]
    assert torch.equal(torch.cat(parts), whole[order])


def test_every_shift_occurs_equally_often_in_both_directions() -> None:
    """A single bright pixel in the middle tells the shift, and its neighbour the mirroring."""
    count = 8100
    batch = torch.zeros(count, 3, 16, 16, dtype=torch.uint8)
    batch[:, :, 8, 7] = 1
    batch[:, :, 8, 8] = 2
    output = augment(batch, torch.arange(count), seed=11, epoch=0, flip=True)[:, 0]
    position = (output == 2).flatten(1).long().argmax(dim=1)
    row, column = position // 16, position % 16
    mirrored = output[torch.arange(count), row, column + 1] == 1
    assert abs(mirrored.double().mean() - 0.5) < 5 * 0.5 / count**0.5
    # Mirrored, column c becomes 15 - c.
    shift_down, shift_right = row - 8, torch.where(mirrored, 15 - column, column) - 8
    counts = torch.zeros(9, 9)
    counts.index_put_((shift_down + 4, shift_right + 4), torch.ones(count), accumulate=True)
    assert (counts > 0).all()
    # 80 degrees of freedom: mean 80, standard deviation 12.6.
    assert ((counts - 100).square() / 100).sum() < 80 + 5 * 12.6


def test_digits_are_never_mirrored() -> None:
    ramp = torch.arange(1, 17, dtype=torch.uint8).expand(500, 3, 16, 16)
    output = augment(ramp, torch.arange(500), seed=0, epoch=0, flip=False)
    middle = output[:, 0, 8, 4:12].int()
    assert (middle.diff(dim=1) == 1).all()


@pytest.mark.parametrize("change", [{"seed": 1}, {"epoch": 1}])
def test_seed_and_epoch_change_the_augmentation(change: dict[str, int]) -> None:
    batch, indices = images(200), torch.arange(200)
    first = augment(batch, indices, **({"seed": 0, "epoch": 0} | change), flip=True)
    second = augment(batch, indices, seed=0, epoch=0, flip=True)
    same = (first == second).flatten(1).all(dim=1).sum()
    assert same < 10  # one in 162 by chance


def test_the_images_given_stay_as_they_are() -> None:
    batch = images(20)
    before = batch.clone()
    output = augment(batch, torch.arange(20), seed=0, epoch=0, flip=True)
    output.zero_()
    normalise(batch, (0.5,) * 3, (0.25,) * 3)
    assert torch.equal(batch, before)


def test_normalised_values() -> None:
    batch, mean, std = images(50), (0.1, 0.2, 0.3), (0.5, 0.25, 2.0)
    output = normalise(batch, mean, std)
    assert output.dtype is torch.float32
    exact = (batch.double() / 255 - torch.tensor(mean).double().view(3, 1, 1)) / torch.tensor(std).double().view(
        3, 1, 1
    )
    torch.testing.assert_close(output.double(), exact, rtol=1e-5, atol=1e-6)
