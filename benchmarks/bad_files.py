"""Data files, run folders, checkpoints and output folders that are damaged, full, hostile or in the way."""

from __future__ import annotations

import functools
import io
import json
import pickle
import resource
import shutil
import signal
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from bad_cases import Case, damaged_bytes, damaged_json
from bad_commands import RUN, Wrong, obey
from PIL import Image

from stalewise import ConfigError
from stalewise.checkpoint.batch_file import read_batch, write_batch
from stalewise.data import Batches, load_data
from stalewise.report import write_report

COMPARE = ["compare", "--methods", "bp,dsp", *RUN]

__all__ = ["data_files", "output_folders", "run_folders"]


def _png(side: int = 8, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(side).integers(0, 256, (side, side, 3), dtype=np.uint8)).save(file, kind)
    return file.getvalue()


def _bomb(side: int) -> bytes:
    """A PNG that says it has side x side pixels, in a few bytes."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return len(content).to_bytes(4, "big") + kind + content + zlib.crc32(kind + content).to_bytes(4, "big")

    head = side.to_bytes(4, "big") * 2 + b"\x08\x02\x00\x00\x00"
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + chunk(b"IDAT", zlib.compress(b"\0" * 10_000))
        + chunk(b"IEND", b"")
    )


def _table(images: list[bytes], labels: list[int]) -> pa.Table:
    return pa.table({"img": [{"bytes": image, "path": None} for image in images], "label": labels})


def _write_parquet(folder: Path, random: Random) -> None:
    folder.mkdir()
    for split in ("train", "test"):
        pq.write_table(_table([_png() for _ in range(4)], [0, 1, 2, 1]), folder / f"{split}.parquet")
    place = folder / f"{random.choice(('train', 'test'))}.parquet"
    match random.randrange(9):
        case 0:
            place.write_bytes(damaged_bytes(random, place.read_bytes()))
        case 1:
            pq.write_table(pa.table({"a": [1, 2]}), place)
        case 2:
            pq.write_table(pa.table({"img": ["a", "b"], "label": [1, 2]}), place)
        case 3:
            pq.write_table(_table([_png(), damaged_bytes(random, _png())], [0, 1]), place)
        case 4:
            pq.write_table(_table([_png(), _bomb(100_000)], [0, 1]), place)
        case 5:
            pq.write_table(_table([_png(), _png()], random.choice([[-1, 2], [2**62, 1], [None, 1]])), place)
        case 6:
            pq.write_table(_table([], []), place)
        case 7:
            place.unlink()
        case 8:
            pq.write_table(_table([_png(), _png(9)], [0, 1]), place)


def _write_folder(folder: Path, random: Random) -> None:
    for split in ("train", "test"):
        for label in ("cat", "dog"):
            (folder / split / label).mkdir(parents=True)
            (folder / split / label / "1.png").write_bytes(_png())
    place = folder / random.choice(("train", "test")) / "cat" / "1.png"
    match random.randrange(8):
        case 0:
            place.write_bytes(damaged_bytes(random, _png()))
        case 1:
            place.write_bytes(_bomb(random.choice((5000, 100_000, 2**31 - 1))))
        case 2:
            place.write_bytes(random.choice([b"%!PS\n", b"GIF89a", b"<svg/>", b"\0" * 1000, pickle.dumps([1])]))
        case 3:
            shutil.rmtree(folder / random.choice(("train", "test")))
        case 4:
            place.unlink()
            place.symlink_to("nowhere.png")
        case 5:
            shutil.rmtree(place.parent)
            place.parent.write_text("a file")
        case 6:
            place.unlink()
            place.mkdir()
        case 7:
            place.with_name("2.png").write_bytes(_png(9))


def _write_archive(folder: Path, random: Random) -> None:
    """CIFAR-10's archive with something else in it."""
    folder.mkdir()
    name, hostile = "cifar-10-binary.tar.gz", io.BytesIO()
    match random.randrange(6):
        case 0:
            (folder / name).write_bytes(random.randbytes(random.randrange(1000)))
            return
        case 1:
            names = ["../../escaped", "/tmp/escaped-from-archive"]
            member, content = random.choice(names), b"x"
        case 2:
            member, content = "cifar-10-batches-bin/data_batch_1.bin", random.randbytes(random.randrange(9000))
        case 3:
            member, content = "cifar-10-batches-bin/data_batch_1.bin", bytes(40_000_000)
        case 4:
            member, content = "cifar-10-batches-py/data_batch_1", pickle.dumps({"data": 1})
        case _:
            member, content = "cifar-10-batches-bin/data_batch_1.bin", b""
    with tarfile.open(fileobj=hostile, mode="w:gz", compresslevel=1) as archive:
        info = tarfile.TarInfo(member)
        info.size = len(content)
        if not content:
            info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(info, io.BytesIO(content))
    (folder / name).write_bytes(hostile.getvalue())


