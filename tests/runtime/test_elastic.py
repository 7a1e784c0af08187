"""An elastic run on real processes is repeated bitwise from its record, on one process and on many."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import dist_elastic
import pytest
import torch
from dist_equal import assert_equal

import stalewise
from stalewise.protocol.course import realised_staleness, streams_of
from stalewise.protocol.validate import run_streams

pytestmark = pytest.mark.dist


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What three processes left."""
    folder = tmp_path_factory.mktemp("elastic")
    stalewise.launch(dist_elastic.worker, num_workers=3, args=[str(folder)])
    return folder


def left(folder: Path, name: str, rank: int = 0) -> dict[str, Any]:
    found: dict[str, Any] = torch.load(folder / f"{name}.{rank}.pt")
    return found


@pytest.mark.parametrize("name", dist_elastic.INJECTIONS)
def test_one_process_repeats_the_run(name: str, folder: Path) -> None:
    run = left(folder, name)
    repeated = dist_elastic.train(dist_elastic.pipeline(engine="sequential", replay=run["orders"]))
    for rank in range(3):
        assert_equal(left(folder, name, rank) | {"losses": run["losses"]}, repeated, f"rank {rank}")
    assert [sum(cycle.count("B") for cycle in cycles) for cycles in run["orders"]] == [dist_elastic.UPDATES] * 3


def test_processes_repeat_the_run_under_another_injection(folder: Path) -> None:
    for rank in range(3):
        assert_equal(left(folder, "again", rank), left(folder, "spells", rank), f"rank {rank}")


def test_stored_graphs(folder: Path) -> None:
    run = left(folder, "stored")
    assert "R" not in "".join(cycle for cycles in run["orders"] for cycle in cycles)
    repeated = dist_elastic.train(dist_elastic.pipeline("stored", engine="sequential", replay=run["orders"]))
    assert_equal(run, repeated)


@pytest.mark.parametrize("name", [*dist_elastic.INJECTIONS, "stored"])
def test_what_was_chosen_keeps_the_rules_and_the_bounds(name: str, folder: Path) -> None:
    orders = left(folder, name)["orders"]
    method = stalewise.DSP(
        staleness=dist_elastic.BOUND, elastic=True, activations="stored" if name == "stored" else "recompute"
    )
    for cycle in range(3):
        num_batches = orders[0][cycle].count("F")
        assert run_streams(method.program(), streams_of(method.program(), orders, cycle), num_batches) == []
    for stage, bound in enumerate(dist_elastic.BOUND):
        found = [depth for cycle in orders[stage] for depth in realised_staleness(cycle)]
        assert len(found) == dist_elastic.UPDATES
        assert max(found) <= bound


def test_runs_differ_and_so_do_their_numbers(folder: Path) -> None:
    """Else equality above would mean nothing: the order of the slow run is another than that of one process."""
    alone = dist_elastic.train(dist_elastic.pipeline(engine="sequential"))
    slow = left(folder, "slow stage 2")
    assert slow["orders"] != alone["orders"]
    assert slow["losses"] != alone["losses"]
