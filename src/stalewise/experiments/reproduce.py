"""An experiment from its declaration to its report, by the code of `stalewise compare`.

    OUT/PART/...                 a comparison each, as `compare` leaves it
    OUT/images-PART/...          generated images, where a part has some
    OUT/NAME-SCALE.csv           a line per method and part: means and deviations over seeds
    OUT/NAME-SCALE-curves.csv    a line per epoch of each run
    OUT/NAME-SCALE-gradients.csv a line per measurement of the gradient difference, where there are any
    OUT/NAME-SCALE.json          scale, hardware, commits, deviations
    OUT/NAME-SCALE-*.svg         plots
    OUT/report.html, report.md   all of it for people

    OUT/../shared-runs/...       runs in one process, for all experiments beside each other; see `shared_runs`

Interrupted, the same call goes on with the runs that are missing.
"""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from stalewise.errors import ConfigError
from stalewise.experiments.compare import compare
from stalewise.experiments.comparison import ComparisonConfig
from stalewise.experiments.comparison_display import ComparisonDisplay
from stalewise.experiments.config import TrainConfig
from stalewise.experiments.experiment import Experiment, Part, Scale
from stalewise.experiments.generated_images import generate_images
from stalewise.experiments.results import curve_rows, gradient_rows, result_rows
from stalewise.experiments.run_writer import write_json
from stalewise.experiments.shared_runs import SharedRuns
from stalewise.report.atomic import atomic_text
from stalewise.report.comparison_data import Comparison
from stalewise.report.experiment_report import write_experiment_report

__all__ = ["reproduce", "results_files"]


def reproduce(
    experiment: Experiment,
    scale: Scale,
    path: Path,
    *,
    seeds: int | None = None,
    overrides: Mapping[str, Any] | None = None,
    label: str = "",
    jobs: int = 1,
    only: Sequence[str] = (),
    display: ComparisonDisplay | None = None,
) -> int:
    """Run what is missing of an experiment and write its results; blocks until done.

    Args:
        experiment: what is asked.
        scale: how large.
        path: of its folder; one of the same experiment goes on.
        seeds: runs of each row; None: the plan's own.
        overrides: fields of `TrainConfig` that count more than the declaration.
        label: added to the names of the files, such as "h100"; tells results of different hardware apart.
        jobs: runs in one process that take place at a time; runs of several processes take turns.
        only: names of parts to run; none: all. What others have found before stays in the tables.
        display: what is shown meanwhile.

    Returns:
        How many runs failed.

    Raises:
        ConfigError: where the declaration cannot be run here, or the folder holds something else.
    """
    plan = experiment.plan(scale)
    seeds = seeds or plan.seeds
    configs = {
        part.name: part.comparison(seeds=seeds, overrides={**(overrides or {}), **_images(part, path)})
        for part in plan.parts
    }
    if unknown := set(only) - set(configs):
        raise ConfigError(f"{experiment.name} has no part {min(unknown)!r} at this scale; it has {', '.join(configs)}.")
    parts = [
        part
        for part in plan.parts
        if not only or part.name in only or _is_complete(configs[part.name], path / part.name)
    ]
    shared = SharedRuns(path.parent / "shared-runs")
    if jobs > 1:
        runs = _shareable([configs[part.name] for part in parts])
        shared.fill(runs, jobs=jobs, tell=None if display is None else display.progress)
    stem = f"{experiment.name}-{scale}{f'-{label}' if label else ''}"
    found: list[tuple[Part, Comparison]] = []
    for part in parts:
        if part.generated is not None:
            generate_images(path / f"images-{part.name}", part.generated)
        found.append((part, compare(configs[part.name], path / part.name, display=display, shared=shared)))
        # After every part, so that an interrupted experiment has results, too.
        _write(experiment, scale, stem, path, found, seeds, _typed(overrides or {}, label))
    return sum(len(row.failures) for _, comparison in found for row in comparison.rows)


