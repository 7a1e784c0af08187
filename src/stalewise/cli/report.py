"""`stalewise report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from stalewise.report import write_report

__all__ = ["report"]


def report(run: Annotated[Path, typer.Argument(help="Folder of a run that ended, or was stopped.")]) -> None:
    """Write the report of a run anew, of as much as there is."""
    print(f"report: {write_report(run)}")
