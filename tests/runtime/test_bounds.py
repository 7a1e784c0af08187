"""Memory is bounded by the staleness alone, whichever stage is slow."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from dist_workers import load

pytestmark = [pytest.mark.dist, pytest.mark.slow]

STALENESS = (5, 2, 0)
NUM_BATCHES = 30


@pytest.fixture(params=[0, 1, 2], ids=lambda stage: f"stage {stage} is slow")
def seen(request: pytest.FixtureRequest, job_folder: Callable[[int], Path]) -> list[dict[str, Any]]:
    """What each rank of three saw, with one stage slow."""
    return load(job_folder(3), f"bounds {request.param}", 3)


def test_stored_inputs(seen: list[dict[str, Any]]) -> None:
    """m_k + 1 per stage; not less either, for a stage forwards m_k batches further before it backwards."""
    assert [rank["num_losses"] for rank in seen] == [NUM_BATCHES] * 3
    assert [rank["stored"] for rank in seen] == [m + 1 for m in STALENESS]


def test_queues_in_training(seen: list[dict[str, Any]]) -> None:
    """In the order in which a rank makes them: activations in, gradients out, activations out, gradients in."""
    links = {0: (0, 0), 1: (0, 0, 1, 1), 2: (1, 1)}
    for rank, used in links.items():
        peaks = seen[rank]["queues"]
        assert len(peaks) == len(used)
        for link, peak in zip(used, peaks, strict=True):
            assert 1 <= peak <= STALENESS[link] + 1 + 1, f"rank {rank}, link {link}: m + 1 batches and an END"


def test_queues_in_an_evaluation(seen: list[dict[str, Any]]) -> None:
    """40 batches, but no more than a handful wait anywhere."""
    assert max(seen[0]["queues with evaluation"]) <= STALENESS[0] + 2
    assert max(seen[1]["queues with evaluation"]) <= STALENESS[0] + 2
    assert max(seen[2]["queues with evaluation"]) <= STALENESS[1] + 2


@pytest.mark.parametrize("link", [0, 1])
def test_batches_on_a_link(link: int, seen: list[dict[str, Any]]) -> None:
    """Both queues of link k -> k+1, with what the network holds.

    At most m_k + 1 in warm-up, d_k + 1 after it, and m_k in the drain, where stage k+1 keeps none for itself. A batch
    is on the link from the begin of its send to the end of its receive, by the clock that all ranks share.
    """
    above, below = seen[link]["spans"], seen[link + 1]["spans"]
    changes: list[tuple[int, int]] = []
    for spans, send, others, receive in (
        (above, "SEND_ACTIVATION", below, "RECEIVE_ACTIVATION"),
        (below, "SEND_GRADIENT", above, "RECEIVE_GRADIENT"),
    ):
        begins = {batch: start for kind, batch, start, _ in spans if kind == send}
        ends = {batch: end for kind, batch, _, end in others if kind == receive}
        assert sorted(begins) == sorted(ends) == list(range(NUM_BATCHES))
        assert all(begins[batch] < ends[batch] for batch in begins)
        changes += [(begins[batch], 1) for batch in begins] + [(ends[batch], -1) for batch in ends]
    here, after = STALENESS[link], STALENESS[link + 1]
    gradients = {batch: start for kind, batch, start, _ in below if kind == "SEND_GRADIENT"}
    steady_from, drain_from = gradients[0], gradients.get(NUM_BATCHES - after, max(changes)[0])
    held, most = 0, {"warm-up": 0, "steady": 0, "drain": 0}
    for time_ns, change in sorted(changes):
        held += change
        part = "warm-up" if time_ns <= steady_from else "steady" if time_ns < drain_from else "drain"
        most[part] = max(most[part], held)
    assert held == 0
    assert most["warm-up"] <= here + 1
    assert most["steady"] <= here - after + 1
    assert most["drain"] <= max(here, here - after + 1)
