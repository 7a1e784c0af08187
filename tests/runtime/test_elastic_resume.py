"""An elastic run that was saved amid it goes on with its record, anywhere, and all of it is repeated bitwise."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import elastic_resume
import pytest
import torch
from dist_equal import assert_equal
from elastic_resume import BOUND, CASES, SESSIONS, pipeline, train

import stalewise
from stalewise.protocol.course import realised_staleness, streams_of
from stalewise.protocol.validate import run_streams

pytestmark = [pytest.mark.dist, pytest.mark.timeout(300)]


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


@pytest.mark.parametrize("stop", [14, 20])
def test_a_repetition_may_be_interrupted(stop: int, folder: Path) -> None:
    for rank in range(3):
        assert_equal(left(folder, f"again-{stop}", rank), left(folder, "case2.saved", rank))


def test_gradients_were_in_flight(folder: Path) -> None:
    """Else the tests above would show little: in some checkpoint, some lay on a link, and some stages had run ahead."""
    waiting = ahead = 0
    for manifest in folder.glob("case*/ckpt-*/manifest.json"):
        for stage in range(2):
            content = json.loads((manifest.parent / f"stage{stage}.json").read_text())
            messages = dict(content["messages"][1:])
            waiting += len(messages["gradients"]) - 1
            value = dict(content["value"][1:])
            ahead += len(dict(value["stage"][1:])["recomputed"]) - 1
    assert waiting > 0
    assert ahead > 0
