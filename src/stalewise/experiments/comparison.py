"""A comparison of methods: which runs it takes, and running those that are not there yet, one after another.

    OUT/comparison.json         what is compared; another comparison in the same folder is refused
    OUT/partition.json          the cuts that all methods share, and the profile that they come from
    OUT/runs/NAME-seedK/        a run folder each, as `stalewise train` leaves it
    OUT/runs/NAME-seedK.running/    the same while it is written

A run is complete when its folder has a summary.json. What is not complete is run again when the comparison is started
again, what is stays as it is; so a comparison may be interrupted at any time. Seeds take turns outside and methods
inside, so that what changes on the machine over hours falls on all methods alike.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from stalewise.errors import ConfigError, StalewiseError, WorkerError
from stalewise.experiments.comparison_folder import open_comparison
from stalewise.experiments.comparison_plan import ComparisonPlan
from stalewise.experiments.config import TrainConfig
from stalewise.experiments.cuts import plan_cuts
from stalewise.experiments.data_parallel import run_data_parallel
from stalewise.experiments.machine import machine
from stalewise.experiments.run_model import check_run_model
from stalewise.experiments.run_writer import prepare_run_folder, write_json
from stalewise.experiments.shared_runs import SharedRuns
from stalewise.experiments.training import run
from stalewise.runtime.job import in_launched_job
from stalewise.runtime.launch import launch

__all__ = ["BASELINES", "ComparisonConfig", "Entry", "PlannedRun", "Runner"]

BASELINES = ("one-process", "data-parallel")
CALM = "-calm"
"""After the name of a row: the same method without the slow steps that the comparison asks for."""
FAILURE = "failure.json"
"""In a run folder: why the run failed."""

_OF_A_RUN = ("method", "queue", "staleness", "options", "seed", "display", "on_nan")
"""Fields of `TrainConfig` that differ between the runs, or do not matter to them."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A row of the comparison.

    Args:
        name: of the row and its run folders.
        method: of `stalewise.methods.METHOD_NAMES`, or the name of a baseline.
        options: of the method.
        baseline: whether it is one.
    """

    name: str
    method: str
    options: Mapping[str, Any]
    baseline: bool = False


@dataclass(frozen=True, kw_only=True)
class PlannedRun:
    """One run: an entry with a seed.

    Args:
        entry: the row.
        seed: of the run.
        calm: whether it is the undisturbed twin of a run with slow steps.
    """

    entry: Entry
    seed: int
    calm: bool = False

    @property
    def name(self) -> str:
        """Of the row, for displays."""
        return f"{self.entry.name}{CALM}" if self.calm else self.entry.name

    @property
    def folder(self) -> str:
        """Within the comparison's."""
        return f"runs/{self.name}-seed{self.seed}"


