"""An elastic run that was saved amid it goes on with its record, anywhere, and all of it is repeated bitwise."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import elastic_resume
import pytest
import torch
from dist_equal import assert_equal
from elastic_resume import BOUND, CASES, DEEP, SESSIONS, pipeline, train

import stalewise
from stalewise.protocol.course import realised_staleness, streams_of
from stalewise.protocol.validate import run_streams

pytestmark = pytest.mark.dist


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What three processes left."""
    folder = tmp_path_factory.mktemp("elastic-resume")
    stalewise.launch(elastic_resume.worker, num_workers=3, args=[str(folder)])
    return folder


def left(folder: Path, name: str, rank: int = 0) -> dict[str, Any]:
    found: dict[str, Any] = torch.load(folder / f"{name}.{rank}")
    return found


@pytest.mark.parametrize("number", range(len(CASES)))
def test_the_record_of_a_resumed_run_is_repeated_bitwise(number: int, folder: Path) -> None:
    """By one process that is never interrupted; and the record begins as that of the run that was saved."""
    resumed, saved = left(folder, f"case{number}.resumed"), left(folder, f"case{number}.saved")
    activations, stop, _ = CASES[number]
    assert resumed["losses"][:stop] == saved["losses"][:stop]
    assert len(resumed["losses"]) == sum(count for count, _ in SESSIONS)
    repeated = train(pipeline(activations, engine="sequential", replay=resumed["orders"]))
    for rank in range(3):
        theirs = left(folder, f"case{number}.resumed", rank)
        assert_equal(theirs | {"losses": resumed["losses"]}, repeated, f"rank {rank}")


@pytest.mark.parametrize("number", range(len(CASES)))
def test_one_process_goes_on_with_what_three_saved(number: int, folder: Path) -> None:
    saved = left(folder, f"case{number}.saved")
    activations, _stop, _ = CASES[number]
    resumed = train(pipeline(activations, engine="sequential"), folder=folder / f"case{number}", losses=saved["losses"])
    repeated = train(pipeline(activations, engine="sequential", replay=resumed["orders"]))
    assert_equal(resumed, repeated)
    program = stalewise.DSP(staleness=BOUND, elastic=True, activations=activations).program()  # type: ignore[arg-type]
    for cycle, letters in enumerate(resumed["orders"][0]):
        streams = streams_of(program, resumed["orders"], cycle)
        assert run_streams(program, streams, letters.count("F")) == []
    for stage, bound in enumerate(BOUND):
        assert max(depth for cycle in resumed["orders"][stage] for depth in realised_staleness(cycle)) <= bound


@pytest.mark.parametrize(("name", "source"), [("again", "case2.saved"), ("deep", "deep.saved")])
def test_a_repetition_may_be_interrupted(name: str, source: str, folder: Path) -> None:
    for rank in range(3):
        assert_equal(left(folder, f"{name}.saved", rank), left(folder, source, rank))
        assert_equal(left(folder, f"{name}.resumed", rank), left(folder, source, rank))
    if name == "deep":
        assert left(folder, "deep.saved")["orders"] == DEEP


def test_gradients_lie_on_the_link_and_a_recompute_waits(folder: Path) -> None:
    """Else the test above would show little: stage 0 has backwarded 5 batches less than it forwarded, stage 1 one."""
    (manifest,) = folder.glob("deep/ckpt-*/manifest.json")
    first, second = (json.loads((manifest.parent / f"stage{stage}.json").read_text()) for stage in range(2))
    assert len(dict(first["messages"][1:])["gradients"][1:]) > 1
    value = dict(second["value"][1:])
    assert len(dict(value["stage"][1:])["recomputed"][1:]) == 1
