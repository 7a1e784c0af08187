"""`stalewise evaluate`."""

from __future__ import annotations

import json as json_module
from pathlib import Path
from typing import Annotated

import typer

from stalewise.experiments.evaluation import evaluate_run

__all__ = ["evaluate"]


def evaluate(
    run: Annotated[Path, typer.Argument(help="Folder that `stalewise train` left.")],
    data: Annotated[str | None, typer.Option(help="Other data than the run's; see train.")] = None,
    batch_size: Annotated[int, typer.Option(help="Samples per batch.", min=1)] = 256,
    json: Annotated[bool, typer.Option("--json", help="Print a JSON object.")] = False,
) -> None:
    """Evaluate the model of a run on its test set, in one process."""
    result = evaluate_run(run, data=data, batch_size=batch_size)
    if json:
        print(json_module.dumps(result))
    else:
        print(f"test accuracy {100 * result['test_accuracy']:.2f}% on {result['samples']} samples of {result['data']}")
