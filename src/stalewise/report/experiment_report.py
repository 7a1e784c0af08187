"""The report of an experiment, made from the files that its run left, and from nothing else."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stalewise.report.atomic import atomic_text
from stalewise.report.experiment import Column, Plot, Row, cell, headings, markdown_table, used_columns
from stalewise.report.experiment_plots import draw_plot
from stalewise.report.page import Markup, element, figure, page, pairs, section, table

__all__ = ["circumstances", "markdown_report", "read_rows", "write_experiment_report"]


def write_experiment_report(
    path: Path, stem: str, *, title: str, question: str, columns: Sequence[Column], plots: Sequence[Plot]
) -> None:
    """Write report.html, report.md and the plots beside the files that they are made from.

    Args:
        path: of the folder.
        stem: of the names of its files.
        title: of the experiment.
        question: that it answers.
        columns: of its table.
        plots: to draw.
    """
    rows = read_rows(path / f"{stem}.csv")
    curves, gradients = (read_rows(path / f"{stem}-{name}.csv") for name in ("curves", "gradients"))
    about = json.loads((path / f"{stem}.json").read_text(encoding="utf-8"))
    figures: list[Markup] = []
    names: list[str] = []
    for plot in plots:
        svg = draw_plot(plot, title, rows, curves, gradients)
        if svg:
            names.append(f"{stem}-{plot.kind if plot.kind != 'bars' else plot.column}.svg")
            with atomic_text(path / names[-1]) as file:
                file.write(svg)
            figures.append(figure(svg, f"{title}, {about['scale']} scale", wide=True))
    used = used_columns(columns, rows)
    cells = [[row["part"], row["title"], *(cell(row, column) for column in used), row["seeds"]] for row in rows]
    content = [
        element("h1", title),
        element("p", question),
        section("Results", table(headings(used), cells, text=(0, 1)), *_failures(rows)),
        section("Plots", *figures),
        section("Circumstances", pairs(circumstances(about))),
    ]
    with atomic_text(path / "report.html") as file:
        file.write(page(f"{title}: {about['scale']}", *content))
    with atomic_text(path / "report.md") as file:
        file.write(markdown_report(title, question, columns, rows, about, names))


def markdown_report(
    title: str,
    question: str,
    columns: Sequence[Column],
    rows: Sequence[Row],
    about: dict[str, Any],
    plots: Sequence[str],
) -> str:
    """The report as Markdown, under a second-level heading."""
    lines = [f"## {title}", "", question, "", markdown_table(columns, rows)]
    lines += [f"- {row['part']}, {row['title']}: failed: {row['failed']}" for row in rows if row["failed"]]
    lines += [f"![{title}]({name})" for name in plots]
    lines += ["", *(f"- {name}: {value}" for name, value in circumstances(about))]
    return "\n".join(lines) + "\n"


def circumstances(about: dict[str, Any]) -> list[tuple[str, str]]:
    """What to know of how the numbers came about."""
    machine = about["machine"]
    gpus = ", ".join(machine.get("gpus") or [])
    devices = ", ".join(dict.fromkeys(about.get("devices") or []))
    return [
        ("Scale", about["scale"]),
        ("Deviations from the papers", about["deviations"]),
        ("Seeds", f"{about['seeds']}; ± is the sample deviation over them"),
        ("Hardware", f"{machine.get('processor')}, {machine.get('cores')} cores{f'; {gpus}' if gpus else ''}"),
        ("Devices", devices or "unknown"),
        ("Versions", f"stalewise {machine.get('stalewise')}, torch {machine.get('torch')}"),
        ("Commits", ", ".join(about.get("commits") or []) or "unknown"),
        ("Command", about.get("command") or "unknown"),
    ]


def read_rows(path: Path) -> list[Row]:
    """The lines of a CSV file; none where there is no file."""
    if not path.is_file():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def _failures(rows: Sequence[Row]) -> list[Markup]:
    return [element("p", f"{row['part']}, {row['title']} failed: {row['failed']}") for row in rows if row["failed"]]
