"""A training run that is interrupted at any step, also the first and last, between epochs and amid an evaluation."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from stalewise.cli.main import app
from stalewise.experiments.run_writer import RunWriter
from stalewise.pipeline import Pipeline

OPTIONS = [
    *("--model", "resnet8", "--data", "digits", "--train-limit", "40", "--test-limit", "16", "--batch-size", "8"),
    *("--epochs", "3", "--engine", "sequential", "--threads", "1", "--partition", "1,3", "--evaluate-every", "2"),
    *("--display", "quiet", "--keep", "1", "--checkpoint-every", "1"),
]
BATCHES = 15
METHODS = [
    ("--method", "dsp", "--loader-workers", "2"),
    ("--method", "dsp", "--option", "activations=stored", "--option", "weights=current", "--loader-workers", "0"),
    ("--method", "dsp", "--option", "elastic=true", "--loader-workers", "0"),
    ("--method", "pipemare", "--loader-workers", "0"),
]
TIMES = {"time_s", "epoch_s", "samples_per_s"}


class Interrupted(BaseException):
    """As a kill: nothing may catch it."""


def left(folder: Path) -> tuple[list[dict[str, Any]], dict[str, torch.Tensor]]:
    """The metrics without times, and the weights."""
    records = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    metrics = [{name: value for name, value in record.items() if name not in TIMES} for record in records]
    return [record for record in metrics if record["event"] != "bottleneck"], load_file(folder / "model.safetensors")


def train(*options: str) -> None:
    done = CliRunner().invoke(app, ["train", *options], catch_exceptions=False)
    assert done.exit_code == 0


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Any]:
    """Of each method, filled when first asked for."""
    return {}


def expected(number: int, undisturbed: dict[int, Any], tmp_path_factory: pytest.TempPathFactory) -> Any:
    if number not in undisturbed:
        folder = tmp_path_factory.mktemp("run") / "run"
        train(*OPTIONS, *METHODS[number], "--out", str(folder))
        undisturbed[number] = left(folder)
    return undisturbed[number]


def interrupted_run(folder: Path, number: int, what: str, count: int) -> None:
    """Begin a run that ends at its n-th batch record or evaluation."""
    with pytest.MonkeyPatch.context() as patch:
        seen = 0

        def counted(original: Any, counts: Any) -> Any:
            def wrapper(self: Any, *arguments: Any) -> Any:
                nonlocal seen
                seen += counts(*arguments)
                if seen == count and counts(*arguments):
                    raise Interrupted
                return original(self, *arguments)

            return wrapper

        if what == "batch":
            patch.setattr(RunWriter, "add", counted(RunWriter.add, lambda record: record["event"] == "batch"))
        elif what == "epoch":
            patch.setattr(RunWriter, "add", counted(RunWriter.add, lambda record: record["event"] == "epoch"))
        else:
            patch.setattr(Pipeline, "evaluate", counted(Pipeline.evaluate, lambda *_: True))
        with pytest.raises(Interrupted):
            train(*OPTIONS, *METHODS[number], "--out", str(folder))
    assert not (folder / "model.safetensors").exists()


def drawn(seed: int) -> tuple[int, str, int]:
    """A method and a place where to interrupt it."""
    choose = random.Random(seed)
    what, most = choose.choice([("batch", BATCHES), ("epoch", 3), ("evaluation", 2)])
    return seed % len(METHODS), what, choose.randint(1, most)


@pytest.mark.parametrize("seed", range(2 * len(METHODS)))
def test_any_interruption(seed: int, undisturbed: dict[int, Any], tmp_path_factory: pytest.TempPathFactory) -> None:
    check(*drawn(seed), undisturbed, tmp_path_factory)


@pytest.mark.parametrize(("what", "count"), [("batch", 1), ("batch", BATCHES), ("epoch", 3), ("evaluation", 1)])
def test_the_ends(what: str, count: int, undisturbed: dict[int, Any], tmp_path_factory: pytest.TempPathFactory) -> None:
    check(0, what, count, undisturbed, tmp_path_factory)


def check(
    number: int, what: str, count: int, undisturbed: dict[int, Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    metrics, weights = expected(number, undisturbed, tmp_path_factory)
    folder = tmp_path_factory.mktemp("run") / "run"
    interrupted_run(folder, number, what, count)
    train("--resume", str(folder))
    found, values = left(folder)
    assert found == metrics
    assert list(values) == list(weights)
    assert all(torch.equal(values[name], value) for name, value in weights.items())
