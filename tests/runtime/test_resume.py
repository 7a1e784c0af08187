"""Checkpoints of one process per stage: saved there and resumed anywhere, bitwise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from dist_equal import assert_equal
from dist_jobs import run_job
from dist_methods import VARIANTS
from dist_resume import STOP, folder_of
from resume_runs import method_of, pipeline, train

pytestmark = pytest.mark.dist


@pytest.fixture(scope="module")
def alone() -> dict[str, dict[str, Any]]:
    """What one process sees without an interruption."""
    return {label: vars(train(pipeline(method_of(label)))) for label in VARIANTS}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which three processes left checkpoints of every variant."""
    folder = tmp_path_factory.mktemp("saved")
    run("save_all", folder)
    return folder


def run(main: str, folder: Path) -> None:
    ended = run_job(f"dist_resume:{main}", 3, [], folder)
    assert (ended.error, ended.exit_code) == (None, 0), ended.message


def results(folder: Path, label: str) -> list[Any]:
    return [torch.load(folder / f"{label}-rank{rank}") for rank in range(3)]


def test_saving_changes_nothing(saved: Path, alone: dict[str, dict[str, Any]]) -> None:
    for label in VARIANTS:
        for seen in results(saved, label):
            assert_equal(without_rate(seen), without_rate(alone[label]), label)


@pytest.mark.parametrize("label", VARIANTS)
def test_from_processes_to_one_process(label: str, saved: Path, alone: dict[str, dict[str, Any]]) -> None:
    outcome = train(
        pipeline(method_of(label)), losses=alone[label]["losses"][:STOP], folder=folder_of(str(saved), label)
    )
    assert_equal(vars(outcome), alone[label])


def test_from_processes_to_processes(saved: Path, alone: dict[str, dict[str, Any]]) -> None:
    leave_losses(saved, alone)
    run("resume_all", saved)
    for label in VARIANTS:
        for seen in results(saved, label):
            assert_equal(without_rate(seen), without_rate(alone[label]), label)


def test_from_one_process_to_processes(tmp_path: Path, alone: dict[str, dict[str, Any]]) -> None:
    for label in VARIANTS:
        train(pipeline(method_of(label)), stop=STOP, folder=folder_of(str(tmp_path), label))
    leave_losses(tmp_path, alone)
    run("resume_all", tmp_path)
    for label in VARIANTS:
        for seen in results(tmp_path, label):
            assert_equal(without_rate(seen), without_rate(alone[label]), label)


def test_other_cuts_on_processes_are_other_cuts_on_one(saved: Path) -> None:
    moved = pipeline(method_of("dsp"), cuts=(1, 6))
    point = moved.resume(folder_of(str(saved), "dsp"), positioned=True)
    assert point is not None
    run("move", saved)
    expected = [False, point.losses, moved.state_dict(), moved.optimizer_state_dict(), moved.num_batches]
    for seen in results(saved, "moved"):
        assert_equal(seen, expected)


def leave_losses(folder: Path, alone: dict[str, dict[str, Any]]) -> None:
    for label in VARIANTS:
        torch.save(alone[label]["losses"][:STOP], folder / f"losses-{label}")


def without_rate(outcome: dict[str, Any]) -> dict[str, Any]:
    """The learning rate is that of the own stage, which at the end of a session may be at another update."""
    return {name: value for name, value in outcome.items() if name != "rate"}
