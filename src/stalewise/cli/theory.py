"""`stalewise theory`."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from stalewise.errors import ConfigError
from stalewise.experiments.config import parse_numbers
from stalewise.protocol.staleness import Staleness
from stalewise.theory import (
    PREDICTED,
    SineChain,
    closed_form_limit,
    observe_rate,
    proven_condition,
    quoted_condition,
    stability_limit,
)

__all__ = ["theory"]

theory = typer.Typer(help="What theory says of stale training; see docs/theory.md.", no_args_is_help=True)


@theory.callback()
def _theory() -> None:
    """What theory says of stale training; see docs/theory.md."""


@theory.command()
def lr(
    staleness: Annotated[str, typer.Option(help="Of each stage, in batches, such as 4,2,0.")] = "4,2,0",
    momentum: Annotated[float, typer.Option(help="beta, at least 0 and below 1.")] = 0.9,
    lipschitz: Annotated[float, typer.Option(help="L, of the gradient and of the partial models' Jacobians.")] = 1.0,
    error_bound: Annotated[float, typer.Option(help="M, of the error gradients.")] = 1.0,
    curvature: Annotated[float, typer.Option(help="a, the largest eigenvalue of the quadratic.")] = 1.0,
) -> None:
    """Print which learning rates are proven to converge, and the exact limits on a quadratic.

    Example: stalewise theory lr --staleness 4,2,0 --momentum 0.9
    """
    if not 0 < curvature < math.inf:
        raise ConfigError(f"--curvature is {curvature!r}; it must be a finite number above 0.")
    depths = Staleness(parse_numbers(staleness, "--staleness") or ())
    forms = [
        ("SGD", None, 0.0),
        (f"heavy ball, {momentum:g}", momentum, 0.0),
        (f"Nesterov, {momentum:g}", momentum, 1.0),
    ]
    console = Console(highlight=False)
    console.print(f"Proven to converge to critical points, alpha up to (L = {lipschitz:g}, M = {error_bound:g})")
    bounds = Table()
    for head in ("optimizer", "proven here", "quoted"):
        bounds.add_column(head, justify="left" if head == "optimizer" else "right")
    for name, beta, s in forms:
        found = [
            condition(depths, lipschitz=lipschitz, error_bound=error_bound, momentum=beta, s=s).learning_rate
            for condition in (proven_condition, quoted_condition)
        ]
        bounds.add_row(name, *(f"{rate:.3e}" for rate in found))
    console.print(bounds)
    console.print(f"Stable on a quadratic of curvature {curvature:g}, alpha below (another question; exact)")
    limits = Table()
    limits.add_column("trained")
    for name, _, _ in forms:
        limits.add_column(name, justify="right")
    together = ", ".join(map(str, range(len(depths))))
    rows = [(f"stage {index} alone, m = {depth}", [depth]) for index, depth in enumerate(depths)]
    for label, trained in [*rows, (f"stages {together}, m = {depths}", list(depths))]:
        cells = [stability_limit(trained, momentum=beta or 0.0, s=s) / curvature for _, beta, s in forms]
        limits.add_row(label, *(f"{cell:.4f}" for cell in cells))
    console.print(limits)
    deepest = depths[0]
    closed = closed_form_limit(deepest) / curvature
    console.print(f"Closed form of stage 0 under SGD, 2 sin(pi / (2 (2m + 1))) / a: {closed:.4f}")


@theory.command()
def rates(
    staleness: Annotated[
        list[str] | None, typer.Option(help="Of each stage, in batches; repeat it. Default: 0,0 and 2,0 and 6,0.")
    ] = None,
    momentum: Annotated[float, typer.Option(help="beta of heavy ball and Nesterov.")] = 0.5,
    updates: Annotated[str, typer.Option(help="Numbers of updates, growing.")] = "1024,2048,4096,8192",
    copies: Annotated[int, typer.Option(help="Of the problem, a multiple of 16.")] = 1024,
    seed: Annotated[int, typer.Option(help="Of the noise.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Also write the table here, as CSV.")] = None,
) -> None:
    """Train a problem with known constants, and fit how fast the mean squared gradient falls with the updates.

    Takes some minutes. Example: stalewise theory rates --staleness 0,0 --staleness 2,0
    """
    counts = parse_numbers(updates, "--updates") or ()
    head = ["optimizer", "staleness", "step sizes", "exponent", "low", "high", "predicted", "of bound", "noiseless"]
    rows = []
    settings = [Staleness(parse_numbers(text, "--staleness") or ()) for text in staleness or ["0,0", "2,0", "6,0"]]
    for depths in settings:
        # Said now, not after minutes with SGD, which has no momentum.
        proven_condition(depths, lipschitz=1.0, error_bound=1.0, momentum=momentum)
    print("  ".join(cell.ljust(14) for cell in head).rstrip())
    for depths in settings:
        problem = SineChain(num_stages=len(depths))
        for name, beta, s in (("SGD", None, 0.0), ("heavy ball", momentum, 0.0), ("Nesterov", momentum, 1.0)):
            for steps, predicted in PREDICTED.items():
                seen = observe_rate(
                    problem, depths, steps=steps, updates=counts, copies=copies, seed=seed, momentum=beta, s=s
                )
                label = name if beta is None else f"{name} {beta:g}"
                worst = max(mean / promise for mean, promise in zip(seen.means, seen.promises, strict=True))
                numbers = [seen.exponent, seen.low, seen.high, predicted, worst, max(seen.noiseless)]
                rows.append([label, str(depths), steps, *(f"{number:.3f}" for number in numbers)])
                print("  ".join(cell.ljust(14) for cell in rows[-1]).rstrip(), flush=True)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        with out.open("w", encoding="utf-8", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([head, *rows])
