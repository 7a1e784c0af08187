"""Command lines that cannot be obeyed; each is given to the entry point itself, exit code included."""

from __future__ import annotations

import contextlib
import io
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from random import Random
from unittest import mock

from bad_cases import Case, misspelt

from stalewise import ConfigError
from stalewise.cli.main import run

__all__ = ["commands", "obey", "processes"]

TINY = ["--model", "resnet8", "--data", "digits", "--stages", "2"]
RUN = [
    *TINY,
    "--partition",
    "3",
    "--engine",
    "sequential",
    "--train-limit",
    "32",
    "--test-limit",
    "32",
    "--epochs",
    "1",
]
RUN += ["--batch-size", "16", "--threads", "1"]

COUNT = ["0", "-1", "1.5", "x", "", "nan", "1e3", "9" * 30]
REAL = ["-1", "nan", "inf", "x", "", "1,2"]
POSITIVE = [*REAL, "0"]
MISSING = ["/nowhere/at/all", "", "a\0b"[:1] + "/b/c", "x" * 300]
METHOD = {
    "--method": ["dps", "", "DSP!", "bp,dsp", "\u00e9"],
    "--staleness": ["2,4", "1,1", "x", "", "-2,0", "4,2,0,0,0", "1.5,0", "9" * 40 + ",0"],
    "--option": [
        "x",
        "=1",
        "micro_batches",
        "nothing=1",
        "accumulate=0",
        "accumulate=x",
        "elastic=maybe",
        "activations=some",
    ],
}
TRAIN = {
    "--model": ["resnet21", "", "os:path", "nowhere:build", "vgg12", "x:y:z", "resnet" + "9" * 20, ":"],
    "--data": MISSING,
    "--stages": [*COUNT, "99"],
    **METHOD,
    "--queue": ["9,9", "x", "", "-1,0", "1"],
    "--epochs": COUNT,
    "--batch-size": COUNT[:-1],
    "--lr": REAL,
    "--momentum": REAL,
    "--weight-decay": REAL,
    "--lr-schedule": ["linear", ""],
    "--clip-grad-norm": ["0", "-1", "nan", "x", ""],
    "--partition": ["9,1", "x", "0", "99", "1,1", "-1", "1.5"],
    "--device": ["gpu", "", "cuda:99", "cpu:x", "meta:0:1"],
    "--threads": [*COUNT[:-2], "9" * 30],
    "--autocast": ["float8", "", "int4"],
    "--loader-workers": ["-1", "1.5", "x", "", "9" * 9],
    "--train-limit": COUNT[:-1],
    "--test-limit": COUNT[:-1],
    "--evaluate-every": COUNT[:-1],
    "--recv-timeout": POSITIVE,
    "--straggler": ["x", "factor", "factor=x", "factor=2,stages=9", "=", "probability=2", "nothing=1", "pause_s=-1"],
    "--gradient-difference-every": COUNT[:-1],
}
BAD: dict[str, tuple[list[str], dict[str, list[str]]]] = {
    "train": (
        ["train", *RUN, "--display", "quiet", "--out", "a-run", "--overwrite"],
        {
            **TRAIN,
            "--engine": ["auto", "", "gpu"],
            "--seed": ["-1", "1.5", "x", "", "9" * 40],
            "--memory-limit": ["x", "", "-1", "1 parsec", "0"],
            "--lr-milestones": ["x", "", "2", "0.9,0.1", "nan", "0.5,0.5"],
            "--checkpoint-every": COUNT[:-1],
            "--keep": COUNT[:-1],
            "--max-restarts": ["-1", "x", ""],
            "--display": ["loud", ""],
            "--on-nan": ["ignore", "", "STOP"],
            "--recipe": ["nothing", "", "paper/unknown"],
            "--resume": MISSING,
            "--replay": MISSING,
        },
    ),
    "compare": (
        ["compare", "--methods", "bp,dsp", *RUN, "--seeds", "1", "--out", "a-comparison"],
        {
            **{
                name: values
                for name, values in TRAIN.items()
                if name not in ("--method", "--staleness", "--queue", "--option", "--partition", "--data", "--device")
            },
            "--methods": ["", "dps", "bp,,dsp", "bp,bp", ","],
            "--option": ["x", "bp:x", "nothing:accumulate=2", "dsp:nothing=1", "dsp:accumulate=0", ":a=1"],
            "--baselines": ["x", "one", "none,one-process"],
            "--seeds": COUNT[:-2],
            "--target-accuracy": ["x", "nan", "-1", "200"],
        },
    ),
    "program": (
        ["program", "--stages", "3"],
        {
            **METHOD,
            "--stages": [*COUNT[:-2], "1000000"],
            "--queue": ["9,9", "x", "", "1"],
            "--batches": ["-1", "x", ""],
            "--steps": ["0", "-1", "x", ""],
        },
    ),
    "simulate": (
        ["simulate", "--stages", "3"],
        {
            **METHOD,
            "--stages": COUNT[:-2],
            "--batches": COUNT,
            "--forward-ms": ["-1", "x", "", "1,2", "nan", "inf", "1e300"],
            "--backward-ms": ["-1", "x", "", "1,2", "nan"],
            "--update-ms": ["-1", "x", "", "nan"],
            "--latency-ms": REAL,
            "--gbit-per-s": POSITIVE,
            "--replicas": COUNT,
            "--seed": ["-1", "x", "", "9" * 40],
            "--straggler": ["x", "factor=x", "factor=2,stages=9", "="],
            "--from": MISSING,
        },
    ),
    "plan": (
        ["plan", *TINY, "--threads", "1"],
        {
            "--model": TRAIN["--model"],
            "--data": MISSING,
            "--stages": [*COUNT, "99"],
            **METHOD,
            "--memory-limit": ["x", "", "-1", "0"],
            "--batch-size": COUNT[:-1],
            "--bandwidth": ["x", "", "-1", "nan", "0"],
            "--latency": ["x", "", "-1", "nan"],
            "--from": MISSING,
            "--autocast": ["float8", ""],
            "--threads": COUNT[:-1],
        },
    ),
    "theory lr": (
        ["theory", "lr"],
        {
            "--staleness": ["", "x", "-1,0", "1.5"],
            "--momentum": ["1", "-1", "nan", "x"],
            "--lipschitz": POSITIVE,
            "--error-bound": POSITIVE,
            "--curvature": POSITIVE,
        },
    ),
    "theory rates": (
        ["theory", "rates"],
        {
            "--staleness": ["", "x", "2,4"],
            "--momentum": ["1", "-1", "x"],
            "--updates": ["", "x", "5", "9,5"],
            "--copies": ["0", "-1", "x"],
        },
    ),
    "report": (["report", "nowhere"], {}),
    "evaluate": (["evaluate", "nowhere"], {"--batch-size": COUNT, "--data": MISSING}),
    "checkpoint show": (["checkpoint", "show", "nowhere"], {}),
    "checkpoint verify": (["checkpoint", "verify", "nowhere"], {}),
    "checkpoint export": (["checkpoint", "export", "nowhere", "--out", "model.safetensors"], {}),
    "reproduce": (
        ["reproduce", "nothing"],
        {
            "--scale": ["huge", ""],
            "--seeds": COUNT[:-2],
            "--jobs": COUNT[:-2],
            "--part": ["nothing", ""],
            "--data": MISSING,
        },
    ),
    "doctor": (["doctor", "--stages", "0"], {"--stages": ["0", "-1", "x"]}),
    "recipes": (["recipes", "more"], {}),
}
CONTRADICTIONS = [
    ["train", *RUN, "--nesterov", "--momentum", "0"],
    ["train", *RUN, "--memory-limit", "1GiB"],
    ["train", *RUN, "--method", "dni", "--on-nan", "skip"],
    ["train", *RUN, "--staleness", "2,0", "--option", "elastic=true", "--option", "accumulate=2"],
    ["train", *RUN, "--resume", "nowhere", "--lr", "3"],
    ["simulate", "--from", "nowhere", "--forward-ms", "3"],
    ["program", "--staleness", "4,2,0", "--stages", "5"],
    [""],
    ["--nothing"],
    ["checkpoint"],
    ["checkpoint", "burn"],
    ["theory", "everything"],
]
ALONE = {
    "report",
    "evaluate",
    "checkpoint show",
    "checkpoint verify",
    "checkpoint export",
    "reproduce",
    "recipes",
    "doctor",
}
"""Commands whose usual line is bad already."""


