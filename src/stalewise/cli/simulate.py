"""`stalewise simulate`."""

from __future__ import annotations

import json as json_module
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer

from stalewise.errors import ConfigError
from stalewise.experiments.config import parse_numbers, parse_options
from stalewise.experiments.run_lock import locked_folder
from stalewise.experiments.run_writer import prepare_run_folder
from stalewise.experiments.simulation import MeasuredRun, link_cost, read_run, write_simulation
from stalewise.experiments.simulation_output import simulation_text
from stalewise.experiments.straggler_options import STRAGGLER_HELP, parse_stragglers
from stalewise.experiments.time_options import typed_costs
from stalewise.methods import METHOD_NAMES, Method, build_method
from stalewise.protocol.stragglers import Stragglers
from stalewise.timing import Links
from stalewise.timing import simulate as simulate_program
from stalewise.timing.draws import jittered

__all__ = ["simulate"]

Text = str | None


def simulate(
    method: Annotated[Text, typer.Option(help=f"One of {', '.join(METHOD_NAMES)}; default: dsp, or the run's.")] = None,
    stages: Annotated[
        int | None, typer.Option(help="Number of stages; default: as --staleness or the run says, else 3.")
    ] = None,
    queue: Annotated[Text, typer.Option(help="DSP: slack of each activation queue, such as 1,1,0.")] = None,
    staleness: Annotated[Text, typer.Option(help="DSP: staleness of each stage, such as 4,2,0.")] = None,
    option: Annotated[list[str] | None, typer.Option(help="Of the method, as for train; repeat it.")] = None,
    batches: Annotated[int, typer.Option(help="Batches before the drain.", min=1)] = 1000,
    forward_ms: Annotated[str, typer.Option(help="Of a batch on each stage: one number, or one per stage.")] = "1",
    recompute_ms: Annotated[Text, typer.Option(help="Default: as the forward.")] = None,
    backward_ms: Annotated[Text, typer.Option(help="Default: twice the forward.")] = None,
    update_ms: Annotated[str, typer.Option(help="Of an update of the weights.")] = "0",
    run: Annotated[
        Path | None, typer.Option("--from", help="Folder of a run: its method, measured costs and latencies.")
    ] = None,
    resample: Annotated[
        bool, typer.Option(help="With --from: each step takes a measured one's costs, not the mean.")
    ] = False,
    jitter: Annotated[
        float,
        typer.Option(help="Steps vary at random: standard deviation over mean, log-normal, 0.2 for example.", min=0),
    ] = 0.0,
    latency_ms: Annotated[float | None, typer.Option(help="Of every message.")] = None,
    gbit_per_s: Annotated[float | None, typer.Option(help="Bandwidth of each direction of each link.")] = None,
    message_mib: Annotated[float, typer.Option(help="Size of a batch's activation, and of its gradient.")] = 0.0,
    straggler: Annotated[list[str] | None, typer.Option(help=STRAGGLER_HELP)] = None,
    replicas: Annotated[int, typer.Option(help="Independent draws, where something is random.", min=1)] = 1,
    seed: Annotated[int, typer.Option(help="Of resampled and varying steps.", min=0)] = 0,
    out: Annotated[Path | None, typer.Option(help="Folder for timeline, trace and picture.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Delete an older simulation in the folder.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print a JSON object.")] = False,
) -> None:
    """Say how fast a method would be, and which stage or cycle of stages sets its pace.

    Example: stalewise simulate --method dsp --staleness 4,2,0 --forward-ms 10,12,9 --straggler probability=1/3,factor=2
    --replicas 32
    """
    measured = None if run is None else read_run(run)
    built = _method(measured, method, stages, queue, staleness, option)
    if measured is None:
        costs, links = typed_costs(built, forward_ms, recompute_ms, backward_ms, update_ms), None
    else:
        costs, links = measured.costs_for(built, resample=resample), measured.measured.links
    if jitter:
        costs = jittered(costs, jitter, seed=seed)
    if latency_ms is not None or gbit_per_s is not None or message_mib:
        cost = link_cost(latency_ms=latency_ms or 0.0, gbit_per_s=gbit_per_s, message_mib=message_mib)
        links = Links.equal(built.num_stages, cost)
    with ExitStack() as stack:
        if out is not None:
            stack.enter_context(locked_folder(out))
            prepare_run_folder(out, overwrite=overwrite, mark="simulation.json")
        outcome = simulate_program(
            built.program(),
            costs,
            links,
            num_batches=batches,
            stragglers=Stragglers(parse_stragglers(straggler or [])),
            replicas=replicas,
            seed=seed,
            record_actions=out is not None,
        )
        settings = {"method": str(built), "batches": batches, "from": None if run is None else str(run)}
        settings |= {"straggler": straggler or [], "replicas": replicas, "seed": seed, "resample": resample}
        settings["jitter"] = jitter
        if out is not None:
            write_simulation(out, outcome, settings, run=measured)
    if json:
        print(json_module.dumps({"settings": settings, "result": outcome.as_dict()}))
    else:
        print(simulation_text(built, outcome, run=measured, out=out))


def _method(
    run: MeasuredRun | None, name: Text, stages: int | None, queue: Text, staleness: Text, option: list[str] | None
) -> Method:
    if run is not None and name is None and stages is None and not (queue or staleness or option):
        return run.method
    depths = parse_numbers(staleness, "--staleness")
    known = len(depths) if depths else run.method.num_stages if run else None
    if stages is not None and known is not None and stages != known:
        raise ConfigError(
            f"--stages is {stages}, and {'--staleness' if depths else 'the run'} has {known}; give one of them, or "
            "the same."
        )
    return build_method(
        name or "dsp",
        num_stages=known or (3 if stages is None else stages),
        queue=parse_numbers(queue, "--queue"),
        staleness=depths,
        **parse_options(option or []),
    )
