"""The table and the words of an experiment, from the rows of its CSV file.

A row is one method in one part of an experiment; `accuracy_mean` and `accuracy_std` are over its seeds. Reports and
documents are made from the same rows, so that neither can say what the file does not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

__all__ = ["HEADS", "UNITS", "Column", "Plot", "Row", "cell", "headings", "markdown_table", "used_columns"]

Column = Literal[
    "loss",
    "accuracy",
    "best",
    "rate",
    "speed_up",
    "speed_up_one",
    "slow_down",
    "floor",
    "memory",
    "memory_stage",
    "gradient",
    "gradient_0",
    "gradient_1",
    "gradient_2",
    "gradient_highest",
    "gradient_lowest",
]

Row = Mapping[str, str]
"""A line of the CSV file."""


@dataclass(frozen=True)
class Plot:
    """A plot of an experiment.

    Args:
        kind: "curves" (loss and accuracy over epochs and time), "bars" (a column, in groups), or "gradients" (the
            gradient difference of each stage over training).
        column: of "bars".
    """

    kind: Literal["curves", "bars", "gradients"]
    column: Column = "rate"


HEADS: Mapping[Column, str] = {
    "loss": "Training loss",
    "accuracy": "Test accuracy",
    "best": "Best test accuracy",
    "rate": "Samples/s",
    "speed_up": "Against BP",
    "speed_up_one": "Against one process",
    "slow_down": "Slow-down",
    "floor": "Floor",
    "memory": "Peak memory, MiB",
    "memory_stage": "Largest stage, MiB",
    "gradient": "Gradient difference",
    "gradient_0": "Stage 0",
    "gradient_1": "Stage 1",
    "gradient_2": "Stage 2",
    "gradient_highest": "Highest rate",
    "gradient_lowest": "Lowest rate",
}
"""Of the columns."""


UNITS: Mapping[Column, tuple[float, int, str]] = {
    "loss": (1.0, 3, ""),
    "accuracy": (100.0, 2, "%"),
    "best": (100.0, 2, "%"),
    "rate": (1.0, 0, ""),
    "speed_up": (1.0, 2, "x"),
    "speed_up_one": (1.0, 2, "x"),
    "slow_down": (100.0, 1, "%"),
    "floor": (100.0, 1, "%"),
    "memory": (2.0**-20, 1, ""),
    "memory_stage": (2.0**-20, 1, ""),
    "gradient": (1.0, 3, ""),
    "gradient_0": (1.0, 3, ""),
    "gradient_1": (1.0, 3, ""),
    "gradient_2": (1.0, 3, ""),
    "gradient_highest": (1.0, 3, ""),
    "gradient_lowest": (1.0, 3, ""),
}
"""Of a number in the table: factor, digits after the point, and what stands behind it."""


def headings(columns: Sequence[Column]) -> list[str]:
    """Of a table."""
    return ["Part", "Method", *(HEADS[column] for column in columns), "Seeds"]


def used_columns(columns: Sequence[Column], rows: Sequence[Row]) -> list[Column]:
    """Those that some row has a number for."""
    return [column for column in columns if any(row.get(f"{column}_mean") for row in rows)]


def cell(row: Row, column: Column) -> str:
    """Mean and sample deviation over seeds; a dash where there is no number."""
    mean, spread = row.get(f"{column}_mean", ""), row.get(f"{column}_std", "")
    if not mean:
        return "-"
    scale, digits, unit = UNITS[column]
    text = f"{scale * float(mean):.{digits}f}"
    return f"{text}{unit}" if not spread else f"{text} ± {scale * float(spread):.{digits}f}{unit}"


def markdown_table(columns: Sequence[Column], rows: Sequence[Row]) -> str:
    """Of an experiment, as Markdown."""
    used = used_columns(columns, rows)
    head = headings(used)
    lines = [head, ["---", "---", *("---:" for _ in used), "---:"]]
    lines += [[row["part"], row["title"], *(cell(row, column) for column in used), row["seeds"]] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"
