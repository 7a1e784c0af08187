"""What batches need to know of a data set, wherever its images are."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor

from stalewise.errors import ConfigError

__all__ = ["Samples"]


class Samples(ABC):
    """Images and labels of one split in a fixed order; a sample is known by its index in it.

    Attributes:
        name: for messages and logs, such as `cifar10 train`.
        labels: int64 [N], each in 0 .. len(class_names) - 1.
        class_names: one name per class.
        flip: whether a mirrored image still shows its class; false for digits and letters.
    """

    name: str
    labels: Tensor
    class_names: tuple[str, ...]
    flip: bool

    def __len__(self) -> int:
        return len(self.labels)

    @property
    @abstractmethod
    def image_shape(self) -> tuple[int, ...]:
        """(3, H, W) of an image in a batch."""

    @abstractmethod
    def take(self, indices: Tensor, *, seed: int, epoch: int, augmented: bool) -> Tensor:
        """Some images, whatever else was taken before.

        Args:
            indices: int64 [B].
            seed: of the run; with the epoch and an index it decides how an image is augmented.
            epoch: counted from 0.
            augmented: whether to crop and mirror at random.

        Returns:
            uint8 [B, 3, H, W].
        """

    @abstractmethod
    def first(self, limit: int | None) -> Samples:
        """The first `limit` samples, or all of them where `limit` is None or larger than the data set.

        Raises:
            ConfigError: where `limit` is not at least 1.
        """

    @abstractmethod
    def flipping(self, flip: bool) -> Samples:
        """The same samples with this `flip`."""

    def _check_limit(self, limit: object) -> None:
        if isinstance(limit, bool) or not isinstance(limit, int) or limit < 1:
            raise ConfigError(f"the limit for {self.name} is {limit!r}; it counts samples, so give an integer >= 1.")
