"""ImageNet's layout: streamed, cropped as is standard, the same for any workers and from any position."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from stalewise.data import Batches, load_data
from stalewise.data.crops import centre_box, random_box
from stalewise.data.streamed import FileNames
from stalewise.errors import DataError

workers = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")


@pytest.fixture
def root(tmp_path: Path, pixels, encode) -> Path:
    """Three classes of 5 training and 2 validation JPEGs of different sizes."""
    for split, count in (("train", 5), ("val", 2)):
        for label, name in enumerate(("n01", "n02", "n03")):
            folder = tmp_path / "imagenet" / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                values = pixels(10 * label + index, 48)[: 30 + 3 * index]
                (folder / f"{name}_{index}.JPEG").write_bytes(encode(values, "JPEG", quality=95))
    return tmp_path / "imagenet"


def epoch(root: Path, **options: object) -> list[tuple[torch.Tensor, torch.Tensor]]:
    split = load_data("imagenet-20", data_dir=root)
    settings = {"batch_size": 4, "seed": 1, "epoch": 0, "shuffle": True, "augment": True, **options}
    return list(Batches(split.train, split.mean, split.std, **settings))


def same(one: list[tuple[torch.Tensor, torch.Tensor]], other: list[tuple[torch.Tensor, torch.Tensor]]) -> bool:
    return len(one) == len(other) and all(
        torch.equal(x, u) and torch.equal(y, v) for (x, y), (u, v) in zip(one, other, strict=True)
    )


def test_the_layout_is_read(root: Path) -> None:
    split = load_data("imagenet-20", data_dir=root)
    assert (len(split.train), len(split.test), split.num_classes) == (15, 6, 3)
    assert split.train.class_names == ("n01", "n02", "n03")
    assert split.train.image_shape == split.test.image_shape == (3, 20, 20)
    assert load_data("imagenet", data_dir=root).train.image_shape == (3, 224, 224)
    assert sorted(split.train.labels.tolist()) == [0] * 5 + [1] * 5 + [2] * 5
    for file, label in zip(split.train.files, split.train.labels.tolist(), strict=True):
        assert Path(file).parts[:2] == ("train", split.train.class_names[label])


def test_an_epoch_has_every_image_once_with_its_label(root: Path) -> None:
    batches = epoch(root)
    assert [images.shape for images, _ in batches] == [(4, 3, 20, 20)] * 3 + [(3, 3, 20, 20)]
    assert sorted(label for _, labels in batches for label in labels.tolist()) == [0] * 5 + [1] * 5 + [2] * 5


@workers
def test_any_number_of_workers_and_any_position_give_the_same(root: Path) -> None:
    whole = epoch(root)
    assert same(epoch(root, num_workers=3), whole)
    assert same(epoch(root, start_batch=2), whole[2:])
    assert same(epoch(root, start_batch=2, num_workers=2), whole[2:])
    assert same(epoch(root, batch_size=15), [tuple(torch.cat(parts) for parts in zip(*whole, strict=True))])


def test_epochs_and_seeds_differ_and_nobody_elses_randomness_is_used(root: Path) -> None:
    torch.manual_seed(0)
    np.random.seed(0)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    first = epoch(root)
    assert not same(first, epoch(root, epoch=1))
    assert not same(first, epoch(root, seed=2))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()


def test_testing_takes_the_middle(root: Path) -> None:
    """A bright square of 56 in the middle of 96 x 64 is all that is seen."""
    values = np.zeros((64, 96, 3), dtype=np.uint8)
    values[4:60, 20:76] = 200
    for file in (root / "val" / "n01").iterdir():
        Image.fromarray(values).save(file, "PNG")
    split = load_data("imagenet-28", data_dir=root)
    index = split.test.labels.tolist().index(0)
    image = split.test.take(torch.tensor([index]), seed=0, epoch=0, augmented=False)[0]
    assert image.shape == (3, 28, 28)
    assert (image[:, 1:-1, 1:-1] == 200).all()
    # The filter of the border pixels reaches a little beyond the crop.
    assert 140 < image[:, 0].min() < 200


def test_a_crop_is_that_part_of_the_image(root: Path) -> None:
    """Pixels encode their place, so that the box can be read off the picture; half of them are mirrored."""
    rows, columns = np.mgrid[0:128, 0:250]
    values = np.stack([columns, rows * 2, np.zeros_like(rows)], axis=2).astype(np.uint8)
    for file in (root / "train" / "n02").iterdir():
        Image.fromarray(values).save(file, "PNG")
    train = load_data("imagenet-20", data_dir=root).train
    index = train.labels.tolist().index(1)
    mirrored = []
    for number in range(20):
        (left, top, right, bottom), flip = random_box(250, 128, index, seed=5, epoch=number)
        image = train.take(torch.tensor([index]), seed=5, epoch=number, augmented=True)[0].double()
        across = image[0].mean(0).flip(0) if flip else image[0].mean(0)
        step = (right - left) / 20
        assert (across - (left + step * (torch.arange(20) + 0.5) - 0.5)).abs()[1:-1].max() < 1.5
        step = (bottom - top) / 20
        assert (image[1].mean(1) / 2 - (top + step * (torch.arange(20) + 0.5) - 0.5)).abs()[1:-1].max() < 1.5
        mirrored.append(flip)
        kept = train.flipping(False).take(torch.tensor([index]), seed=5, epoch=number, augmented=True)[0].double()
        assert torch.equal(kept, image.flip(2) if flip else image)
    assert 4 <= sum(mirrored) <= 16


@given(width=st.integers(1, 400), height=st.integers(1, 400), index=st.integers(0, 10**6), epoch_=st.integers(0, 99))
def test_boxes_are_inside_and_of_the_standard_sizes(width: int, height: int, index: int, epoch_: int) -> None:
    (left, top, right, bottom), _ = random_box(width, height, index, seed=0, epoch=epoch_)
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height
    if min(width, height) > 60 and 3 / 4 < width / height < 4 / 3:
        assert 0.07 < (right - left) * (bottom - top) / (width * height) <= 1
        assert 0.7 < (right - left) / (bottom - top) < 1.4
    left, top, right, bottom = centre_box(width, height)
    assert right - left == pytest.approx(bottom - top)
    assert right - left == pytest.approx(min(width, height) * 0.875)


def test_areas_and_places_are_spread_evenly() -> None:
    boxes = [random_box(500, 400, index, seed=3, epoch=0)[0] for index in range(4000)]
    areas = [(right - left) * (bottom - top) / 200_000 for left, top, right, bottom in boxes]
    # Large areas fit less often; those below a half always do.
    small = [area for area in areas if area < 0.5]
    assert min(areas) < 0.09
    assert max(areas) > 0.9
    assert sum(area < 0.29 for area in small) / len(small) == pytest.approx(0.5, abs=0.03)
    # Wide boxes fit into a wide image more often, unless they are small.
    ratios = [
        math.log((right - left) / (bottom - top))
        for (left, top, right, bottom), area in zip(boxes, areas, strict=True)
        if area < 0.5
    ]
    assert sum(ratio > 0 for ratio in ratios) / len(ratios) == pytest.approx(0.5, abs=0.04)
    middles = [(left + right) / 2 for left, _, right, _ in boxes]
    assert sum(middles) / len(middles) == pytest.approx(250, abs=4)


def test_limits_and_names() -> None:
    names = FileNames(["a/b.JPEG", "", "ü/x.png", "last"])
    assert list(names) == ["a/b.JPEG", "", "ü/x.png", "last"]
    assert names[-1] == "last"
    assert names[1:3] == ["", "ü/x.png"]
    with pytest.raises(IndexError):
        names[4]


def test_the_first_samples(root: Path) -> None:
    split = load_data("imagenet-20", data_dir=root, train_limit=4, test_limit=100)
    whole = load_data("imagenet-20", data_dir=root)
    assert (len(split.train), len(split.test)) == (4, 6)
    assert list(split.train.files) == list(whole.train.files)[:4]


def test_a_test_folder_without_classes_is_passed_over(root: Path) -> None:
    (root / "test").mkdir()
    (root / "test" / "unlabelled.JPEG").write_bytes(b"")
    assert len(load_data("imagenet", data_dir=root).test) == 6


def test_a_damaged_file_is_named_when_its_batch_is_due(root: Path) -> None:
    (root / "train" / "n01" / "n01_3.JPEG").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"n01_3.JPEG cannot be decoded"):
        epoch(root)
    (root / "train" / "n01" / "n01_3.JPEG").unlink()
    assert len(epoch(root)) == 4


def test_a_file_that_vanished_is_named(root: Path) -> None:
    split = load_data("imagenet-20", data_dir=root)
    (root / "train" / "n01" / "n01_3.JPEG").unlink()
    with pytest.raises(DataError, match=r"n01_3.JPEG cannot be read"):
        list(Batches(split.train, split.mean, split.std, batch_size=4, seed=0, epoch=0, shuffle=False, augment=False))


def test_imagenet_has_to_be_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="--data-dir"):
        load_data("imagenet")
    with pytest.raises(DataError, match="there is no folder"):
        load_data("imagenet", data_dir=tmp_path / "nowhere")
