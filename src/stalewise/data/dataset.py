"""Images decoded in memory with their labels, and a training and a test set with a normalisation."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from stalewise.data.augment import augment
from stalewise.data.samples import Samples
from stalewise.errors import DataError

__all__ = ["DataSplit", "ImageDataset"]

_CHUNK = 4096
"""Images counted at once: `torch.bincount` widens a copy of its input."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ImageDataset(Samples):
    """Images and labels of one split, decoded in memory.

    Args:
        name: for messages and logs, such as `cifar10 train`.
        images: uint8 [N, 3, H, W], N >= 1.
        labels: int64 [N], each in 0 .. len(class_names) - 1.
        class_names: one name per class.
        flip: whether a mirrored image still shows its class; false for digits and letters.

    Raises:
        DataError: where shapes, dtypes or labels break these rules.
    """

    name: str
    images: Tensor
    labels: Tensor
    class_names: tuple[str, ...]
    flip: bool = True

    def __post_init__(self) -> None:
        images, labels = self.images, self.labels
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise DataError(
                f"images of {self.name} are {images.dtype} {list(images.shape)}; images are torch.uint8 "
                "[N, 3, H, W]. Convert them before building an ImageDataset."
            )
        if labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
            raise DataError(
                f"labels of {self.name} are {labels.dtype} {list(labels.shape)} for {len(images)} images; "
                "labels are torch.int64 [N], one per image. Convert them before building an ImageDataset."
            )
        if images.numel() == 0:
            raise DataError(
                f"images of {self.name} have shape {list(images.shape)}; a data set needs at least one "
                "image. Check its source."
            )
        outside = (labels < 0) | (labels >= len(self.class_names))
        if outside.any():
            index = int(outside.nonzero()[0])
            raise DataError(
                f"label {int(labels[index])} of {self.name} record {index} is not one of the "
                f"{len(self.class_names)} classes 0 .. {len(self.class_names) - 1}. Repair the label, or "
                "name every class."
            )

    @property
    def image_shape(self) -> tuple[int, ...]:
        """(3, H, W)."""
        return tuple(self.images.shape[1:])

    def take(self, indices: Tensor, *, seed: int, epoch: int, augmented: bool) -> Tensor:
        """Some images; augmented, they are cropped from a border of 4 pixels and mirrored. See `Samples`."""
        images = self.images[indices]
        return augment(images, indices, seed=seed, epoch=epoch, flip=self.flip) if augmented else images

    def first(self, limit: int | None) -> ImageDataset:
        """See `Samples`."""
        if limit is None:
            return self
        self._check_limit(limit)
        return replace(self, images=self.images[:limit], labels=self.labels[:limit])

    def flipping(self, flip: bool) -> ImageDataset:
        """See `Samples`."""
        return replace(self, flip=flip)


@dataclass(frozen=True, kw_only=True, eq=False)
class DataSplit:
    """A training set, its test set, and the normalisation of both.

    Args:
        train: the training samples.
        test: the test samples, with the classes and the image size of `train`.
        mean: per channel, of pixel / 255 over a training set.
        std: per channel, likewise; never 0.
        num_classes: number of classes, whether or not each of them occurs.

    Raises:
        DataError: where `train`, `test` and `num_classes` disagree.
    """

    train: Samples
    test: Samples
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    num_classes: int

    def __post_init__(self) -> None:
        if self.train.image_shape != self.test.image_shape:
            raise DataError(
                f"images are {list(self.train.image_shape)} in {self.train.name} and "
                f"{list(self.test.image_shape)} in {self.test.name}; both splits feed one model, so "
                "they must have one shape. Resize one of them."
            )
        if self.train.class_names != self.test.class_names or self.num_classes != len(self.train.class_names):
            raise DataError(
                f"{self.train.name} has {len(self.train.class_names)} classes, {self.test.name} "
                f"{len(self.test.class_names)}, and num_classes is {self.num_classes}; all must name the "
                "same classes in the same order. Label both splits alike."
            )

    @classmethod
    def normalised_by_train(cls, train: ImageDataset, test: ImageDataset) -> DataSplit:
        """A split whose mean and std are those of all of `train`."""
        mean, std = channel_statistics(train.images)
        return cls(train=train, test=test, mean=mean, std=std, num_classes=len(train.class_names))

    def first(self, *, train_limit: int | None, test_limit: int | None) -> DataSplit:
        """The first samples of each; mean and std stay, so that a smoke run normalises like the whole run."""
        return replace(self, train=self.train.first(train_limit), test=self.test.first(test_limit))


def channel_statistics(images: Tensor) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """Mean and standard deviation per channel of pixel / 255.

    Computed from histograms in whole numbers, so the result is the same for any number of threads.

    Args:
        images: uint8 [N, 3, H, W].

    Returns:
        Mean and std; the std of a channel of one value is given as 1, so that it normalises to zeros.
    """
    means, stds = [], []
    for channel in range(3):
        histogram = torch.zeros(256, dtype=torch.int64)
        for start in range(0, len(images), _CHUNK):
            chunk = images[start : start + _CHUNK, channel]
            histogram += torch.bincount(chunk.flatten(), minlength=256)
        counts: list[int] = histogram.tolist()
        total = sum(counts)
        first = sum(value * count for value, count in enumerate(counts))
        second = sum(value * value * count for value, count in enumerate(counts))
        means.append(first / total / 255)
        variance = (total * second - first * first) / (total * total)
        stds.append(math.sqrt(variance) / 255 if variance > 0 else 1.0)
    return (means[0], means[1], means[2]), (stds[0], stds[1], stds[2])
