"""`stalewise compare`."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Annotated

import typer

from stalewise.experiments.compare import compare as run_comparison
from stalewise.experiments.comparison import BASELINES, ComparisonConfig
from stalewise.experiments.comparison_display import JsonLines, TextLines
from stalewise.experiments.comparison_options import parse_accuracy, parse_names, parse_row_options
from stalewise.experiments.config import SCHEDULES, TrainConfig, parse_numbers
from stalewise.experiments.straggler_options import STRAGGLER_HELP, parse_stragglers
from stalewise.methods import METHOD_NAMES

__all__ = ["compare"]

Text = str | None
_METHODS = f"Rows, of {', '.join(METHOD_NAMES)}; NAME=METHOD for a second row of a method."


def compare(
    methods: Annotated[str, typer.Option(help=_METHODS)] = "bp,gpipe,1f1b,ddg,fr,pipedream,dsp",
    option: Annotated[
        list[str] | None,
        typer.Option(help="Of a row: gpipe:micro_batches=8, deep:staleness=6,3,0; repeat it."),
    ] = None,
    baselines: Annotated[str, typer.Option(help=f"Of {', '.join(BASELINES)}; or none.")] = ",".join(BASELINES),
    seeds: Annotated[int, typer.Option(help="Runs of each row, with seeds 0, 1, ..")] = 1,
    model: Annotated[str, typer.Option(help="As for train.")] = "resnet20",
    data: Annotated[str, typer.Option(help="As for train.")] = "digits",
    data_dir: Annotated[Text, typer.Option(help="Where the files of cifar10 or cifar100 are; else downloaded.")] = None,
    stages: Annotated[int, typer.Option(help="Stages that the model is cut into, a process each.")] = 3,
    epochs: Annotated[int, typer.Option(help="Passes over the training set.")] = 10,
    batch_size: Annotated[int, typer.Option(help="Samples per batch.")] = 64,
    lr: Annotated[float, typer.Option(help="Peak learning rate of SGD.")] = 0.1,
    momentum: Annotated[float, typer.Option(help="Momentum of SGD.")] = 0.9,
    nesterov: Annotated[bool, typer.Option(help="Nesterov's form of momentum.")] = False,
    weight_decay: Annotated[float, typer.Option(help="Weight decay of SGD.")] = 5e-4,
    lr_schedule: Annotated[str, typer.Option(help=f"One of {', '.join(SCHEDULES)}.")] = "onecycle",
    clip_grad_norm: Annotated[float | None, typer.Option(help="Largest gradient norm of each stage.")] = None,
    partition: Annotated[
        str, typer.Option(help="profile: measure once and cut evenly for all rows; or the cuts, such as 4,8.")
    ] = "profile",
    engine: Annotated[str, typer.Option(help="distributed, or sequential: the accuracies alone.")] = "distributed",
    device: Annotated[str, typer.Option(help="auto, cpu, or cuda:0.")] = "auto",
    threads: Annotated[int | None, typer.Option(help="Threads per stage; default: cores over stages.")] = None,
    channels_last: Annotated[
        bool, typer.Option(help="Channels last in memory, which convolutions compute quicker.")
    ] = True,
    autocast: Annotated[Text, typer.Option(help="As for train.")] = None,
    compile: Annotated[bool, typer.Option("--compile", help="As for train; the baselines, too.")] = False,
    augment: Annotated[bool, typer.Option(help="Crop and mirror the training images at random.")] = True,
    loader_workers: Annotated[int, typer.Option(help="Processes that prepare batches.")] = 0,
    train_limit: Annotated[int | None, typer.Option(help="Use only the first so many training samples.")] = None,
    test_limit: Annotated[int | None, typer.Option(help="Use only the first so many test samples.")] = None,
    evaluate_every: Annotated[int, typer.Option(help="Epochs between evaluations.")] = 1,
    gradient_difference_every: Annotated[
        int | None, typer.Option(help="Batches between measurements of the gradient difference; slows the runs.")
    ] = None,
    target_accuracy: Annotated[
        Text, typer.Option(help="92% or 0.92, for the time to it; default: 0.95 times the worst final accuracy.")
    ] = None,
    recv_timeout: Annotated[
        float | None, typer.Option(help="Seconds a stage waits for one message; default: by the steps' times.")
    ] = None,
    straggler: Annotated[list[str] | None, typer.Option(help=STRAGGLER_HELP)] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder; one of the same comparison goes on. Default: runs/compare-..")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Delete an older comparison in the folder.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON lines.")] = False,
) -> None:
    """Train with several methods one after another, and write one table and one report of all.

    Interrupted, the same command with the same --out goes on with what is missing. A run that fails is a row that
    says why; the exit code is then 1.

    Example: stalewise compare --methods bp,gpipe,pipedream,dsp --model resnet20 --data digits --seeds 3 --out compared
    """
    shared = TrainConfig(
        model=model,
        data=data,
        data_dir=data_dir,
        method="bp",
        stages=stages,
        epochs=epochs,
        batch_size=batch_size,
        lr=lr,
        momentum=momentum,
        nesterov=nesterov,
        weight_decay=weight_decay,
        lr_schedule=lr_schedule,
        clip_grad_norm=clip_grad_norm,
        partition="profile" if partition == "profile" else parse_numbers(partition, "--partition") or "profile",
        engine=engine,
        device=device,
        threads=threads,
        channels_last=channels_last,
        autocast=autocast,
        compile=compile,
        augment=augment,
        loader_workers=loader_workers,
        train_limit=train_limit,
        test_limit=test_limit,
        evaluate_every=evaluate_every,
        recv_timeout_s=recv_timeout,
        display="quiet",
        measure_memory=True,
        gradient_difference_every=gradient_difference_every,
        stragglers=parse_stragglers(straggler or []),
    )
    names = (Path(part.replace(":", "-")).name for part in (model, data))
    config = ComparisonConfig(
        methods=parse_names(methods),
        options=parse_row_options(option or []),
        baselines=parse_names(baselines),
        seeds=seeds,
        shared=shared,
    )
    comparison = run_comparison(
        config,
        out or Path("runs") / f"compare-{'-'.join(names)}-{datetime.datetime.now():%Y%m%d-%H%M%S}",
        overwrite=overwrite,
        target_accuracy=parse_accuracy(target_accuracy),
        display=JsonLines() if json else TextLines(),
    )
    if any(row.failures for row in comparison.rows):
        raise typer.Exit(1)
