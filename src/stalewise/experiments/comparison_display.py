"""What a person or a program sees of a comparison while it goes on: a line per run, and the table at the end."""

from __future__ import annotations

import json
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from rich.console import Console

from stalewise.experiments.comparison import ComparisonConfig, PlannedRun
from stalewise.experiments.comparison_output import terminal_table
from stalewise.experiments.comparison_table import RunNumbers
from stalewise.report.comparison_data import Comparison
from stalewise.report.wording import duration, plural

__all__ = ["ComparisonDisplay", "JsonLines", "TextLines"]


class ComparisonDisplay:
    """Shows nothing; the others show more."""

    def progress(self, done: int, total: int) -> None:
        """So many of the runs that take place beside each other, before the comparisons that use them, have ended."""

    def begin(self, config: ComparisonConfig, path: Path) -> None:
        """The comparison begins, or goes on."""

    def planned(self, cuts: list[int], method: str) -> None:
        """The cuts are known."""

    def running(self, planned: PlannedRun) -> AbstractContextManager[object]:
        """Around a run."""
        return nullcontext()

    def ran(self, planned: PlannedRun, numbers: RunNumbers | None, error: str | None, *, found: bool) -> None:
        """A run is complete or has failed; `found`: it was complete before."""

    def end(self, comparison: Comparison, path: Path) -> None:
        """The table is written."""

    def stopped(self, left: int) -> None:
        """Ctrl-C, with so many runs left to do."""


class JsonLines(ComparisonDisplay):
    """A JSON object a line on the standard output, for programs."""

    def progress(self, done: int, total: int) -> None:
        self._print({"event": "progress", "done": done, "total": total})

    def begin(self, config: ComparisonConfig, path: Path) -> None:
        self._print({"event": "begin", "folder": str(path), "runs": len(list(config.runs())), **config.as_dict()})

    def planned(self, cuts: list[int], method: str) -> None:
        self._print({"event": "cuts", "cuts": cuts, "method": method})

    def ran(self, planned: PlannedRun, numbers: RunNumbers | None, error: str | None, *, found: bool) -> None:
        record = {"event": "run", "row": planned.name, "seed": planned.seed, "folder": planned.folder}
        if numbers is not None:
            record |= {"test_accuracy": numbers.test_accuracy, "samples_per_s": numbers.samples_per_s}
        self._print({**record, "error": error, "found": found})

    def end(self, comparison: Comparison, path: Path) -> None:
        self._print({"event": "results", **comparison.as_dict()})

    def _print(self, record: dict[str, Any]) -> None:
        print(json.dumps(record), flush=True)


class TextLines(ComparisonDisplay):
    """A line per run and a table, for people."""

    def __init__(self) -> None:
        self._console = Console(highlight=False, soft_wrap=True)
        self._number, self._total, self._width = 0, 0, 0
        self._seeds = 1
        self._since = time.perf_counter()

    def progress(self, done: int, total: int) -> None:
        self._console.print(f"{done} of {plural(total, 'run')} ended, several at a time", markup=False)

    def begin(self, config: ComparisonConfig, path: Path) -> None:
        shared = config.shared
        self._number = 0
        self._total = len(list(config.runs()))
        self._width = max(len(planned.name) for planned in config.runs())
        self._seeds = config.seeds
        self._console.print(
            f"{shared.model} on {shared.data}, {plural(shared.stages, 'stage')}, {plural(shared.epochs, 'epoch')}: "
            f"{len(config.entries)} rows with {plural(config.seeds, 'seed')} each, {plural(self._total, 'run')}, "
            f"in {path}",
            markup=False,
        )

    def planned(self, cuts: list[int], method: str) -> None:
        how = "chosen from one profile for all methods" if method == "profile" else "as given"
        self._console.print(f"cuts {', '.join(map(str, cuts)) or 'none'}, {how}", markup=False)

    def running(self, planned: PlannedRun) -> AbstractContextManager[object]:
        self._since = time.perf_counter()
        if not self._console.is_terminal:
            return nullcontext()
        return self._console.status(f"[dim]{self._number + 1}/{self._total}[/] {self._label(planned)} ...")

    def ran(self, planned: PlannedRun, numbers: RunNumbers | None, error: str | None, *, found: bool) -> None:
        self._number += 1
        place = f"{self._number:>{len(str(self._total))}}/{self._total}"
        if numbers is None:
            self._console.print(f"[dim]{place}[/]  {self._label(planned)}  [red]failed[/]  ", end="")
            self._console.print(error or "no reason was given", markup=False)
            return
        accuracy = "-" if numbers.test_accuracy is None else f"{100 * numbers.test_accuracy:.2f}%"
        rate = "-" if numbers.samples_per_s is None else f"{numbers.samples_per_s:,.0f}"
        took = "found complete" if found else duration(time.perf_counter() - self._since)
        self._console.print(
            f"[dim]{place}[/]  {self._label(planned)}  {accuracy:>7}  {rate:>7} samples/s  [dim]{took}[/]"
        )

    def end(self, comparison: Comparison, path: Path) -> None:
        self._console.print()
        self._console.print(terminal_table(comparison, self._console.width), soft_wrap=False)
        for row in comparison.rows:
            if row.remark:
                self._console.print(f"{row.name}: {row.remark}", markup=False, style="dim")
        self._console.print(f"\nreport: {path / 'report.html'}; tables: results.md, .csv, .json", markup=False)

    def stopped(self, left: int) -> None:
        if left:
            self._console.print(
                f"stopped with {plural(left, 'run')} to go; finished runs are kept, and the same command goes on."
            )

    def _label(self, planned: PlannedRun) -> str:
        seed = f"  seed {planned.seed:<{len(str(self._seeds - 1))}}" if self._seeds > 1 else ""
        return f"{planned.name:<{self._width}}{seed}"
