"""The bundled digits: sizes, the split, and the pixels."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits as bundled_digits

from stalewise.data import DataSplit, load_data

FIRST_LABELS = [3, 9, 1, 3, 1, 9, 4, 4, 2, 8, 3, 5]
"""Of the training set; another version of scikit-learn must not change the split unnoticed."""


@pytest.fixture(scope="module")
def digits() -> DataSplit:
    return load_data("digits")


def test_shapes_and_classes(digits: DataSplit) -> None:
    assert digits.train.images.shape == (1437, 3, 32, 32)
    assert digits.test.images.shape == (360, 3, 32, 32)
    assert digits.num_classes == 10
    assert digits.train.class_names == tuple("0123456789")
    assert not digits.train.flip
    assert not digits.test.flip


def test_the_split_is_stratified(digits: DataSplit) -> None:
    train = torch.bincount(digits.train.labels)
    test = torch.bincount(digits.test.labels)
    assert ((train + test) * 360 / 1797 - test).abs().max() < 1


def test_the_split_is_always_the_same(digits: DataSplit) -> None:
    torch.manual_seed(5)
    np.random.seed(5)
    again = load_data("digits")
    for one, other in ((digits.train, again.train), (digits.test, again.test)):
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.labels, other.labels)
    assert digits.train.labels[:12].tolist() == FIRST_LABELS


def test_every_digit_is_in_one_of_the_two(digits: DataSplit) -> None:
    """The means of 8 x 8 originals and of their enlargements agree, up to the rounding of the pixels."""
    images = torch.cat([digits.train.images, digits.test.images])[:, 0].double().mean(dim=(1, 2)) / 255
    originals = torch.from_numpy(bundled_digits().images).mean(dim=(1, 2)) / 16
    assert (images.sort().values - originals.sort().values).abs().max() < 0.01


def test_channels_are_equal_and_use_the_whole_range(digits: DataSplit) -> None:
    images = digits.train.images
    assert torch.equal(images[:, 0], images[:, 1])
    assert torch.equal(images[:, 0], images[:, 2])
    assert (images.min(), images.max()) == (0, 255)
    assert len(set(digits.mean)) == len(set(digits.std)) == 1
