"""The table of a comparison as files and for the terminal.

results.json    everything, in full precision           results.md     what people read, as Markdown
results.csv     the same, a line per row                report.html    the same with curves (`report.comparison`)

CSV is the JSON of a row, flattened: `stages[0].memory.measured.total.mean` is `stage0_memory_measured_total_mean`.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from stalewise.report.atomic import atomic_text
from stalewise.report.comparison import write_comparison_report
from stalewise.report.comparison_columns import Cell, Column, columns
from stalewise.report.comparison_data import Comparison, TableRow

__all__ = ["as_csv", "as_json", "as_markdown", "terminal_table", "write_results"]

_NAME = "Method"


def write_results(comparison: Comparison, path: Path) -> None:
    """Write all files; each appears whole or not at all."""
    for name, text in (
        ("results.json", as_json(comparison)),
        ("results.csv", as_csv(comparison)),
        ("results.md", as_markdown(comparison)),
    ):
        with atomic_text(path / name) as file:
            file.write(text)
    write_comparison_report(comparison, path / "report.html")


def as_json(comparison: Comparison) -> str:
    """All numbers."""
    return json.dumps(comparison.as_dict(), indent=2, allow_nan=False) + "\n"


def as_csv(comparison: Comparison) -> str:
    """A line per row; numbers as in JSON, empty where there is none."""
    lines = [dict(_flat(_for_csv(row))) for row in comparison.rows]
    # The fullest line comes first, so that a row without a result does not put its columns out of order.
    head = list(dict.fromkeys(name for line in sorted(lines, key=len, reverse=True) for name in line))
    file = io.StringIO()
    writer = csv.DictWriter(file, head, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return file.getvalue()


def as_markdown(comparison: Comparison) -> str:
    """The table, and what to know about its rows."""
    shown = columns(comparison)
    lines = [
        [_NAME, *(column.head for column in shown)],
        ["---", *("---:" for _ in shown)],
        *([row.name, *(str(column.cell(row)) for column in shown)] for row in comparison.rows),
    ]
    text = "\n".join(f"| {' | '.join(map(_markdown, line))} |" for line in lines)
    remarks = [f"- **{_markdown(row.name)}**: {_markdown(row.remark)}" for row in comparison.rows if row.remark]
    return "\n".join([text, *(["", *remarks] if remarks else [])]) + "\n"


def terminal_table(comparison: Comparison, width: int) -> Table:
    """The most important columns that fit into `width` characters, in their order.

    Where not even the four most important fit with their ranges, ranges are left out.
    """
    every = columns(comparison)
    ranges = _fit(every, comparison, width, ranges=True)
    chosen = ranges if len(ranges) >= min(4, len(every)) else _fit(every, comparison, width, ranges=False)
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    table.add_column(_NAME, no_wrap=True)
    for column in chosen:
        table.add_column(column.head, justify="right", no_wrap=True)
    for row in comparison.rows:
        style = "dim" if not row.done else ""
        cells = (column.cell(row) for column in chosen)
        table.add_row(row.name, *(_cell_text(cell, ranges is chosen) for cell in cells), style=style)
    return table


def _fit(every: tuple[Column, ...], comparison: Comparison, width: int, *, ranges: bool) -> list[Column]:
    left = width - max(len(_NAME), *(len(row.name) for row in comparison.rows)) - 2
    kept: set[str] = set()
    for column in sorted(every, key=lambda column: column.importance):
        left -= 2 + max(len(column.head), *(len(_cell_text(column.cell(row), ranges).plain) for row in comparison.rows))
        if left < 0:
            break
        kept.add(column.key)
    return [column for column in every if column.key in kept]


def _cell_text(cell: Cell, ranges: bool) -> Text:
    if not (ranges and cell.spread):
        return Text(cell.text)
    return Text.assemble(cell.text, " ", (f"({cell.spread})", "dim"))


def _for_csv(row: TableRow) -> dict[str, Any]:
    values = row.as_dict()
    stages = values.pop("stages")
    runs = values.pop("runs")
    values["staleness"] = " ".join(map(str, values["staleness"]))
    values["runs_done"] = sum(run["state"] == "done" for run in runs)
    return {**values, **{f"stage{index}": stage for index, stage in enumerate(stages)}}


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}_")
        elif value is None and name != "std":
            # A missing spread has no columns; the rows that have one give them.
            continue
        elif not isinstance(value, list):
            yield f"{prefix}{name}", value


def _markdown(text: str) -> str:
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")
