"""`stalewise train`."""

from __future__ import annotations

import datetime
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from stalewise.cli.recipes import use_recipe
from stalewise.cli.resumed import begin_at, given_options, resumed_config, resumed_folder
from stalewise.cli.stopped import says_how_to_go_on
from stalewise.errors import ConfigError
from stalewise.experiments.config import (
    DISPLAYS,
    ON_NAN,
    SCHEDULES,
    TrainConfig,
    parse_fractions,
    parse_numbers,
    parse_options,
    parse_staleness,
)
from stalewise.experiments.replay import replayed_config
from stalewise.experiments.run_lock import locked_folder
from stalewise.experiments.run_writer import prepare_run_folder
from stalewise.experiments.straggler_options import STRAGGLER_HELP, parse_stragglers
from stalewise.experiments.training import run
from stalewise.methods import METHOD_NAMES
from stalewise.models import available_models
from stalewise.runtime.job import in_launched_job

__all__ = ["train"]

Text = str | None
_MODELS = f"{', '.join(available_models()[:6])}, .. or module:function of your own."


def train(
    context: typer.Context,
    recipe: Annotated[
        Text,
        typer.Option(
            callback=use_recipe, is_eager=True, help="Settings by name, see `stalewise recipes`; others count more."
        ),
    ] = None,
    model: Annotated[str, typer.Option(help=_MODELS)] = "resnet20",
    data: Annotated[
        str, typer.Option(help="digits, cifar10, cifar100, imagenet, or the path of images or parquet files.")
    ] = "digits",
    data_dir: Annotated[Text, typer.Option(help="Where the files of cifar10 or cifar100 are; else downloaded.")] = None,
    stages: Annotated[int, typer.Option(help="Stages that the model is cut into, a process each.")] = 3,
    method: Annotated[str, typer.Option(help=f"One of {', '.join(METHOD_NAMES)}.")] = "dsp",
    queue: Annotated[Text, typer.Option(help="DSP: slack of each activation queue in batches, such as 1,1,0.")] = None,
    staleness: Annotated[
        Text,
        typer.Option(
            help="DSP: batches between forward and backward of each stage, such as 4,2,0; or auto, the least that the "
            "measured jitter allows."
        ),
    ] = None,
    option: Annotated[
        list[str] | None, typer.Option(help="Of the method, such as micro_batches=8 or activations=stored; repeat it.")
    ] = None,
    epochs: Annotated[int, typer.Option(help="Passes over the training set.")] = 10,
    batch_size: Annotated[int, typer.Option(help="Samples per batch.")] = 64,
    lr: Annotated[float, typer.Option(help="Peak learning rate of SGD.")] = 0.1,
    momentum: Annotated[float, typer.Option(help="Momentum of SGD.")] = 0.9,
    nesterov: Annotated[bool, typer.Option(help="Nesterov's form of momentum.")] = False,
    weight_decay: Annotated[float, typer.Option(help="Weight decay of SGD.")] = 5e-4,
    lr_schedule: Annotated[
        str, typer.Option(help=f"One of {', '.join(SCHEDULES)}; stepped every update.")
    ] = "onecycle",
    lr_milestones: Annotated[
        str, typer.Option(help="For step: parts of the run after which the rate falls to a tenth.")
    ] = "0.5,0.75",
    clip_grad_norm: Annotated[float | None, typer.Option(help="Largest gradient norm of each stage.")] = None,
    partition: Annotated[
        str,
        typer.Option(help="profile: measure and cut evenly; or the first layers of stages 1.., such as 4,8."),
    ] = "profile",
    memory_limit: Annotated[
        Text,
        typer.Option(help="That a stage may hold, such as 2GiB; with --option activations=auto it may store graphs."),
    ] = None,
    engine: Annotated[
        str, typer.Option(help="distributed: a process per stage; sequential: one process, the same numbers.")
    ] = "distributed",
    device: Annotated[str, typer.Option(help="auto, cpu, or cuda:0.")] = "auto",
    threads: Annotated[int | None, typer.Option(help="Threads per stage; default: cores over stages.")] = None,
    seed: Annotated[int, typer.Option(help="Of weights, data order, augmentation and random layers.")] = 0,
    channels_last: Annotated[
        bool, typer.Option(help="Channels last in memory, which convolutions compute quicker.")
    ] = True,
    autocast: Annotated[
        Text, typer.Option(help="bfloat16: compute passes under autocast; weights stay in float32.")
    ] = None,
    compile: Annotated[
        bool,
        typer.Option("--compile", help="Compile the layers of each stage; the first steps take long."),
    ] = False,
    augment: Annotated[bool, typer.Option(help="Crop and mirror the training images at random.")] = True,
    loader_workers: Annotated[int, typer.Option(help="Processes that prepare batches.")] = 0,
    train_limit: Annotated[int | None, typer.Option(help="Use only the first so many training samples.")] = None,
    test_limit: Annotated[int | None, typer.Option(help="Use only the first so many test samples.")] = None,
    evaluate_every: Annotated[
        int, typer.Option(help="Epochs between evaluations; the pipeline is drained for each.")
    ] = 1,
    recv_timeout: Annotated[
        float | None, typer.Option(help="Seconds a stage waits for one message; default: by the steps' times.")
    ] = None,
    straggler: Annotated[list[str] | None, typer.Option(help=STRAGGLER_HELP)] = None,
    replay: Annotated[
        Path | None,
        typer.Option(
            help="Repeat the elastic run in this folder bitwise: as configured, in the order that it took. Of other "
            "options only --engine, --straggler, --out and --display count."
        ),
    ] = None,
    measure_memory: Annotated[
        bool, typer.Option("--measure-memory", help="Keep what every stage holds at most in the summary.")
    ] = False,
    gradient_difference_every: Annotated[
        int | None,
        typer.Option(help="Measure each stage's distance from the gradient of backpropagation every so many batches."),
    ] = None,
    on_nan: Annotated[
        str,
        typer.Option(
            help=f"Of a batch whose loss is NaN or infinite: {', '.join(ON_NAN)}; stop saves it in the run folder."
        ),
    ] = "stop",
    out: Annotated[Path | None, typer.Option(help="Run folder; default: runs/MODEL-DATA-METHOD-TIME.")] = None,
    checkpoint_every: Annotated[
        int | None, typer.Option(help="Save everything every so many batches, into checkpoints/ of the run folder.")
    ] = None,
    keep: Annotated[int, typer.Option(help="How many of the newest checkpoints stay.")] = 3,
    resume: Annotated[
        Path | None,
        typer.Option(
            help="Go on with the run in this folder from its newest checkpoint (or from this checkpoint of it), as it "
            "was configured; of other options only those of the pipeline may be given."
        ),
    ] = None,
    max_restarts: Annotated[
        int, typer.Option(help="Start again from the newest checkpoint so often after a stage failed.", min=0)
    ] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Delete an older run in the folder.")] = False,
    display: Annotated[str, typer.Option(help=f"One of {', '.join(DISPLAYS)}.")] = "auto",
    json: Annotated[bool, typer.Option("--json", help="Print JSON lines; the same as --display json.")] = False,
) -> None:
    """Train a network with its stages in processes of their own, and leave a run folder with a report.

    Example: stalewise train --model resnet20 --data digits --stages 3 --method dsp --queue 1,1,0 --staleness 4,2,0
    """
    if in_launched_job():
        raise ConfigError(
            "train starts the processes of its stages itself; call it once, without torchrun. For several hosts write "
            "a script with stalewise.Pipeline."
        )
    cuts = "profile" if partition == "profile" else parse_numbers(partition, "--partition")
    values: dict[str, Any] = {
        "model": model,
        "data": data,
        "data_dir": data_dir,
        "method": method,
        "stages": stages,
        "queue": parse_numbers(queue, "--queue"),
        "staleness": parse_staleness(staleness),
        "options": parse_options(option or []),
        "epochs": epochs,
        "batch_size": batch_size,
        "lr": lr,
        "momentum": momentum,
        "nesterov": nesterov,
        "weight_decay": weight_decay,
        "lr_schedule": lr_schedule,
        "lr_milestones": parse_fractions(lr_milestones, "--lr-milestones"),
        "clip_grad_norm": clip_grad_norm,
        "partition": cuts or "profile",
        "memory_limit": memory_limit,
        "engine": engine,
        "device": device,
        "threads": threads,
        "seed": seed,
        "channels_last": channels_last,
        "autocast": autocast,
        "compile": compile,
        "augment": augment,
        "loader_workers": loader_workers,
        "train_limit": train_limit,
        "test_limit": test_limit,
        "evaluate_every": evaluate_every,
        "recv_timeout_s": recv_timeout,
        "measure_memory": measure_memory,
        "gradient_difference_every": gradient_difference_every,
        "display": "json" if json else display,
        "stragglers": parse_stragglers(straggler or []),
        "checkpoint_every": checkpoint_every,
        "keep": keep,
        "on_nan": on_nan,
    }
    if resume is not None:
        given = given_options(context)
        folder, checkpoint = resumed_folder(resume)
        resumed = resumed_config(folder, {name: values.get(name) for name in given})
        with locked_folder(folder), says_how_to_go_on(folder):
            begin_at(checkpoint)
            run(resumed, folder, resume=True, max_restarts=max_restarts)
        return
    if replay is not None:
        repeated = replayed_config(replay, engine=engine, display=values["display"])
        config = replace(repeated, stragglers=values["stragglers"])
    else:
        config = TrainConfig(**values)
    folder = out or _default_folder(config)
    with locked_folder(folder), says_how_to_go_on(folder):
        prepare_run_folder(folder, overwrite=overwrite)
        run(config, folder, max_restarts=max_restarts)


def _default_folder(config: TrainConfig) -> Path:
    name = "-".join(Path(part.replace(":", "-")).name for part in (config.model, config.data, config.method))
    return Path("runs") / f"{name}-{datetime.datetime.now():%Y%m%d-%H%M%S}"
