"""Rows that meet the same slow steps in turns: what `stragglers.py` and `elastic_engine.py` have in common.

In every round each row runs the same updates under one situation after another:

    updates     0 .. W-1   W ..              W+L ..            W+2L ..
    all rows    warm-up    | calm   | tail   | +20%   | tail   | +50% ..       tail: calm, so that no stage of any row
                                                                               meets a window in the run before it

A step time is that of the last stage over the window, whose first steps only settle. The model is the recurrence of
`stalewise.timing`, or its event loop for elastic rows, with the durations that the row's own calm steps had, under the
very same slow steps.
"""

from __future__ import annotations

import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from sides import TORCH_ROWS, OwnRow, OwnSide, Side, TorchRow, TorchSide, make_task, named
from straggler_model import predicted_windows

import stalewise
from stalewise.protocol.actions import Kind
from stalewise.protocol.staleness import Staleness
from stalewise.protocol.stragglers import Straggler, Stragglers
from stalewise.protocol.trace import Span
from stalewise.runtime.exchange import all_gather_json
from stalewise.runtime.job import current_job
from stalewise.timing.slow_steps import mean_slowing

__all__ = ["CALM", "SPELLS", "Row", "Schedule", "mean_staleness", "race", "rows_of", "situations", "worker"]

CALM, SPELLS = "calm", "spells"
Row = OwnRow | TorchRow


def _stairs(step: int) -> Callable[[int], list[int]]:
    return lambda num_stages: [step * (num_stages - 1 - stage) for stage in range(num_stages)]


def _own_rows(num_stages: int) -> list[OwnRow]:
    def setting(step: int) -> str:
        return str(Staleness(_stairs(step)(num_stages)))

    return [
        named("bp", "bp"),
        named("gpipe", "gpipe", micro_batched=True, activations="stored"),
        named("1f1b", "1f1b", micro_batched=True),
        named("ddg", "ddg"),
        named("fr", "fr"),
        named("pipedream", "pipedream"),
        *(named(f"dsp {setting(step)}", "dsp", staleness=_stairs(step)) for step in (1, 2, 3, 5)),
        *(
            named(f"dsp {setting(step)} stored", "dsp", staleness=_stairs(step), activations="stored")
            for step in (1, 2, 5)
        ),
        *(named(f"elastic {setting(step)}", "dsp", staleness=_stairs(step), elastic=True) for step in (2, 3, 5)),
        named(f"elastic {setting(2)} stored", "dsp", staleness=_stairs(2), activations="stored", elastic=True),
    ]


TORCH_LABELS = ("torch 1F1B", "torch Interleaved1F1B", "torch ZBVZeroBubble")


def rows_of(labels: Sequence[str], num_stages: int) -> list[Row]:
    """Those whose label has one of these texts in it; all for none."""
    known: list[Row] = [*_own_rows(num_stages), *(row for row in TORCH_ROWS if row.label in TORCH_LABELS)]
    return [row for row in known if not labels or any(text.lower() in row.label.lower() for text in labels)]


def situations(options: dict[str, Any]) -> dict[str, dict[str, Any] | None]:
    """By name, the straggler of each; None: nothing is slow."""
    known: dict[str, dict[str, Any] | None] = {CALM: None}
    known[SPELLS] = {"probability": 0.02, "factor": 3.0, "duration": 3, "seed": options["seed"]}
    for percent in options["slow"]:
        known[f"{percent:g}%"] = {
            "probability": options["probability"],
            "factor": 1 + percent / 100,
            "seed": options["seed"],
        }
    return {name: known[name] for name in options["situations"]}


class Schedule:
    """Which updates are slow by how much.

    Args:
        options: of the command line: `situations`, `rounds`, `updates` per window, `settle` updates before each.
        depth: largest staleness of all rows.

    Attributes:
        runs: the name of the situation of each run.
        warm_up: updates before the first run.
        steps: updates of a run.
    """

    def __init__(self, options: dict[str, Any], depth: int) -> None:
        self._settle: int = options["settle"]
        self.steps: int = options["updates"] + self._settle + depth
        self._situations = situations(options)
        self.runs = [*self._situations] * options["rounds"]
        self.warm_up: int = max(options.get("warm_up", 0), 2 * depth + 8)
        self._depth = depth

    def begin(self, run: int) -> int:
        """The first update of a run."""
        return self.warm_up + run * self.steps

    def window(self, run: int) -> tuple[int, int]:
        """The timed updates of a run: the first, and the one after the last."""
        return self.begin(run) + self._settle, self.begin(run + 1) - self._depth

    def straggler(self, run: int) -> Straggler | None:
        """Of the updates of a run; None where it is calm."""
        values = self._situations[self.runs[run]]
        if values is None:
            return None
        return Straggler(**values, first=self.begin(run), last=self.window(run)[1] - 1)

    def stragglers(self) -> Stragglers:
        """Of all runs."""
        rules = map(self.straggler, range(len(self.runs)))
        return Stragglers(tuple(rule for rule in rules if rule is not None))

    def floor(self, run: int, num_stages: int) -> float:
        """Mean slow-down of the timed steps of all stages, which decoupling cannot avoid."""
        return mean_slowing(Stragglers.of(self.straggler(run)), num_stages, *self.window(run))