class Wrong(Exception):
    """A command ended otherwise than a command should."""


def obey(arguments: Sequence[str]) -> None:
    """Give a command line to the entry point; bad input is an error of ours, as its exit code and message tell.

    Raises:
        ConfigError: where it exits with code 2 and a message.
        Wrong: where it exits with another code than 0 and 2, or prints a traceback.
    """
    printed, told, code = io.StringIO(), io.StringIO(), 0
    patched = mock.patch.object(sys, "argv", ["stalewise", *arguments])
    with contextlib.redirect_stderr(printed), contextlib.redirect_stdout(told), patched:
        try:
            run()
        except SystemExit as end:
            code = 0 if end.code is None else end.code if isinstance(end.code, int) else 1
    # A group of commands by itself prints its help where help goes.
    _judge(code, printed.getvalue() or told.getvalue())


def _judge(code: int, message: str) -> None:
    if "Traceback" in message or code not in (0, 2):
        raise Wrong(f"exit code {code}: {message[-1500:]}")
    if code == 2:
        raise ConfigError(message)


def _line(random: Random) -> tuple[list[str], bool]:
    """A bad command line, and whether it is certain to be bad."""
    if random.random() < 0.1:
        return random.choice(CONTRADICTIONS), True
    name = random.choice(list(BAD))
    line, options = BAD[name]
    match random.randrange(10):
        case 0:
            return [misspelt(random, part) if part == line[0] else part for part in line] + ["--nothing"], True
        case 1:
            return [*line, random.choice(["--nothing", "--sed", "-x", "--stages="]), "3"], True
        case 2 if options:
            return [*line, random.choice(list(options))], True
        case _ if options:
            option = random.choice(list(options))
            return [*line, option, random.choice(options[option])], True
    return line, name in ALONE


def commands(random: Random, folder: Path) -> Case:
    """In this process, and one of fifty as a process of its own."""
    if random.random() < 0.02:
        return processes(random, folder)
    line, must_fail = _line(random)
    return Case(f"stalewise {' '.join(line)!r}", partial(obey, line), must_fail)


def processes(random: Random, folder: Path) -> Case:
    """The same as a process of its own."""
    while not (line := _line(random))[1] or any("\0" in part for part in line[0]):
        pass

    def act() -> None:
        done = subprocess.run([sys.executable, "-m", "stalewise", *line[0]], capture_output=True, text=True, timeout=50)
        _judge(done.returncode, done.stderr)

    return Case(f"process stalewise {' '.join(line[0])!r}", act)
