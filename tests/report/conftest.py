"""One run folder for the tests that read, a copy of it for those that change it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from report.synthetic import write_run


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run; tests must not change it."""
    return write_run(tmp_path_factory.mktemp("runs") / "digits")


@pytest.fixture
def run_dir(finished_run: Path, tmp_path: Path) -> Path:
    """A finished run that a test may change."""
    return Path(shutil.copytree(finished_run, tmp_path / "run"))