def race(options: dict[str, Any]) -> dict[str, Any]:
    """What `worker` on each of `options["stages"]` processes finds."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "results.json")
        stalewise.launch(worker, num_workers=options["stages"], args=[options, str(file)])
        found: dict[str, Any] = json.loads(file.read_text())
    return found


def worker(options: dict[str, Any], out: str) -> None:
    """What each rank does with the rows whose labels are `options["rows"]`; rank 0 writes to `out`.

    Per row: `windows_s`, `model_s` (seconds per step of each run; None where nothing is calm, or there is no model),
    and `staleness` (mean of each run; None for torch's schedules).
    """
    torch.set_num_threads(1)
    job = current_job()
    rows = [row for row in rows_of([], job.world_size) if row.label in options["rows"]]
    methods = [row.build(job.world_size, options["micro_batches"]) for row in rows if isinstance(row, OwnRow)]
    schedule = Schedule(options, max((method.program().max_lag for method in methods), default=0))
    task = make_task(job, options["model"], options["batch_size"], options["split"], schedule.stragglers())
    began = time.monotonic()
    sides: dict[str, Side] = {}
    ends: dict[str, list[int]] = {}
    for row in rows:
        side = (OwnSide if isinstance(row, OwnRow) else TorchSide)(
            task, row, options["micro_batches"] if row.micro_batched else 1
        )
        sides[row.label] = side
        ends[row.label] = side.run(schedule.warm_up)
    for run, name in enumerate(schedule.runs):
        if job.rank == 0:
            text = f"{time.monotonic() - began:6.0f} s  run {run + 1} of {len(schedule.runs)}: {name}"
            print(text, file=sys.stderr, flush=True)
        order = list(sides)
        random.Random(run).shuffle(order)
        for label in order:
            all_gather_json(None, job.group)
            ends[label].extend(sides[label].run(schedule.steps))
    gathered = all_gather_json(ends, job.group)
    found = []
    for row in rows:
        side = sides[row.label]
        result: dict[str, Any] = {
            "label": row.label,
            "torch": isinstance(row, TorchRow),
            "cuts": side.cuts,
            "windows_s": _windows([of_rank[row.label] for of_rank in gathered], schedule),
            "model_s": None,
            "staleness": None,
        }
        if isinstance(side, OwnSide):
            spans = [list(trace) for trace in side.pipeline.traces()]
            method = side.pipeline.method
            result["method"], result["elastic"] = method.name, method.elastic_rule is not None
            result["setting"] = list(method.staleness)
            result["staleness"] = [mean_staleness(spans, schedule.window(run)) for run in range(len(schedule.runs))]
            calm = [schedule.window(run) for run, name in enumerate(schedule.runs) if name == CALM]
            if job.rank == 0 and calm:
                result["model_s"] = predicted_windows(method, spans, calm, schedule)
        found.append(result)
        side.close()
    if job.rank == 0:
        floors = [schedule.floor(run, job.world_size) for run in range(len(schedule.runs))]
        Path(out).write_text(json.dumps({"rows": found, "runs": schedule.runs, "floors": floors}))


def mean_staleness(spans: Sequence[Sequence[Span]], window: tuple[int, int]) -> float:
    """Batches by which forwards were ahead of the backwards of some updates: the mean over updates and stages."""
    depths = []
    for own in spans:
        newest = update = 0
        for span in own:
            if span.kind is Kind.FORWARD:
                newest = span.batch
            elif span.kind is Kind.BACKWARD and window[0] <= update < window[1]:
                depths.append(newest - span.batch)
            update += span.kind is Kind.UPDATE
    return statistics.fmean(depths)


def _windows(ends: Sequence[Sequence[int]], schedule: Schedule) -> list[float]:
    """Seconds per step of the last stage in each window."""
    last = ends[-1]
    steps = []
    for run in range(len(schedule.runs)):
        first, end = schedule.window(run)
        steps.append((last[end - 1] - last[first - 1]) / (end - first) / 1e9)
    return steps
