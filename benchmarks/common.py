"""What all benchmarks print, compute and leave: the machine, medians with their spread, verdicts, a JSON file."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

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


def add_out(parser: argparse.ArgumentParser) -> None:
    """The option that `leave` obeys."""
    parser.add_argument("--out", type=Path, help="a JSON file with everything that was measured")


def verdict(target: str, value: float, most: float) -> dict[str, Any]:
    """Say whether a value is at most what it should be; also what a file keeps of it."""
    met = value <= most
    words = "met" if met else f"MISSED by {value - most:.3f}"
    print(f"verdict: {target}: {value:.3f}, target at most {most:.3g}: {words}")
    return {"target": target, "value": value, "most": most, "met": met}


def leave(out: Path | None, options: Mapping[str, Any], results: Any, verdicts: Sequence[dict[str, Any]] = ()) -> None:
    """Write the machine, the options, the results and the verdicts, where a file was asked for."""
    if out is None:
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    record = {
        "machine": machine(),
        "load": os.getloadavg(),
        "options": {name: value for name, value in options.items() if name != "out"},
        "results": results,
        "verdicts": list(verdicts),
    }
    out.write_text(json.dumps(record, indent=1, default=str) + "\n", encoding="utf-8")
