"""Parquet image sets: layouts, the cache of decoded images, and faults traced to their records."""

import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from stalewise.data import DataSplit, parquet_shard
from stalewise.data.parquet import find_parquet_pair, load_parquet
from stalewise.errors import DataError


@pytest.fixture
def folder(write_parquet, tmp_path: Path) -> Path:
    write_parquet(tmp_path / "train.parquet", 12)
    write_parquet(tmp_path / "test.parquet", 5)
    return tmp_path


@pytest.fixture
def load(cache: Path):
    def load(path: Path) -> DataSplit:
        pair = find_parquet_pair(path)
        assert pair is not None
        return load_parquet(path.name, pair, cache_dir=cache)

    return load


def rewrite(path: Path, **columns: object) -> None:
    """Replace or add columns; None takes one away."""
    table = pq.read_table(path)
    for name, values in columns.items():
        if name in table.column_names:
            table = table.drop_columns([name])
        if values is not None:
            table = table.append_column(name, values)
    pq.write_table(table, path)


def check(split: DataSplit, pixels, train: int = 12, test: int = 5) -> None:
    for dataset, count in ((split.train, train), (split.test, test)):
        assert dataset.labels.tolist() == [index % 3 for index in range(count)]
        expected = np.stack([pixels(index) for index in range(count)]).transpose(0, 3, 1, 2)
        assert np.array_equal(dataset.images.numpy(), expected)


def test_a_folder_and_its_training_file(folder: Path, load, pixels) -> None:
    check(load(folder), pixels)
    check(load(folder / "train.parquet"), pixels)


def test_images_as_plain_binary(folder: Path, load, pixels) -> None:
    for name in ("train.parquet", "test.parquet"):
        images = pq.read_table(folder / name).column("img").combine_chunks().field("bytes")
        rewrite(folder / name, img=None, image=images)
    check(load(folder), pixels)


@pytest.mark.parametrize("kind", [pa.large_binary(), pa.struct([("bytes", pa.large_binary())])])
def test_large_binary(folder: Path, load, pixels, kind: pa.DataType) -> None:
    images = [row["bytes"] for row in pq.read_table(folder / "train.parquet").column("img").to_pylist()]
    values = images if kind == pa.large_binary() else [{"bytes": item} for item in images]
    rewrite(folder / "train.parquet", img=pa.array(values, kind))
    check(load(folder), pixels)


def test_fine_labels(folder: Path, load, pixels) -> None:
    for name, count in (("train.parquet", 12), ("test.parquet", 5)):
        labels = pa.array([index % 3 for index in range(count)], pa.uint8())
        rewrite(folder / name, label=None, coarse_label=pa.array([0] * count), fine_label=labels)
    check(load(folder), pixels)


def test_shards_in_the_order_of_their_names_and_a_data_folder(folder: Path, load, pixels) -> None:
    (folder / "data").mkdir()
    table = pq.read_table(folder / "train.parquet")
    (folder / "train.parquet").unlink()
    pq.write_table(table.slice(5), folder / "data" / "train-00001-of-00002.parquet", row_group_size=2)
    pq.write_table(table.slice(0, 5), folder / "data" / "train-00000-of-00002.parquet")
    (folder / "test.parquet").rename(folder / "data" / "validation-00000-of-00001.parquet")
    check(load(folder), pixels)


def test_test_comes_before_validation(folder: Path, load, write_parquet, pixels) -> None:
    write_parquet(folder / "validation.parquet", 7)
    check(load(folder), pixels, test=5)


def test_more_rows_than_are_read_at_once(folder: Path, load, pixels, monkeypatch) -> None:
    monkeypatch.setattr(parquet_shard, "_ROWS_AT_ONCE", 5)
    check(load(folder), pixels)


def test_class_names_from_the_file_or_numbers(folder: Path, load) -> None:
    assert load(folder).train.class_names == ("0", "1", "2")
    table = pq.read_table(folder / "train.parquet")
    text = '{"info": {"features": {"label": {"names": ["ant", "bee", "cow", "doe"]}}}}'
    pq.write_table(table.replace_schema_metadata({"huggingface": text}), folder / "train.parquet")
    split = load(folder)
    assert split.train.class_names == split.test.class_names == ("ant", "bee", "cow", "doe")
    assert split.num_classes == 4