def data_files(random: Random, folder: Path) -> Case:
    """A data set of which one file is damaged, or is another than it says."""
    place = folder / "data"
    shutil.rmtree(place, ignore_errors=True)
    kind = random.choice(["parquet", "folder", "archive", "zip"])

    def read() -> None:
        data = load_data("cifar10", data_dir=place) if kind == "archive" else load_data(str(place))
        for samples in (data.train, data.test):
            options: dict[str, Any] = {"batch_size": 2, "seed": 0, "epoch": 0, "shuffle": False, "augment": False}
            list(Batches(samples, data.mean, data.std, **options))
        for escaped in (folder.parent / "escaped", Path("/tmp/escaped-from-archive")):
            assert not escaped.exists(), "a path in an archive was written to"

    match kind:
        case "parquet":
            _write_parquet(place, random)
        case "folder":
            _write_folder(place, random)
        case "archive":
            _write_archive(place, random)
        case "zip":
            place.mkdir()
            with zipfile.ZipFile(place / "train.zip", "w") as archive:
                archive.writestr("../../escaped", b"x")
    return Case(f"{kind} in {place}", read, must_fail=kind in ("archive", "zip"))


@functools.cache
def _finished(folder: Path, elastic: bool) -> Path:
    """A run that went well, with checkpoints (elastic ones have none)."""
    path = folder / ("elastic" if elastic else "run")
    of_kind = ["--option", "elastic=true"] if elastic else ["--checkpoint-every", "1", "--keep", "2"]
    obey(["train", *RUN, *of_kind, "--display", "quiet", "--out", str(path)])
    return path


@functools.cache
def _compared(folder: Path) -> Path:
    """A comparison that went well."""
    path = folder / "compared"
    obey([*COMPARE, "--out", str(path)])
    return path


class OneFailed(ConfigError):
    """A comparison went on without the run that is damaged, said so, and ended with exit code 1."""


def _compare_again(path: Path) -> None:
    try:
        obey([*COMPARE, "--out", str(path)])
    except Wrong as error:
        told = str(error)
        if "Traceback" in told or not told.startswith("exit code 1") or f"failed: {path / 'runs'}" not in told:
            raise
        raise OneFailed(told) from None