@dataclass(frozen=True, kw_only=True)
class ComparisonConfig:
    """What is compared.

    Baselines have no stages, so stragglers do not meet them.

    Args:
        methods: names of methods, such as "dsp", or NAME=METHOD to have a method twice with other options.
        options: of a method, by the name of its row.
        baselines: of `BASELINES`.
        seeds: runs per row, with the seeds 0, 1, ...
        shared: what all runs have in common; its method, options and seed do not count.

    Raises:
        ConfigError: where a name is unknown or used twice, or an option does not fit.
    """

    methods: Sequence[str]
    shared: TrainConfig
    options: Mapping[str, Mapping[str, Any]]
    baselines: Sequence[str] = BASELINES
    seeds: int = 1

    def __post_init__(self) -> None:
        if isinstance(self.seeds, bool) or not isinstance(self.seeds, int) or self.seeds < 1:
            raise ConfigError(f"seeds is {self.seeds!r}; a comparison needs at least 1.")
        if not self.methods:
            raise ConfigError("there is no method to compare; give some, such as --methods bp,dsp.")
        names = [entry.name for entry in self.entries]
        for index, name in enumerate(names):
            if name in names[:index]:
                raise ConfigError(f"{name!r} is compared twice; give one of them another name, as in deep={name}.")
            if not name.replace("-", "").replace("_", "").replace(".", "").isalnum() or name.startswith("."):
                raise ConfigError(f"{name!r} cannot name a row: use letters, digits, '-', '_' and '.' only.")
            if name.endswith(CALM):
                raise ConfigError(f"{name!r} cannot name a row: {CALM!r} marks runs without slow steps.")
        for name in self.options:
            if name not in names:
                raise ConfigError(
                    f"there are options for {name!r}, which is not compared; there are {', '.join(names)}."
                )
        for name in self.baselines:
            if name not in BASELINES:
                raise ConfigError(f"there is no baseline {name!r}; there are {', '.join(BASELINES)}, or none.")
        for planned in self.runs():
            self.of(planned, ())

    @property
    def entries(self) -> tuple[Entry, ...]:
        """The rows, baselines last."""
        rows = []
        for text in self.methods:
            name, _, method = text.partition("=")
            rows.append(Entry(name=name, method=method or name, options=dict(self.options.get(name, {}))))
        return (*rows, *(Entry(name=name, method=name, options={}, baseline=True) for name in self.baselines))

    def runs(self) -> Iterator[PlannedRun]:
        """All runs in the order in which they take place."""
        for seed in range(self.seeds):
            for entry in self.entries:
                yield PlannedRun(entry=entry, seed=seed)
                if self.shared.stragglers and not entry.baseline:
                    yield PlannedRun(entry=entry, seed=seed, calm=True)

    def of(self, planned: PlannedRun, cuts: tuple[int, ...]) -> TrainConfig:
        """The configuration of a run with the shared cuts."""
        shared = replace(
            self.shared,
            seed=planned.seed,
            display="quiet",
            partition=cuts,
            method="bp",
            options={},
            queue=None,
            on_nan="go-on",  # that a method diverges is a result
        )
        entry = planned.entry
        if planned.calm:
            shared = replace(shared, stragglers=())
        if entry.baseline:
            threads = self.shared.threads
            if entry.method == "one-process":
                cores = os.cpu_count() or 1
                threads = None if threads is None else min(cores, threads * self.shared.stages)
            return replace(
                shared,
                method="bp",
                staleness=None,
                stages=1,
                partition=(),
                engine="sequential",
                threads=threads,
                stragglers=(),
            )
        options = dict(entry.options)
        return replace(
            shared,
            method=entry.method,
            staleness=_numbers(options.pop("staleness", None), f"--option {entry.name}:staleness"),
            queue=_numbers(options.pop("queue", None), f"--option {entry.name}:queue"),
            options=options,
        )

    def settings(self) -> dict[str, Any]:
        """What all runs share, as JSON values."""
        return {name: value for name, value in asdict(self.shared).items() if name not in _OF_A_RUN}

    def as_dict(self) -> dict[str, Any]:
        """JSON values that tell this comparison from others, the machine included."""
        values = {
            "rows": [asdict(entry) for entry in self.entries],
            "seeds": self.seeds,
            "shared": self.settings(),
            "machine": machine(),
        }
        plain: dict[str, Any] = json.loads(json.dumps(values))
        return plain


