"""A comparison runs what is missing, keeps what is there, and never mixes two."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from comparison_folders import CUTS, config, no_training

from stalewise.errors import ConfigError
from stalewise.experiments import comparison
from stalewise.experiments.compare import compare
from stalewise.experiments.comparison import ComparisonConfig, PlannedRun, Runner
from stalewise.experiments.machine import machine

__all__ = ["no_training"]


def test_seeds_take_turns_outside_and_methods_inside(no_training: list[str], tmp_path: Path) -> None:
    """So that what changes on a machine over hours falls on all methods alike."""
    compare(config(baselines=("one-process", "data-parallel")), tmp_path / "out")
    names = ("bp", "dsp", "one-process", "data-parallel")
    assert no_training == [f"{name}-seed{seed}" for seed in (0, 1) for name in names]
    assert sorted(path.name for path in (tmp_path / "out" / "runs").iterdir()) == sorted(no_training)


def test_all_methods_get_the_same_cuts(no_training: list[str], tmp_path: Path) -> None:
    compare(config(("bp", "gpipe", "dsp"), seeds=1), tmp_path)
    for name in ("bp", "gpipe", "dsp"):
        written = json.loads((tmp_path / "runs" / f"{name}-seed0" / "config.json").read_text())
        assert written["partition"] == CUTS
        assert written["display"] == "quiet"
        assert written["method"] == name


def test_only_what_is_missing_is_run_again(no_training: list[str], tmp_path: Path) -> None:
    first = compare(config(), tmp_path)
    no_training.clear()
    compare(config(), tmp_path)
    assert no_training == []
    (tmp_path / "runs" / "dsp-seed0" / "summary.json").unlink()
    (tmp_path / "runs" / "dsp-seed0" / "left-over").touch()
    again = compare(config(), tmp_path)
    assert no_training == ["dsp-seed0"]
    assert not (tmp_path / "runs" / "dsp-seed0" / "left-over").exists()
    assert again.rows == first.rows


def test_an_interrupted_run_does_not_count(
    no_training: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C while the third run writes its report: it has a summary already, and is not complete all the same."""
    train, done = comparison.run, 0

    def interrupted(of: Any, path: Path) -> None:
        nonlocal done
        train(of, path)
        done += 1
        if done == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(comparison, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        compare(config(), tmp_path)
    runs = tmp_path / "runs"
    assert sorted(path.name for path in runs.iterdir()) == ["bp-seed0", "bp-seed1.running", "dsp-seed0"]
    assert [row["runs"][1]["state"] for row in json.loads((tmp_path / "results.json").read_text())["rows"]] == [
        "missing",
        "missing",
    ]
    no_training.clear()
    compare(config(), tmp_path)
    assert no_training == ["bp-seed1", "dsp-seed1"]
    assert sorted(path.name for path in runs.iterdir()) == ["bp-seed0", "bp-seed1", "dsp-seed0", "dsp-seed1"]


def test_a_method_that_fails_does_not_end_the_others(no_training: list[str], tmp_path: Path) -> None:
    result = compare(config(("bp", "dni", "dsp"), seeds=1), tmp_path)
    assert no_training == ["bp-seed0", "dni-seed0", "dsp-seed0"]
    good, failed, _ = result.rows
    assert failed.remark == "failed: ValueError: <no> batch | left"
    assert (failed.done, failed.test_accuracy, good.done) == (0, None, 1)
    assert not (tmp_path / "runs" / "dni-seed0" / "summary.json").exists()
    detail = json.loads((tmp_path / "runs" / "dni-seed0" / "failure.json").read_text())["detail"]
    assert detail == "a traceback\nof many lines"
    compare(config(("bp", "dni", "dsp"), seeds=1), tmp_path)
    assert no_training[3:] == ["dni-seed0"], "a failed run is tried again, and only that"


@pytest.mark.parametrize(
    ("other", "says"),
    [
        (config(seeds=1), "its seeds is 2 and would be 1"),
        (config(lr=0.05), "its lr is 0.1 and would be 0.05"),
        (config(("bp", "gpipe")), "its rows are bp, dsp and would be bp, gpipe"),
        (
            config(options={"dsp": {"staleness": "6,3,0"}}),
            "its rows are bp, dsp and would be bp, dsp (staleness=6,3,0)",
        ),
        (config(partition=(1, 2)), 'its partition is "profile" and would be [1, 2]'),
    ],
)
def test_another_comparison_is_refused(
    no_training: list[str], tmp_path: Path, other: ComparisonConfig, says: str
) -> None:
    compare(config(), tmp_path)
    no_training.clear()
    with pytest.raises(ConfigError) as error:
        compare(other, tmp_path)
    assert says in str(error.value)
    assert "--overwrite" in str(error.value)
    assert no_training == []
    compare(other, tmp_path, overwrite=True)
    assert len(no_training) == len(list(other.runs())), "--overwrite starts anew"


def test_a_comparison_grows_by_seeds(no_training: list[str], tmp_path: Path) -> None:
    compare(config(seeds=1), tmp_path)
    no_training.clear()
    grown = compare(config(seeds=3), tmp_path)
    assert no_training == [f"{name}-seed{seed}" for seed in (1, 2) for name in ("bp", "dsp")]
    assert [row.done for row in grown.rows] == [3, 3]
    no_training.clear()
    compare(config(seeds=3), tmp_path)
    assert no_training == [], "it is known as one of 3 seeds now"


def test_another_machine_is_refused(no_training: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compare(config(), tmp_path)
    real = machine()
    monkeypatch.setattr(comparison, "machine", lambda: {**real, "processor": "another one"})
    with pytest.raises(ConfigError, match=r'its processor is .* and would be "another one"'):
        compare(config(), tmp_path)


def test_a_new_target_is_no_other_comparison(no_training: list[str], tmp_path: Path) -> None:
    compare(config(), tmp_path, target_accuracy=0.3)
    no_training.clear()
    assert compare(config(), tmp_path, target_accuracy=0.4).target_accuracy == 0.4
    assert no_training == []


def test_a_foreign_folder_is_left_alone(no_training: list[str], tmp_path: Path) -> None:
    (tmp_path / "precious.txt").write_text("do not delete")
    for overwrite in (False, True):
        with pytest.raises(ConfigError, match=r"no comparison\.json"):
            compare(config(), tmp_path, overwrite=overwrite)
    assert (tmp_path / "precious.txt").read_text() == "do not delete"
    shutil.rmtree(tmp_path)
    tmp_path.write_text("a file")
    with pytest.raises(ConfigError, match="is a file and not a folder"):
        compare(config(), tmp_path)


def test_a_malformed_comparison_is_named(no_training: list[str], tmp_path: Path) -> None:
    (tmp_path / "comparison.json").write_text("{")
    with pytest.raises(ConfigError, match=r"comparison\.json cannot be read"):
        compare(config(), tmp_path)


def test_a_job_of_several_ranks_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparison, "in_launched_job", lambda: True)
    with pytest.raises(ConfigError, match="without torchrun"):
        Runner(config(), tmp_path / "out", overwrite=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"methods": ("bp", "dps")}, "Did you mean 'dsp'"),
        ({"methods": ("dsp", "dsp")}, "deep=dsp"),
        ({"methods": ()}, "--methods"),
        ({"methods": ("a/b=dsp",)}, "cannot name a row"),
        ({"methods": ("..=dsp",)}, "cannot name a row"),
        ({"methods": ("bp", "one-process=bp"), "baselines": ("one-process",)}, "compared twice"),
        ({"options": {"gpipe": {"micro_batches": 2}}}, "not compared"),
        ({"options": {"bp": {"micro_batches": 2}}}, "not an option of bp"),
        ({"options": {"dsp": {"staleness": "4,x,0"}}}, "--option dsp:staleness"),
        ({"options": {"dsp": {"staleness": "4,2"}}}, "2 entries for 3 stages"),
        ({"baselines": ("two-process",)}, "no baseline"),
        ({"seeds": 0}, "at least 1"),
    ],
)
def test_what_cannot_be_compared_is_said_before_anything_runs(arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        config(**arguments)


def test_rows_of_one_method_with_other_options() -> None:
    both = config(
        ("dsp", "deep=dsp", "gpipe"),
        options={"deep": {"staleness": [6, 3, 0], "queue": "2,2,0"}, "gpipe": {"micro_batches": 8}},
    )
    plain, deep, gpipe = (both.of(PlannedRun(entry=entry, seed=1), (2, 3)).build_method() for entry in both.entries)
    assert tuple(plain.staleness) == (4, 2, 0)
    assert tuple(deep.staleness) == (6, 3, 0)
    assert deep.queue == (2, 2, 0)  # type: ignore[attr-defined]
    assert gpipe.micro_batches == 8  # type: ignore[attr-defined]


def test_baselines_are_the_unsplit_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """One process has all cores, or as many threads as all stages together; a rank has those of a stage."""
    monkeypatch.setattr(comparison.os, "cpu_count", lambda: 8)
    for threads, alone in ((None, None), (2, 6), (4, 8)):
        compared = config(threads=threads, baselines=("one-process", "data-parallel"))
        one, parallel = (
            compared.of(PlannedRun(entry=entry, seed=0), (2, 3)) for entry in compared.entries if entry.baseline
        )
        assert (one.stages, one.partition, one.engine, one.threads) == (1, (), "sequential", alone)
        assert (parallel.stages, parallel.threads) == (1, threads)
