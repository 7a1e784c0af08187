"""docs/experiments.md holds what the files in experiments/results say, and nothing else."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def maker() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_experiments", ROOT / "docs" / "make_experiments.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_number_is_from_the_results(maker: ModuleType) -> None:
    page = (ROOT / "docs" / "experiments.md").read_text(encoding="utf-8")
    assert page == maker.document(ROOT / "experiments" / "results"), "run python docs/make_experiments.py"


def test_pictures_that_are_shown_exist() -> None:
    page = (ROOT / "docs" / "experiments.md").read_text(encoding="utf-8")
    for line in page.splitlines():
        if line.startswith("!["):
            assert (ROOT / "docs" / line[line.index("(") + 1 : -1]).is_file(), line