def test_two_splits_that_name_other_classes(folder: Path, load) -> None:
    for name, classes in (("train", '"ant", "bee", "cow"'), ("test", '"bee", "ant", "cow"')):
        table = pq.read_table(folder / f"{name}.parquet")
        text = f'{{"info": {{"features": {{"label": {{"names": [{classes}]}}}}}}}}'
        pq.write_table(table.replace_schema_metadata({"huggingface": text}), folder / f"{name}.parquet")
    with pytest.raises(DataError, match=r"test\.parquet names the classes \('bee', .* training data \('ant', "):
        load(folder)


@pytest.mark.parametrize("text", ["{", "[]", '{"info": 3}', '{"info": {"features": {"label": {"names": [1]}}}}'])
def test_other_metadata_is_no_matter(folder: Path, load, text: str) -> None:
    table = pq.read_table(folder / "train.parquet")
    pq.write_table(table.replace_schema_metadata({"huggingface": text}), folder / "train.parquet")
    assert load(folder).train.class_names == ("0", "1", "2")


def test_other_sizes_are_resized_to_the_first_training_image(folder: Path, load, encode, pixels) -> None:
    rows = [{"bytes": encode(pixels(index, 11)), "path": ""} for index in range(5)]
    rewrite(folder / "test.parquet", img=pa.array(rows))
    assert load(folder).test.images.shape == (5, 3, 8, 8)