def run_folders(random: Random, folder: Path) -> Case:
    """A command on a run folder of which one file is damaged."""
    name = random.choice(
        [
            "report",
            "simulate",
            "plan",
            "replay",
            "resume",
            "evaluate",
            "show",
            "verify",
            "export",
            "compare",
            "go on",
            "batch",
        ]
    )
    path = folder / "damaged"
    shutil.rmtree(path, ignore_errors=True)
    if name == "batch":
        file = write_batch(path, 3, (Random(1).random(), None), loss=float("nan"), stage=2)
        which = random.choice((file, file.with_suffix(".safetensors")))
        which.write_bytes(damaged_bytes(random, which.read_bytes()))
        return Case(f"read_batch {file}", partial(read_batch, file), must_fail=False)
    shutil.copytree(_compared(folder) if name == "go on" else _finished(folder, name == "replay"), path)
    if name == "compare":
        (path / "comparison.json").write_text(json.dumps(damaged_json(random, {"rows": [], "seeds": 1, "shared": {}})))
        line = [*COMPARE, "--out", str(path)]
        return Case(" ".join(line), partial(obey, line))
    inside = "checkpoints" if name in ("show", "verify", "export", "resume") else "."
    files = [file for file in (path / inside).rglob("*") if file.is_file()]
    file = random.choice(files)
    content = file.read_bytes()
    if file.suffix == ".json" and random.random() < 0.7:
        content = json.dumps(damaged_json(random, json.loads(content))).encode()
    elif file.suffix == ".jsonl" and random.random() < 0.7:
        lines = content.splitlines()
        place = random.randrange(len(lines))
        lines[place] = json.dumps(damaged_json(random, json.loads(lines[place]))).encode()
        content = b"\n".join(lines)
    elif random.random() < 0.1:
        content = b""
    else:
        content = damaged_bytes(random, content)
    file.write_bytes(content)
    lines: dict[str, list[str]] = {
        "simulate": ["simulate", "--from", str(path), "--batches", "20"],
        "plan": ["plan", "--from", str(path)],
        "replay": [
            "train",
            "--replay",
            str(path),
            "--engine",
            "sequential",
            "--display",
            "quiet",
            "--out",
            str(folder / "again"),
            "--overwrite",
        ],
        "resume": ["train", "--resume", str(path)],
        "evaluate": ["evaluate", str(path)],
        "show": ["checkpoint", "show", str(path / "checkpoints")],
        "verify": ["checkpoint", "verify", str(path / "checkpoints")],
        "export": ["checkpoint", "export", str(path / "checkpoints"), "--out", str(folder / "export.safetensors")],
    }
    acts: dict[str, Callable[[], object]] = {
        "report": partial(write_report, path),
        "go on": partial(_compare_again, path),
    }
    act = acts[name] if name in acts else partial(obey, lines[name])
    return Case(f"{name} with {file.relative_to(path)} damaged", act, must_fail=False)


@contextmanager
def _no_more_than(size: int) -> Iterator[None]:
    """A disk on which files end after so many bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


class Full(ConfigError):
    """The command said, with exit code 1, that nothing can be written."""


def output_folders(random: Random, folder: Path) -> Case:
    """An output folder that cannot be written to, is in the way, or on a full disk."""
    place = folder / "out"
    shutil.rmtree(place, ignore_errors=True)
    place.unlink(missing_ok=True)
    what = random.choice(["file", "below a file", "not empty", "not ours", "nul", "long", "full", "/proc", "device"])
    lines = {
        "train": ["train", *RUN, "--display", "quiet", "--checkpoint-every", "1"],
        "compare": ["compare", "--methods", "bp,dsp", *RUN],
        "simulate": ["simulate", "--stages", "3"],
    }
    name = random.choice(list(lines))
    target = str(place)
    if what == "full":
        size = random.choice((0, 100, 3000, 20_000))

        def act() -> None:
            try:
                with _no_more_than(size):
                    obey([*lines["train" if name == "compare" else name], "--out", target])
            except Exception as error:
                if "Traceback" in str(error) or not str(error).startswith("exit code 1"):
                    raise
                raise Full(str(error)) from None

        return Case(f"{name}: a disk full after {size} bytes", act)
    match what:
        case "file":
            place.write_text("kept")
        case "below a file":
            place.write_text("kept")
            target += "/deep/er"
        case "not empty" | "not ours":
            place.mkdir()
            (place / "precious").write_text("kept")
        case "nul":
            target = "x" * 200 + "/" + "y" * 300
        case "long":
            target += "/" + "x" * 300
        case "/proc":
            target = "/proc/nothing/at/all"
        case "device":
            target = "/dev/null"
    line = [*lines[name], "--out", target, *(["--overwrite"] if what == "not ours" else [])]

    def act_and_look() -> None:
        try:
            obey(line)
        finally:
            kept = place / "precious" if place.is_dir() else place
            assert what not in ("file", "below a file", "not empty", "not ours") or kept.read_text() == "kept", "lost"

    return Case(" ".join(line), act_and_look)
