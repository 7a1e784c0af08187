"""`stalewise reproduce`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from stalewise.errors import ConfigError
from stalewise.experiments.comparison_display import JsonLines, TextLines
from stalewise.experiments.experiment import SCALES, Scale
from stalewise.experiments.paper import EXPERIMENTS, experiment
from stalewise.experiments.reproduce import reproduce as run_experiment
from stalewise.experiments.reproduce import results_files

__all__ = ["reproduce"]

Text = str | None
assert get_args(Scale) == SCALES


def reproduce(
    name: Annotated[str, typer.Argument(help=f"One of {', '.join(EXPERIMENTS)}; or all.")],
    scale: Annotated[str, typer.Option(help="smoke: minutes; short: about an hour each; full: the papers'.")] = "smoke",
    seeds: Annotated[int | None, typer.Option(help="Runs of each row; default: the experiment's own.", min=1)] = None,
    data: Annotated[Text, typer.Option(help="In place of the experiment's, as for train.")] = None,
    data_dir: Annotated[Text, typer.Option(help="Where the files of cifar10 or imagenet are.")] = None,
    engine: Annotated[Text, typer.Option(help="distributed or sequential, in place of the experiment's.")] = None,
    device: Annotated[Text, typer.Option(help="auto, cpu, or cuda:0.")] = None,
    threads: Annotated[int | None, typer.Option(help="Threads per stage.")] = None,
    loader_workers: Annotated[int | None, typer.Option(help="Processes that prepare batches.")] = None,
    label: Annotated[str, typer.Option(help="Added to the names of the results, such as the device.")] = "",
    jobs: Annotated[int, typer.Option(help="Runs in one process at a time.", min=1)] = 1,
    part: Annotated[
        list[str] | None, typer.Option(help="Run this part alone, as its folder is named; repeat it.")
    ] = None,
    results: Annotated[Path | None, typer.Option(help="Copy tables and plots here when all is done.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder; one of the same experiment goes on. Default: runs/reproduce.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON lines.")] = False,
) -> None:
    """Repeat an experiment, and leave its tables, plots and report. Interrupted, the same command goes on.

    Example: stalewise reproduce staleness --scale short --data /data/cifar10-parquet --results experiments/results
    """
    if scale not in SCALES:
        raise ConfigError(f"--scale {scale!r} is none of {', '.join(SCALES)}.")
    given: dict[str, Any] = {
        "data": data,
        "data_dir": data_dir,
        "engine": engine,
        "device": device,
        "threads": threads,
        "loader_workers": loader_workers,
    }
    overrides = {key: value for key, value in given.items() if value is not None}
    everything = [entry for entry in EXPERIMENTS.values() if scale in entry.plans]
    chosen = everything if name == "all" else [experiment(name)]
    failed = 0
    for entry in chosen:
        folder = (out or Path("runs") / "reproduce") / f"{entry.name}-{scale}{f'-{label}' if label else ''}"
        failed += run_experiment(
            entry,
            scale,
            folder,
            seeds=seeds,
            overrides=overrides,
            label=label,
            jobs=jobs,
            only=part or (),
            display=JsonLines() if json else TextLines(),
        )
        if results is not None:
            results_files(folder, results)
        if not json:
            print(f"{entry.title}: {folder / 'report.html'}\n")
    if failed:
        raise typer.Exit(1)
