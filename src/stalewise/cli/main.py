"""The `stalewise` command: parses what a user typed, and turns errors into one clear message."""

from __future__ import annotations

import os
import sys
import traceback

import typer
from rich.console import Console

from stalewise._version import __version__
from stalewise.cli.checkpoint import checkpoint
from stalewise.cli.compare import compare
from stalewise.cli.doctor import doctor
from stalewise.cli.evaluate import evaluate
from stalewise.cli.plan import plan
from stalewise.cli.program import program
from stalewise.cli.recipes import recipes
from stalewise.cli.report import report
from stalewise.cli.reproduce import reproduce
from stalewise.cli.simulate import simulate
from stalewise.cli.theory import theory
from stalewise.cli.train import train
from stalewise.errors import ConfigError, NonFiniteLoss, StalewiseError, WorkerError

__all__ = ["app", "run"]

app = typer.Typer(
    name="stalewise",
    help="Train deep networks over devices of uneven speed with Diversely Stale Parameters (arXiv:1909.02625).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
app.command()(train)
app.command()(compare)
app.command()(evaluate)
app.command()(report)
app.command()(plan)
app.command()(program)
app.command()(simulate)
app.command()(doctor)
app.command()(recipes)
app.command()(reproduce)
app.add_typer(checkpoint, name="checkpoint")
app.add_typer(theory, name="theory")


@app.callback(invoke_without_command=True)
def options(version: bool = typer.Option(False, "--version", help="Print the version and exit.")) -> None:
    """Options of all commands."""
    if version:
        print(__version__)
        raise typer.Exit


def run() -> None:
    """The entry point: exit code 0, 2 for wrong input, 1 for a failure at run time, 130 after Ctrl-C."""
    try:
        app()
    except ConfigError as error:
        _fail(error, 2)
    except WorkerError as error:
        brief = error.wrong_input or error.cause_type == NonFiniteLoss.__name__
        _fail(error.cause if brief else error, 2 if error.wrong_input else 1)
    except StalewiseError as error:
        _fail(error, 1)
    except BrokenPipeError:
        # Whoever read the output has seen enough; nothing is left to be told to it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        where = "" if error.filename is None else f" ({error.filename})"
        _fail(f"the system refused something: {error.strerror or error}{where}. Look at the disk and its rights.", 1)
    except Exception as error:
        trace = "".join(traceback.format_exception(error))
        _fail(
            f"{type(error).__name__}: {error}. This is no error of the input that stalewise knows: it comes from the "
            f"model's code, or is a defect of stalewise.\n{trace}",
            1,
        )


def _fail(error: object, code: int) -> None:
    Console(stderr=True, highlight=False, soft_wrap=True).print("[bold red]error:[/] ", end="")
    print(error, file=sys.stderr)
    sys.exit(code)
