"""Runs that several comparisons share: found by what they are, made once, and never those whose times count."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from comparison_folders import no_training

from stalewise.errors import ConfigError
from stalewise.experiments import comparison
from stalewise.experiments.compare import compare
from stalewise.experiments.comparison import ComparisonConfig
from stalewise.experiments.comparison_plan import ComparisonPlan
from stalewise.experiments.config import TrainConfig
from stalewise.experiments.experiment import Experiment, Part, Plan
from stalewise.experiments.reproduce import reproduce
from stalewise.experiments.shared_runs import SharedRuns
from stalewise.report.comparison_data import Comparison

__all__ = ["no_training"]

CONFIG = TrainConfig(
    model="resnet8",
    engine="sequential",
    partition=(2, 3),
    train_limit=32,
    test_limit=16,
    batch_size=16,
    epochs=1,
    threads=1,
    display="quiet",
    on_nan="go-on",  # as comparisons have it
)


def left(path: Path, text: str) -> Path:
    path.mkdir(parents=True)
    (path / "summary.json").write_text(text)
    return path


def test_a_run_is_found_by_what_it_is(tmp_path: Path) -> None:
    shared = SharedRuns(tmp_path / "shared")
    assert shared.find(CONFIG) is None
    shared.keep(CONFIG, left(tmp_path / "run", "first"))
    shared.keep(CONFIG, left(tmp_path / "again", "second"))
    same_runs = ({}, {"display": "plain"}, {"staleness": (4, 2, 0)}, {"recv_timeout_s": 7.0})
    for same in (replace(CONFIG, **change) for change in same_runs):
        found = shared.find(same)
        assert found is not None
        assert (found / "summary.json").read_text() == "first"
    others = [
        {"seed": 1},
        {"partition": (1, 3)},
        {"staleness": (2, 1, 0)},
        {"method": "fr"},
        {"lr": 0.2},
        {"data": "cifar10"},
        {"threads": 2},
        {"engine": "distributed"},
    ]
    assert [shared.find(replace(CONFIG, **other)) for other in others] == [None] * len(others)
    assert [folder.name for folder in (tmp_path / "shared").iterdir()] == [shared.key(CONFIG)], "nothing half done"


def test_a_run_of_another_machine_is_another_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shared = SharedRuns(tmp_path / "shared")
    shared.keep(CONFIG, left(tmp_path / "run", "here"))
    monkeypatch.setattr("stalewise.experiments.shared_runs.machine", lambda: {"processor": "another one"})
    assert shared.find(CONFIG) is None


def test_runs_of_several_processes_are_not_shared(tmp_path: Path) -> None:
    shared = SharedRuns(tmp_path)
    distributed = replace(CONFIG, engine="distributed")
    shared.keep(distributed, left(tmp_path / "run", "{}"))
    assert shared.find(distributed) is None
    with pytest.raises(ConfigError, match="measured alone"):
        shared.fill([CONFIG, distributed], jobs=2)
    with pytest.raises(ConfigError, match="at least 1 run"):
        shared.fill([CONFIG], jobs=0)


@pytest.mark.slow
@pytest.mark.dist
def test_equal_runs_of_two_experiments_are_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[int, int]] = []
    shared = SharedRuns(tmp_path / "shared-runs")
    bad = replace(CONFIG, data="digits", data_dir=None, model="resnet9")
    shared.fill([CONFIG, CONFIG, bad], jobs=2, tell=lambda done, total: told.append((done, total)))
    assert told == [(0, 2), (1, 2), (2, 2)]
    assert [folder.name for folder in shared.root.iterdir()] == [shared.key(CONFIG)], (
        "the one that fails leaves nothing"
    )

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("a run took place")

    # The cuts are given, but the comparison asks what they cost: that needs no run.
    plan = ComparisonPlan(method="fixed", cuts=(2, 3), memory={})
    monkeypatch.setattr(comparison.Runner, "plan", lambda _: plan)
    monkeypatch.setattr(comparison, "launch", fail)
    for name, row in (("a", "dsp"), ("b", "m4.2.0=dsp")):
        config = ComparisonConfig(methods=(row,), options={}, baselines=(), seeds=1, shared=CONFIG)
        (found,) = compare(config, tmp_path / name, shared=shared).rows
        assert found.done == 1
        (folder,) = (tmp_path / name / "runs").iterdir()
        kept = shared.find(CONFIG)
        assert kept is not None
        for file in ("metrics.jsonl", "model.safetensors", "environment.json"):
            assert (folder / file).read_bytes() == (kept / file).read_bytes()


def test_the_baseline_that_is_measured_is_made_anew(tmp_path: Path, no_training: list[str]) -> None:
    def runs(engine: str, name: str) -> list[str]:
        no_training.clear()
        settings = replace(CONFIG, engine=engine)
        config = ComparisonConfig(methods=("dsp",), options={}, baselines=("one-process",), seeds=1, shared=settings)
        compare(config, tmp_path / name, shared=SharedRuns(tmp_path / "shared"))
        return sorted(no_training)

    assert runs("sequential", "a") == ["dsp-seed0", "one-process-seed0"]
    assert runs("sequential", "b") == []
    assert runs("distributed", "c") == ["dsp-seed0", "one-process-seed0"]


def test_parts_are_run_alone_and_what_is_complete_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    tables: list[list[str]] = []

    def pretend(config: ComparisonConfig, path: Path, **_: object) -> Comparison:
        for planned in config.runs():
            if not (path / planned.folder).exists():
                left(path / planned.folder, "{}")
                ran.append(f"{path.name}-{planned.seed}")
        return Comparison(rows=())

    monkeypatch.setattr("stalewise.experiments.reproduce.compare", pretend)
    monkeypatch.setattr(
        "stalewise.experiments.reproduce._write",
        lambda *given: tables.append([part.name for part, _ in given[4]]),
    )
    settings = {"model": "resnet8", "engine": "sequential", "partition": (2, 3), "stages": 3}
    parts = (
        *(Part(name=name, methods=("bp",), settings=settings) for name in "ab"),
        Part(name="c", methods=("bp",), settings=settings, seeds=1),
    )
    experiment = Experiment(
        name="x",
        title="X",
        question="?",
        columns=("loss",),
        plots=(),
        plans={"short": Plan(parts=parts, seeds=2, deviations=".")},
    )
    reproduce(experiment, "short", tmp_path / "x", only=("c",))
    assert (ran, tables[-1]) == (["c-0"], ["c"])
    reproduce(experiment, "short", tmp_path / "x", only=("b",))
    assert (ran[1:], tables[-1]) == (["b-0", "b-1"], ["b", "c"])
    reproduce(experiment, "short", tmp_path / "x")
    assert (ran[3:], tables[-1]) == (["a-0", "a-1"], ["a", "b", "c"])
    with pytest.raises(ConfigError, match="has no part 'd' at this scale; it has a, b, c"):
        reproduce(experiment, "short", tmp_path / "x", only=("d",))
