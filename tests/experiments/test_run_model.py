"""What is refused of a model before there is a process for each stage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from stalewise.errors import ConfigError, PlanError
from stalewise.experiments import comparison, profiling, training
from stalewise.experiments.comparison import ComparisonConfig, Runner
from stalewise.experiments.config import TrainConfig
from stalewise.experiments.profiling import profile_run
from stalewise.experiments.run_model import check_run_model

SMALL: dict[str, Any] = {"model": "resnet8", "data": "digits", "stages": 99}
REFUSED = r"^5 layers cannot fill 99 stages; each stage needs at least one\. Use --stages 5 or fewer\.$"


@pytest.fixture(autouse=True)
def _no_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise AssertionError("processes were started")

    for module in (comparison, profiling, training):
        monkeypatch.setattr(module, "launch", fail)


def test_a_run_of_too_many_stages_starts_no_process(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=REFUSED):
        training.run(TrainConfig(**SMALL), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_nor_does_a_profile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STALEWISE_CACHE", str(tmp_path))
    with pytest.raises(PlanError, match=REFUSED):
        profile_run(TrainConfig(**SMALL))


def test_nor_does_a_comparison(tmp_path: Path) -> None:
    config = ComparisonConfig(methods=("bp",), options={}, baselines=(), seeds=1, shared=TrainConfig(**SMALL))
    with pytest.raises(PlanError, match=REFUSED):
        Runner(config, tmp_path, overwrite=False).plan()


def test_models_that_cannot_be_and_those_of_the_users_own() -> None:
    with pytest.raises(ConfigError, match="depth 21 is not possible"):
        check_run_model(TrainConfig(model="resnet21"))
    check_run_model(TrainConfig(model="nowhere:build", stages=99))
    check_run_model(TrainConfig(model="resnet8", stages=5, staleness=None))
