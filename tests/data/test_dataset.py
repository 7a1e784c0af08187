"""Data sets as values: their rules, and the normalisation of a split."""

import pytest
import torch

from stalewise.data import DataSplit, ImageDataset
from stalewise.data.dataset import channel_statistics
from stalewise.errors import ConfigError, DataError


def dataset(count: int = 6, *, side: int = 4, classes: int = 3, name: str = "made up") -> ImageDataset:
    images = torch.randint(0, 256, (count, 3, side, side), generator=torch.Generator().manual_seed(count))
    return ImageDataset(
        name=name,
        images=images.to(torch.uint8),
        labels=torch.arange(count) % classes,
        class_names=tuple("abcdefgh"[:classes]),
    )


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(2, 3, 4, 4), "torch.float32"),
        (torch.zeros(2, 1, 4, 4, dtype=torch.uint8), r"\[2, 1, 4, 4\]"),
        (torch.zeros(2, 3, 4, dtype=torch.uint8), r"\[2, 3, 4\]"),
        (torch.zeros(0, 3, 4, 4, dtype=torch.uint8), "at least one image"),
    ],
)
def test_images_of_another_kind_are_refused(images: torch.Tensor, message: str) -> None:
    labels = torch.zeros(len(images), dtype=torch.int64)
    with pytest.raises(DataError, match=message):
        ImageDataset(name="made up", images=images, labels=labels, class_names=("a",))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.zeros(2, dtype=torch.int32), "torch.int32"),
        (torch.zeros(3, dtype=torch.int64), r"\[3\] for 2 images"),
        (torch.tensor([0, 2]), "label 2 of made up record 1 is not one of the 2 classes"),
        (torch.tensor([-1, 0]), "label -1 of made up record 0"),
    ],
)
def test_labels_of_another_kind_are_refused(labels: torch.Tensor, message: str) -> None:
    images = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    with pytest.raises(DataError, match=message):
        ImageDataset(name="made up", images=images, labels=labels, class_names=("a", "b"))


def test_first_takes_the_first_and_no_more_than_there_are() -> None:
    whole = dataset(6)
    part = whole.first(4)
    assert torch.equal(part.images, whole.images[:4])
    assert torch.equal(part.labels, whole.labels[:4])
    assert part.class_names == whole.class_names
    assert len(whole.first(100)) == 6
    assert whole.first(None) is whole


@pytest.mark.parametrize("limit", [0, -3, 1.5, True])
def test_a_limit_is_a_positive_integer(limit: object) -> None:
    with pytest.raises(ConfigError, match="limit for made up"):
        dataset().first(limit)  # type: ignore[arg-type]


def test_statistics_are_those_of_the_training_images() -> None:
    train, test = dataset(9, name="train"), dataset(5, name="test")
    split = DataSplit.normalised_by_train(train, test)
    scaled = train.images.double() / 255
    assert split.mean == pytest.approx(scaled.mean(dim=(0, 2, 3)).tolist(), rel=1e-12)
    assert split.std == pytest.approx(scaled.std(dim=(0, 2, 3), correction=0).tolist(), rel=1e-12)
    assert split.num_classes == 3


def test_statistics_do_not_depend_on_chunks_or_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    images = dataset(40).images
    whole = channel_statistics(images)
    monkeypatch.setattr("stalewise.data.dataset._CHUNK", 7)
    assert channel_statistics(images) == whole


def test_a_channel_of_one_value_does_not_divide_by_zero() -> None:
    images = torch.full((2, 3, 4, 4), 51, dtype=torch.uint8)
    assert channel_statistics(images) == ((0.2, 0.2, 0.2), (1.0, 1.0, 1.0))


def test_limits_keep_the_normalisation_of_all() -> None:
    split = DataSplit.normalised_by_train(dataset(9), dataset(6))
    part = split.first(train_limit=2, test_limit=3)
    assert (len(part.train), len(part.test)) == (2, 3)
    assert (part.mean, part.std) == (split.mean, split.std)


def test_splits_must_agree() -> None:
    with pytest.raises(DataError, match=r"\[3, 4, 4\] in small and \[3, 5, 5\] in large"):
        DataSplit.normalised_by_train(dataset(name="small"), dataset(side=5, name="large"))
    with pytest.raises(DataError, match=r"has 3 classes, .* 2"):
        DataSplit.normalised_by_train(dataset(), dataset(classes=2))
