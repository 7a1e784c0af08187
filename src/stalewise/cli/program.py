"""`stalewise program`."""

from __future__ import annotations

from typing import Annotated

import typer

from stalewise.experiments.config import parse_numbers, parse_options
from stalewise.methods import METHOD_NAMES, build_method
from stalewise.protocol.validate import check

__all__ = ["program"]


def program(
    method: Annotated[str, typer.Option(help=f"One of {', '.join(METHOD_NAMES)}.")] = "dsp",
    stages: Annotated[int, typer.Option(help="Number of stages.")] = 3,
    queue: Annotated[str | None, typer.Option(help="DSP: slack of each activation queue, such as 1,1,0.")] = None,
    staleness: Annotated[str | None, typer.Option(help="DSP: staleness of each stage, such as 4,2,0.")] = None,
    option: Annotated[
        list[str] | None, typer.Option(help="Of the method, such as micro_batches=8 or activations=stored; repeat it.")
    ] = None,
    batches: Annotated[int, typer.Option(help="Batches after which the pipeline drains.", min=1)] = 5,
    steps: Annotated[int | None, typer.Option(help="Columns; default: to the end of the drain.", min=1)] = None,
    links: Annotated[bool, typer.Option("--links", help="Show what is sent and received, too.")] = False,
) -> None:
    """Print what each stage does in each of its steps, and check it against the rules of stale pipelines."""
    built = build_method(
        method,
        num_stages=stages,
        queue=parse_numbers(queue, "--queue"),
        staleness=parse_numbers(staleness, "--staleness"),
        **parse_options(option or []),
    )
    plan = built.program()
    check(plan)
    print(f"{built}, slack {built.staleness.slack}")
    for index, link in enumerate(built.staleness.links):
        print(f"link {index} -> {index + 1}: {link.value}")
    print()
    print(plan.grid(steps or batches + plan.drain_steps, num_batches=batches, links=links))