class Runner:
    """Runs what is missing of a comparison.

    Args:
        config: of the comparison.
        path: its folder; made, continued, or with `overwrite` made anew.
        overwrite: delete an older comparison in the folder.
        shared: where runs in one process are looked for first, and kept; None: nowhere.

    Raises:
        ConfigError: where the folder holds something else, or the process is one of several ranks.
    """

    def __init__(
        self, config: ComparisonConfig, path: Path, *, overwrite: bool, shared: SharedRuns | None = None
    ) -> None:
        if in_launched_job():
            raise ConfigError("compare starts the processes of each run itself; call it once, without torchrun.")
        self.config = config
        self.path = path
        self.shared = shared
        open_comparison(path, config.as_dict(), overwrite=overwrite)

    def plan(self) -> ComparisonPlan:
        """The cuts, and what was predicted. Profiles the model if need be."""
        file = self.path / "partition.json"
        if not file.is_file():
            shared = self.path / ".shared.json"
            check_run_model(self.config.shared)
            write_json(shared, asdict(self.config.shared))
            rows = {entry.name: asdict(entry) for entry in self.config.entries if not entry.baseline}
            try:
                processes = 1 if self.config.shared.engine == "sequential" else self.config.shared.stages
                launch(_plan_worker, num_workers=processes, args=[str(self.path), rows])
            finally:
                shared.unlink()
        return ComparisonPlan.read(file)

    def state(self, planned: PlannedRun) -> Literal["done", "failed", "missing"]:
        """Of a run, as its folder tells it."""
        folder = self.path / planned.folder
        if (folder / "summary.json").is_file():
            return "done"
        return "failed" if (folder / FAILURE).is_file() else "missing"

    def error(self, planned: PlannedRun) -> str | None:
        """Why a run failed, in a line."""
        try:
            return str(json.loads((self.path / planned.folder / FAILURE).read_text(encoding="utf-8"))["error"])
        except (OSError, ValueError, KeyError):
            return None

    def execute(self, planned: PlannedRun) -> None:
        """Make one run; a failure is recorded in its folder, and ends nothing else."""
        final = self.path / planned.folder
        folder = final.with_name(f"{final.name}.running")
        for old in (folder, final):
            if old.exists():
                shutil.rmtree(old)
        prepare_run_folder(folder, overwrite=False)
        try:
            config = self.config.of(planned, self.plan().cuts)
            if planned.entry.method == "data-parallel":
                run_data_parallel(config, folder, ranks=self.config.shared.stages)
            elif config.engine == "sequential":
                self._run_in_one_process(config, folder)
            else:
                run(config, folder)
        except StalewiseError as error:
            # A run that fails while it writes its report has left a summary, but it is not complete.
            (folder / "summary.json").unlink(missing_ok=True)
            write_json(folder / FAILURE, {"error": _in_a_line(error), "detail": str(error)})
        folder.rename(final)

    def _run_in_one_process(self, config: TrainConfig, folder: Path) -> None:
        # The baseline of a comparison of several processes is asked for its time.
        shared = self.shared if self.config.shared.engine == "sequential" else None
        found = shared.find(config) if shared else None
        if found is not None:
            shutil.copytree(found, folder, dirs_exist_ok=True)
            return
        # In a process of its own: its threads and its memory are then those of the run alone.
        write_json(folder / "config.json", config.as_dict())
        launch(_run_worker, num_workers=1, args=[str(folder)])
        if shared:
            shared.keep(config, folder)


def _run_worker(folder: str) -> None:
    path = Path(folder)
    run(TrainConfig.read(path / "config.json"), path)


def _plan_worker(folder: str, rows: Mapping[str, Mapping[str, Any]]) -> None:
    path = Path(folder)
    shared = TrainConfig.read(path / ".shared.json")
    config = ComparisonConfig(methods=["bp"], shared=shared, options={}, baselines=())
    methods = {name: config.of(PlannedRun(entry=Entry(**row), seed=0), ()).build_method() for name, row in rows.items()}
    planned = plan_cuts(shared, methods)
    if int(os.environ.get("RANK", 0)) == 0:
        write_json(path / "partition.json", planned)


def _in_a_line(error: StalewiseError) -> str:
    """The cause without its traceback."""
    if isinstance(error, WorkerError) and error.cause_type:
        speaks_for_itself = error.wrong_input or error.cause_type == "Killed"
        text = error.cause if speaks_for_itself else f"{error.cause_type}: {error.cause}"
    else:
        text = str(error)
    return " ".join(text.split())[:300]


def _numbers(value: Any, option: str) -> tuple[int, ...] | None:
    """`"4,2,0"`, [4, 2, 0] or 4 as a tuple."""
    if value is None:
        return None
    entries = value.split(",") if isinstance(value, str) else value if isinstance(value, list | tuple) else [value]
    try:
        return tuple(int(entry) for entry in entries)
    except (TypeError, ValueError):
        raise ConfigError(f"{option} is {value!r}; give whole numbers such as 4,2,0.") from None
