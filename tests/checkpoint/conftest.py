"""A folder with two checkpoints of a small run."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from resume_runs import batches, method_of, pipeline


@pytest.fixture(scope="session")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("original")
    pipe = pipeline(method_of("dsp-stored"))
    for count, _ in enumerate(pipe.train(batches(0), drain=False)):
        if count in (1, 3):
            pipe.save(folder, wait=True)
    return folder


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    """A copy, to be damaged."""
    return Path(shutil.copytree(original, tmp_path / "checkpoints"))