# --- the cache
# ---------------------------------------------------------------------------------------------------


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of images of each decoding that takes place."""
    counts: list[int] = []
    original = parquet_shard.decode_images

    def counting(*arguments, **options):
        counts.append(options["count"])
        return original(*arguments, **options)

    monkeypatch.setattr(parquet_shard, "decode_images", counting)
    return counts


def test_the_second_load_decodes_nothing(folder: Path, load, pixels, decoded: list[int], cache: Path) -> None:
    check(load(folder), pixels)
    check(load(folder), pixels)
    assert decoded == [12, 5]
    assert len(list((cache / "decoded").iterdir())) == 2


def test_a_changed_file_is_decoded_again(folder: Path, load, write_parquet, pixels, decoded: list[int]) -> None:
    load(folder)
    write_parquet(folder / "test.parquet", 6)
    check(load(folder), pixels, test=6)
    status = (folder / "train.parquet").stat()
    os.utime(folder / "train.parquet", ns=(status.st_atime_ns, status.st_mtime_ns + 10**9))
    check(load(folder), pixels, test=6)
    assert decoded == [12, 5, 6, 12]


@pytest.mark.parametrize("damage", [lambda content: content[:-9], lambda content: b"", lambda content: b"x" * 200])
def test_an_unusable_cache_is_replaced(folder: Path, load, pixels, decoded: list[int], cache: Path, damage) -> None:
    load(folder)
    for file in (cache / "decoded").iterdir():
        file.write_bytes(damage(file.read_bytes()))
    check(load(folder), pixels)
    check(load(folder), pixels)
    assert decoded == [12, 5, 12, 5]


def test_a_cache_that_cannot_be_written_is_only_a_warning(folder: Path, load, pixels, cache: Path) -> None:
    (cache / "decoded").write_bytes(b"a file where the folder should be")
    with pytest.warns(RuntimeWarning, match="cannot be stored"):
        split = load(folder)
    check(split, pixels)


# --- faults
# ------------------------------------------------------------------------------------------------------


def test_a_corrupted_jpeg_is_named_with_its_record(folder: Path, load, write_parquet) -> None:
    encoded = write_parquet(folder / "train.parquet", kind="JPEG")
    write_parquet(folder / "train.parquet", kind="JPEG", damage={3: encoded[3][:150]})
    with pytest.raises(DataError, match=r"train\.parquet record 3 cannot be decoded \(150 bytes\).*replace it"):
        load(folder)


@pytest.mark.parametrize("content", [None, b""])
def test_a_record_without_an_image(folder: Path, load, write_parquet, content: bytes | None) -> None:
    write_parquet(folder / "test.parquet", 5, damage={4: content})
    with pytest.raises(DataError, match=r"test\.parquet record 4 has no image bytes"):
        load(folder)


def test_records_are_counted_over_groups_of_rows(folder: Path, load, write_parquet, monkeypatch) -> None:
    monkeypatch.setattr(parquet_shard, "_ROWS_AT_ONCE", 2)
    write_parquet(folder / "test.parquet", 5, damage={4: b""})
    with pytest.raises(DataError, match=r"test\.parquet record 4 has no image bytes"):
        load(folder)
    write_parquet(folder / "test.parquet", 5, damage={3: b"no image"})
    with pytest.raises(DataError, match=r"test\.parquet record 3 cannot be decoded"):
        load(folder)


@pytest.mark.parametrize("kept", [0, 3, 100, 2000, -1])
def test_a_truncated_file(folder: Path, load, kept: int) -> None:
    path = folder / "train.parquet"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(DataError, match=r"train\.parquet cannot be read.*whole parquet file"):
        load(folder)


def test_a_file_with_a_damaged_page(folder: Path, load) -> None:
    path = folder / "test.parquet"
    content = bytearray(path.read_bytes())
    content[4:200] = bytes(196)
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"test\.parquet (cannot be read|record \d+ )"):
        load(folder)


def test_a_file_without_rows(folder: Path, load) -> None:
    pq.write_table(pq.read_table(folder / "test.parquet").slice(0, 0), folder / "test.parquet")
    with pytest.raises(DataError, match=r"test\.parquet has no rows"):
        load(folder)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"img": None}, "has the columns label, and no img or image"),
        ({"label": None}, "has the columns img, and no label or fine_label"),
        ({"img": pa.array([[1.0]] * 12)}, r"column 'img' .* is list<.*double>; images are binary"),
        ({"img": pa.array([{"path": "a"}] * 12)}, r"column 'img' .* is struct<path: string>; images are binary"),
        ({"label": pa.array(["cat"] * 12)}, "column 'label' .* is string; labels are integers"),
        ({"label": pa.array([0, 1, None] * 4)}, r"train\.parquet record 2 has no label"),
        ({"label": pa.array([0, 1, 2, -1] * 3)}, r"train\.parquet record 3 has label -1"),
    ],
)
def test_columns_of_another_kind(folder: Path, load, columns: dict[str, object], message: str) -> None:
    rewrite(folder / "train.parquet", **columns)
    with pytest.raises(DataError, match=message):
        load(folder)


def test_a_test_label_that_training_does_not_know(folder: Path, load) -> None:
    rewrite(folder / "test.parquet", label=pa.array([0, 1, 2, 3, 0]))
    with pytest.raises(DataError, match=r"test\.parquet record 3 has label 3; the training .* 0 \.\. 2"):
        load(folder)


def test_a_missing_half(folder: Path, tmp_path: Path) -> None:
    (folder / "test.parquet").rename(folder / "other.parquet")
    with pytest.raises(DataError, match=r"has no test\*\.parquet or validation\*\.parquet"):
        find_parquet_pair(folder)
    with pytest.raises(DataError, match=r"has no test\*\.parquet"):
        find_parquet_pair(folder / "train.parquet")
    (folder / "train.parquet").unlink()
    with pytest.raises(DataError, match=r"has parquet files but no train\*\.parquet"):
        find_parquet_pair(folder)
    with pytest.raises(DataError, match=r"other\.parquet is not a train\*\.parquet file"):
        find_parquet_pair(folder / "other.parquet")


def test_a_folder_without_parquet_files(tmp_path: Path) -> None:
    assert find_parquet_pair(tmp_path) is None


def test_labels_are_int64_whatever_is_stored(folder: Path, load) -> None:
    rewrite(folder / "train.parquet", label=pa.array([0, 1, 2] * 4, pa.int8()))
    assert load(folder).train.labels.dtype is torch.int64
