"""Runs in one process that several comparisons ask for, made once and kept by what they are.

    ROOT/KEY/                a run folder as `stalewise train` leaves it; KEY tells its configuration and the machine
    ROOT/.KEY.running.PID/   the same while it is written

Only runs of the sequential engine are shared, and only these may take place several at a time: they are asked for what
is learned. Runs of several processes are asked for their times as well, so they stay with the comparison that
interleaves them. A folder does not know the code that filled it; after a change of numbers, delete ROOT.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

from stalewise.errors import ConfigError
from stalewise.experiments.config import TrainConfig
from stalewise.experiments.machine import machine
from stalewise.experiments.training import run

__all__ = ["SharedRuns"]


class SharedRuns:
    """A folder of runs, found by their configuration.

    Args:
        root: of the folder; made when the first run is kept.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    def key(self, config: TrainConfig) -> str:
        """Name of the run's folder: what decides its numbers, and the machine that computes them."""
        # What is as always is left out, so that a setting that a later version adds changes no key.
        usual = TrainConfig().as_dict()
        values = {name: value for name, value in config.as_dict().items() if value != usual.get(name)}
        # In one process nobody waits for a message.
        values = {**values, "display": None, "recv_timeout_s": None, "machine": machine()}
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]

    def find(self, config: TrainConfig) -> Path | None:
        """Folder of a run that is complete, or None."""
        folder = self.root / self.key(config)
        return folder if config.engine == "sequential" and (folder / "summary.json").is_file() else None

    def keep(self, config: TrainConfig, folder: Path) -> None:
        """Copy a complete run; of two equal ones the first stays."""
        made = self._running(config)
        shutil.copytree(folder, made, dirs_exist_ok=True)
        self._settle(config, made)

    def fill(
        self, configs: Sequence[TrainConfig], *, jobs: int, tell: Callable[[int, int], None] | None = None
    ) -> None:
        """Make those that are missing, several at a time, each in a fresh process. Blocks until all have ended.

        A run that fails is left out here: the comparison that needs it tries again, and tells why.

        Args:
            configs: of the runs; all of the sequential engine. Equal ones are made once.
            jobs: runs at a time.
            tell: called with how many of how many are done, at first and after every run.

        Raises:
            ConfigError: where a run is of several processes, or `jobs` is below 1.
        """
        if jobs < 1:
            raise ConfigError(f"jobs is {jobs}; at least 1 run takes place at a time.")
        if any(config.engine != "sequential" for config in configs):
            raise ConfigError('only runs with engine="sequential" are shared; the times of others are measured alone.')
        missing = {self.key(config): config for config in configs if self.find(config) is None}
        if not missing:
            return
        context = multiprocessing.get_context("spawn")
        # A process for each run, so that what one leaves behind is not the next one's.
        with ProcessPoolExecutor(jobs, mp_context=context, max_tasks_per_child=1) as pool:
            made = [pool.submit(_make, self, config) for config in missing.values()]
            if tell is not None:
                tell(0, len(made))
                for done, _ in enumerate(as_completed(made), start=1):
                    tell(done, len(made))

    def _running(self, config: TrainConfig) -> Path:
        """An empty folder for a run of this process."""
        folder = self.root / f".{self.key(config)}.running.{os.getpid()}"
        if folder.exists():
            shutil.rmtree(folder)
        folder.mkdir(parents=True)
        return folder

    def _settle(self, config: TrainConfig, made: Path) -> None:
        try:
            made.rename(self.root / self.key(config))
        except OSError:
            # Another process was first.
            shutil.rmtree(made)


def _make(shared: SharedRuns, config: TrainConfig) -> None:
    folder = shared._running(config)
    try:
        run(config, folder)
    except BaseException:
        shutil.rmtree(folder)
        raise
    shared._settle(config, folder)
