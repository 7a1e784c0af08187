"""Every method gives the same numbers on one process and on one process per stage."""

from __future__ import annotations

from typing import Any

import dist_methods
import pytest
import torch

import stalewise

pytestmark = pytest.mark.dist


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of three processes saw."""
    folder = tmp_path_factory.mktemp("methods")
    stalewise.launch(dist_methods.worker, num_workers=3, args=[str(folder)])
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(3)]


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    """What one process saw."""
    return dist_methods.train_all()


@pytest.mark.parametrize("variant", dist_methods.VARIANTS)
def test_processes_give_the_numbers_of_one_process(
    variant: str, ranks: list[dict[str, Any]], alone: dict[str, Any]
) -> None:
    expected = alone[variant]
    for seen in ranks:
        ours = seen[variant]
        assert ours["losses"] == expected["losses"]
        assert ours["differences"] == expected["differences"]
        assert list(ours["state"]) == list(expected["state"])
        assert all(torch.equal(ours["state"][name], value) for name, value in expected["state"].items())
        assert ours["optimizer"].keys() == expected["optimizer"].keys()
        for name, values in expected["optimizer"].items():
            assert all(torch.equal(ours["optimizer"][name][key], value) for key, value in values.items())
