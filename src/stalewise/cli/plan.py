"""`stalewise plan`."""

from __future__ import annotations

import json as json_module
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.bar import Bar
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from stalewise.experiments.config import TrainConfig, parse_numbers, parse_options, parse_staleness
from stalewise.experiments.link_options import parse_bandwidth, parse_seconds
from stalewise.experiments.profiling import profile_run
from stalewise.experiments.run_method import run_method
from stalewise.experiments.run_plan import PlannedRun, plan_run
from stalewise.experiments.run_speeds import read_run_speeds
from stalewise.methods import DSP, METHOD_NAMES
from stalewise.plan.planner import Link
from stalewise.planning import parse_bytes

__all__ = ["plan"]

KEPT = {"recompute": "input", "stored": "graph", None: "-"}


def plan(
    model: Annotated[str, typer.Option(help="As for train.")] = "resnet20",
    data: Annotated[str, typer.Option(help="As for train.")] = "digits",
    data_dir: Annotated[str | None, typer.Option(help="As for train.")] = None,
    stages: Annotated[int, typer.Option(help="Stages, a process each.")] = 3,
    method: Annotated[str, typer.Option(help=f"One of {', '.join(METHOD_NAMES)}.")] = "dsp",
    staleness: Annotated[
        str | None, typer.Option(help="DSP: staleness of each stage, such as 4,2,0; or auto, as for train.")
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option(help="Of the method; DSP's activations are left to the plan unless they are given."),
    ] = None,
    memory_limit: Annotated[
        str | None, typer.Option(help="That a stage may hold between its actions, such as 500MB or 2GiB.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Samples per batch.")] = 64,
    partition: Annotated[str, typer.Option(help="profile: the best cuts; or given ones, such as 4,8.")] = "profile",
    bandwidth: Annotated[
        str | None, typer.Option(help="Of the links, such as 1Gbit/s or 10GB/s; default: measured here.")
    ] = None,
    latency: Annotated[str | None, typer.Option(help="Of the links, such as 20ms; default: measured here.")] = None,
    run: Annotated[
        Path | None,
        typer.Option("--from", help="A run folder: plan again for the speeds that its stages turned out to have."),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, or cuda:0.")] = "auto",
    threads: Annotated[int | None, typer.Option(help="Threads per stage; default: cores over stages.")] = None,
    channels_last: Annotated[bool, typer.Option(help="As for train.")] = True,
    autocast: Annotated[str | None, typer.Option(help="As for train.")] = None,
    refresh: Annotated[bool, typer.Option("--refresh", help="Measure again, whatever is in the cache.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print a JSON object.")] = False,
) -> None:
    """Measure a model once, and say where to cut it, what each stage should keep, and how fast it will be.

    Example: stalewise plan --model resnet56 --stages 3 --memory-limit 200MB
    """
    options = parse_options(option or [])
    if run is not None:
        config = TrainConfig.read(run / "config.json")
        if staleness is not None:
            config = replace(config, staleness=parse_staleness(staleness), queue=None, partition="profile")
    else:
        if method == "dsp":
            options.setdefault("activations", "auto")
        config = TrainConfig(
            model=model,
            data=data,
            data_dir=data_dir,
            method=method,
            stages=stages,
            staleness=parse_staleness(staleness),
            options=options,
            batch_size=batch_size,
            device=device,
            threads=threads,
            channels_last=channels_last,
            autocast=autocast,
        )
    profile, path, measured = profile_run(config, refresh=refresh)
    link = Link(
        bytes_per_s=profile.link_bytes_per_s if bandwidth is None else parse_bandwidth(bandwidth),
        latency_s=profile.link_latency_s if latency is None else parse_seconds(latency),
    )
    limit = None if memory_limit is None else parse_bytes(memory_limit)
    speeds = None if run is None else read_run_speeds(run, profile)
    planned = plan_run(
        profile,
        config.build_method(),
        memory_limit=limit,
        link=link,
        slowdowns=None if speeds is None else speeds.slowdowns,
        jitter=None if speeds is None else speeds.jitter,
        cuts=None if partition == "profile" else parse_numbers(partition, "--partition"),
    )
    before = None
    if run is not None and speeds is not None:
        went = run_method(run, TrainConfig.read(run / "config.json"))
        before = plan_run(profile, went, link=link, slowdowns=speeds.slowdowns, cuts=speeds.cuts)
    if json:
        described = planned.as_dict()
        if before is not None:
            described["before"] = before.as_dict()
        print(json_module.dumps(described))
        return
    console = Console(highlight=False, soft_wrap=True)
    console.print(f"profile {'measured now, kept' if measured else 'from the cache'} in {path}", style="dim")
    console.print(_drawn(planned))
    console.print(_in_words(planned, before))
    console.print(f"to train so: {_command(config, planned)}")


def _drawn(planned: PlannedRun) -> Group:
    """The stages as a table with a bar each."""
    table = Table(box=None, pad_edge=False)
    for head in ("stage", "layers", "keeps", "F ms", "R ms", "B ms", "busy", "MiB", ""):
        table.add_column(head, justify="left" if head in ("keeps", "") else "right", no_wrap=True)
    slowest = max((busy or 0.0) for busy in planned.plan.stage_s)
    for index, cost in enumerate(planned.plan.partition.stages):
        slowdown = planned.plan.slowdowns[index]
        busy = planned.plan.stage_s[index] or 0.0
        times = (cost.forward_s, cost.recompute_s, cost.backward_s)
        memory = None if planned.plan.memory is None else planned.plan.memory[index].total
        table.add_row(
            f"{index}" if slowdown == 1 else f"{index} (x{slowdown:.2f})",
            f"{cost.start}-{cost.end - 1}",
            KEPT[planned.plan.activations[index]],
            *(f"{1e3 * (time or 0.0) * slowdown:.1f}" for time in times),
            f"{planned.utilisation[index]:.0%}",
            "?" if memory is None else f"{memory / 2**20:,.1f}",
            Bar(slowest or 1.0, 0, busy, width=20, color="cyan" if busy < slowest else "magenta"),
        )
    return Group(table)


def _in_words(planned: PlannedRun, before: PlannedRun | None) -> Text:
    """What is to be expected."""
    samples = planned.profile.batch_size / planned.step_s if planned.step_s else 0.0
    lines = [
        f"step: {1e3 * planned.step_s:.1f} ms predicted, {samples:,.0f} samples/s; the pace is set by {planned.pace}",
        *([] if planned.plan.depth is None else [planned.plan.depth.why()]),
        *planned.advice(),
    ]
    if before is not None:
        gain = before.step_s / planned.step_s if planned.step_s else 1.0
        lines.append(
            f"cuts {before.plan.partition.cuts} of the run: {1e3 * before.step_s:.1f} ms predicted at the speeds that "
            f"its stages showed; cuts {planned.plan.partition.cuts} gain {gain - 1:.0%}"
        )
    return Text("\n".join(lines))


def _command(config: TrainConfig, planned: PlannedRun) -> str:
    """What runs the plan."""
    method = planned.plan.method
    options = {**config.options}
    if isinstance(method, DSP):
        kept = method.activations
        options["activations"] = kept if isinstance(kept, str) else list(kept)
    words = ["stalewise", "train", "--model", config.model, "--data", config.data, "--stages", str(config.stages)]
    words += ["--method", config.method, "--batch-size", str(config.batch_size)]
    if config.staleness is not None:
        words += ["--staleness", ",".join(map(str, method.staleness))]
    for name, value in options.items():
        words += ["--option", f"{name}={value if isinstance(value, str) else json_module.dumps(value)}"]
    if config.autocast is not None:
        words += ["--autocast", config.autocast]
    if planned.plan.partition.cuts:
        words += ["--partition", ",".join(map(str, planned.plan.partition.cuts))]
    return shlex.join(words)
