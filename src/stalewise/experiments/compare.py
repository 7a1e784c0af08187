"""A comparison from its configuration to its folder: run what is missing, and keep the table up to date meanwhile."""

from __future__ import annotations

from pathlib import Path

from stalewise.experiments.comparison import ComparisonConfig, Runner
from stalewise.experiments.comparison_display import ComparisonDisplay
from stalewise.experiments.comparison_output import write_results
from stalewise.experiments.comparison_table import Table
from stalewise.experiments.run_lock import locked_folder
from stalewise.experiments.shared_runs import SharedRuns
from stalewise.report.comparison_data import Comparison

__all__ = ["compare"]


def compare(
    config: ComparisonConfig,
    path: Path,
    *,
    overwrite: bool = False,
    target_accuracy: float | None = None,
    display: ComparisonDisplay | None = None,
    shared: SharedRuns | None = None,
) -> Comparison:
    """Run what is missing of a comparison and write its table and report. Blocks until done.

    The files are written anew after every run, so that an interrupted comparison has them too.

    Args:
        config: what is compared.
        path: of the comparison's folder: new, empty, or of the same comparison, which goes on.
        overwrite: delete what is there of another comparison, or of this one.
        target_accuracy: a fraction, for the time to it; None: 0.95 times the worst final accuracy of all rows.
        display: what is shown meanwhile.
        shared: where runs in one process are looked for first, and kept.

    Returns:
        The table.

    Raises:
        ConfigError: where the folder holds something else; where model or data are not valid.
        WorkerError: where the model cannot be profiled. (A run that fails is a row of the table, not an error.)
    """
    with locked_folder(path):
        return _compare(config, path, overwrite, target_accuracy, display or ComparisonDisplay(), shared)


def _compare(
    config: ComparisonConfig,
    path: Path,
    overwrite: bool,
    target_accuracy: float | None,
    display: ComparisonDisplay,
    shared: SharedRuns | None,
) -> Comparison:
    runner = Runner(config, path, overwrite=overwrite, shared=shared)
    table = Table(runner, target_accuracy)
    display.begin(config, path)
    runs = list(config.runs())
    try:
        plan = runner.plan()
        display.planned(list(plan.cuts), plan.method)
        for planned in runs:
            found = runner.state(planned) == "done"
            if not found:
                with display.running(planned):
                    runner.execute(planned)
            line, numbers = table.look(planned)
            display.ran(planned, numbers, line.error, found=found)
            if not found:
                write_results(table.comparison(), path)
    except KeyboardInterrupt:
        display.stopped(sum(runner.state(planned) != "done" for planned in runs))
        raise
    comparison = table.comparison()
    write_results(comparison, path)
    display.end(comparison, path)
    return comparison
