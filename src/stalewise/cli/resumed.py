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
from stalewise.errors import ConfigError
from stalewise.experiments.config import TrainConfig
from stalewise.experiments.run_checkpoints import CHECKPOINTS

__all__ = ["given_options", "resumed_config", "resumed_folder"]

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


def resumed_folder(path: Path) -> Path:
    """The folder of the run that goes on, after every byte of the checkpoint was read.

    Args:
        path: that folder, or one of its checkpoints; then later ones are set aside, and it is the newest.

    Raises:
        CheckpointError: where the checkpoint is damaged; nothing was changed then.
    """
    if not (path / MANIFEST).is_file():
        if found := complete_checkpoints(path / CHECKPOINTS):
            verify(found[0])
        return path
    verify(path)
    for moved in set_aside(path.resolve()):
        print(f"stalewise: {moved.name} is what was a later checkpoint of the run; it is not used", file=sys.stderr)
    return path.resolve().parent.parent


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
    if changes.keys() & {"method", "stages"}:
        # What the old method had does not fit the new one.
        defaults = {"queue": None, "staleness": None, "partition": "profile"}
        changes = {**defaults, **({"options": {}} if "method" in given else {}), **changes}
    return replace(config, **changes)