def results_files(path: Path, target: Path) -> list[Path]:
    """Copy the tables and plots of an experiment's folder, without its runs, and return the copies.

    Raises:
        ConfigError: where there are none.
    """
    files = sorted(file for file in path.glob("*-*.*") if file.suffix in (".csv", ".json", ".svg"))
    if not files:
        raise ConfigError(f"{path} holds no results of an experiment.")
    target.mkdir(parents=True, exist_ok=True)
    return [Path(shutil.copyfile(file, target / file.name)) for file in files]


def _images(part: Part, path: Path) -> dict[str, Any]:
    """Settings of a part whose images are made for it."""
    if part.generated is None:
        return {}
    return {"data": part.settings["data"], "data_dir": str(path / f"images-{part.name}")}


def _is_complete(config: ComparisonConfig, folder: Path) -> bool:
    return all((folder / planned.folder / "summary.json").is_file() for planned in config.runs())


def _shareable(configs: Sequence[ComparisonConfig]) -> list[TrainConfig]:
    """Runs in one process whose cuts are known, all of the first seed first."""
    runs = [
        (planned.seed, config.of(planned, cuts))
        for config in configs
        if config.shared.engine == "sequential" and isinstance(cuts := config.shared.partition, tuple)
        for planned in config.runs()
        if planned.entry.method != "data-parallel"
    ]
    return [run for _, run in sorted(runs, key=lambda entry: entry[0])]


def _typed(overrides: Mapping[str, Any], label: str) -> str:
    """The options of a call, without where somebody's data are."""
    given = {name: "PATH" if name in ("data", "data_dir") else value for name, value in overrides.items()}
    if label:
        given["label"] = label
    return "".join(f" --{name.replace('_', '-')} {value}" for name, value in given.items())


def _write(
    experiment: Experiment,
    scale: Scale,
    stem: str,
    path: Path,
    found: Sequence[tuple[Part, Comparison]],
    seeds: int,
    options: str,
) -> None:
    rows = [row for part, comparison in found for row in result_rows(part.name, comparison, path / part.name)]
    curves = [row for part, comparison in found for row in curve_rows(part.name, comparison)]
    gradients = [row for part, comparison in found for row in gradient_rows(part.name, comparison, path / part.name)]
    for name, lines in ((stem, rows), (f"{stem}-curves", curves), (f"{stem}-gradients", gradients)):
        if lines:
            _write_csv(path / f"{name}.csv", lines)
    first = found[0][1]
    environments = _environments(path, found)
    commits = [environment.get("commit") for environment in environments]
    about = {
        "experiment": experiment.name,
        "scale": scale,
        "seeds": seeds,
        "deviations": experiment.plan(scale).deviations,
        "machine": first.machine,
        "devices": environments[0].get("devices") if environments else None,
        "commits": [commit for commit in dict.fromkeys(commits) if commit],
        "command": f"stalewise reproduce {experiment.name} --scale {scale} --seeds {seeds}{options}",
        "parts": {part.name: _without_folders(comparison.settings) for part, comparison in found},
    }
    write_json(path / f"{stem}.json", json.loads(json.dumps(about)))
    write_experiment_report(
        path,
        stem,
        title=experiment.title,
        question=experiment.question,
        columns=experiment.columns,
        plots=experiment.plots,
    )


def _without_folders(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Results are kept with the documents; where somebody's data were is of no use there."""
    named = {**settings, "data_dir": None}
    return {**named, "data": Path(str(settings["data"])).name}


def _write_csv(path: Path, rows: Sequence[Mapping[str, str]]) -> None:
    head = list(dict.fromkeys(name for row in sorted(rows, key=len, reverse=True) for name in row))
    with atomic_text(path) as file:
        writer = csv.DictWriter(file, head, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def _environments(path: Path, found: Sequence[tuple[Part, Comparison]]) -> list[dict[str, Any]]:
    """Of every run that is done."""
    folders = [
        path / part.name / run.folder
        for part, comparison in found
        for row in comparison.rows
        for run in row.runs
        if run.state == "done"
    ]
    files = [folder / "environment.json" for folder in folders]
    return [json.loads(file.read_text(encoding="utf-8")) for file in files if file.is_file()]
