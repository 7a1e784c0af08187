"""What all benchmarks print and compute: the machine, and medians with their spread."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Sequence

import torch

import stalewise
from stalewise.experiments.environment import processor_name


def machine() -> str:
    """Hardware and versions in a line."""
    return (
        f"{processor_name()}, {os.cpu_count()} cores; Python {platform.python_version()}, torch {torch.__version__}, "
        f"stalewise {stalewise.__version__}"
    )


def spread(values: Sequence[float], digits: int = 3) -> str:
    """Median, minimum and maximum as text."""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} .. {max(values):.{digits}f})"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns."""
    lines = [list(head), *map(list, rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)
