"""The configuration of `stalewise train --resume`: that of the run, and what the user gave anew."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import typer

from stalewise.checkpoint.folder import complete_checkpoints, set_aside, verify
from stalewise.checkpoint.manifest import MANIFEST
from stalewise.checkpoint.writer import wait_for_writers
from stalewise.errors import ConfigError
from stalewise.experiments.config import TrainConfig
from stalewise.experiments.run_checkpoints import CHECKPOINTS

__all__ = ["begin_at", "given_options", "resumed_config", "resumed_folder"]

_FIELDS = {"option": "options", "recv_timeout": "recv_timeout_s", "json": "display", "straggler": "stragglers"}
_NOT_OF_THE_RUN = {"resume", "max_restarts"}
_PIPELINE = {"method", "stages", "queue", "staleness", "options", "partition", "memory_limit"}
_CHANGEABLE = _PIPELINE | {
    "engine",
    "device",
    "threads",
    "loader_workers",
    "recv_timeout_s",
    "display",
    "checkpoint_every",
    "keep",
    "data_dir",
    "stragglers",
    "on_nan",
}


def given_options(context: typer.Context) -> set[str]:
    """The fields of `TrainConfig` whose options stand on the command line."""
    sources = {name: context.get_parameter_source(name) for name in context.params}
    given = {name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"}
    return {_FIELDS.get(name, name) for name in given - _NOT_OF_THE_RUN}


def resumed_folder(path: Path) -> tuple[Path, Path | None]:
    """The folder of the run that goes on, and its checkpoint, of which every byte was read. Nothing is changed.

    Args:
        path: that folder, or one of its checkpoints.

    Raises:
        CheckpointError: where the checkpoint is damaged.
    """
    wait_for_writers()
    if (path / MANIFEST).is_file():
        checkpoint: Path | None = path.resolve()
        folder = path.resolve().parent.parent
    else:
        checkpoint = next(iter(complete_checkpoints(path / CHECKPOINTS)), None)
        folder = path
    if checkpoint is not None:
        verify(checkpoint)
    return folder, checkpoint


def begin_at(checkpoint: Path | None) -> None:
    """Set later checkpoints aside. Whoever calls this holds the folder's lock, so that no run makes more of them."""
    if checkpoint is not None:
        for moved in set_aside(checkpoint):
            print(f"stalewise: {moved.name} is what was a later checkpoint of the run; it is not used", file=sys.stderr)


def resumed_config(folder: Path, given: Mapping[str, Any]) -> TrainConfig:
    """The configuration with which a run goes on.

    Args:
        folder: of the run.
        given: the fields that the command line says, without defaults.

    Raises:
        ConfigError: where the folder is not that of a run, or an option would make it another run.
    """
    config = TrainConfig.read(folder / "config.json")
    for name in sorted(given.keys() - _CHANGEABLE):
        option = "--" + name.replace("_", "-")
        raise ConfigError(
            f"{option} cannot be given with --resume: the run in {folder} was begun with its own, and goes on with it. "
            f"Leave {option} out, or begin another run."
        )
    changes = dict(given)
    # What the run had beside what is given anew does not fit it.
    if changes.keys() & {"method", "stages"}:
        of_any_stages = {name: value for name, value in config.options.items() if not isinstance(value, list | tuple)}
        options = {} if "method" in given else of_any_stages
        changes = {"queue": None, "staleness": None, "partition": "profile", "options": options, **changes}
    elif "staleness" in given:
        changes = {"queue": None, **({"partition": "profile"} if given["staleness"] == "auto" else {}), **changes}
    return replace(config, **changes)
