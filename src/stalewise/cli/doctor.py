"""`stalewise doctor`."""

from __future__ import annotations

import typer
from rich.console import Console
from rich.table import Table

from stalewise.experiments.diagnosis import diagnose

__all__ = ["doctor"]


def doctor(
    stages: int = typer.Option(3, help="Stages that you mean to run here.", min=1),
    json: bool = typer.Option(False, "--json", help="Print a JSON object."),
) -> None:
    """Say what this machine can run, and what would hurt."""
    findings = diagnose(stages)
    if json:
        import json as json_module

        print(json_module.dumps([finding.as_dict() for finding in findings]))
    else:
        table = Table(box=None, pad_edge=False, show_header=False)
        marks = {"ok": "[green]ok[/]", "note": "[yellow]note[/]", "problem": "[red]problem[/]"}
        for finding in findings:
            table.add_row(marks[finding.level], finding.subject, finding.text)
        Console(highlight=False).print(table)
    if any(finding.level == "problem" for finding in findings):
        raise typer.Exit(1)
