"""What slow steps cost each method: slow-down against itself, absolute speed, the floor, and what the model predicts.

    python benchmarks/stragglers.py --out docs/results/stragglers.json
    python benchmarks/stragglers.py --model resnet56 --rounds 1 --only dsp "torch 1F1B"

In each step each stage is slow with probability 1/3, and then takes 20, 50, 100 or 150% longer (busy, not asleep).
Which steps are slow depends on (seed, stage, local update) alone, so all rows meet the same ones: one after another,
every row runs the same updates, calm or with one of the slow-downs, and so on in turns for some rounds:

    updates     0 .. W-1   W ..              W+L ..            W+2L ..
    all rows    warm-up    | calm   | tail   | +20%   | tail   | +50% ..       tail: calm, so that no stage of any row
                                                                               meets a window in the run before it

A step time is that of the last stage over the window, whose first steps only settle. The model is the recurrence of
`stalewise.timing` with the durations that the row's own calm steps had, under the very same slow steps.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from common import machine, spread, table
from sides import TORCH_ROWS, OwnRow, OwnSide, Side, TorchRow, TorchSide, make_task, named
from straggler_model import predicted_windows

import stalewise
from stalewise.protocol.actions import Kind
from stalewise.protocol.stragglers import Straggler, Stragglers
from stalewise.protocol.trace import Span
from stalewise.runtime.exchange import all_gather_json
from stalewise.runtime.job import current_job
from stalewise.timing.slow_steps import mean_slowing, mean_times

SETTLE = 4
"""First updates of a window that are not timed."""


def _stairs(step: int) -> Any:
    return lambda num_stages: [step * (num_stages - 1 - stage) for stage in range(num_stages)]


OWN_ROWS = (
    named("bp", "bp"),
    named("gpipe", "gpipe", micro_batched=True, activations="stored"),
    named("1f1b", "1f1b", micro_batched=True),
    named("ddg", "ddg"),
    named("fr", "fr"),
    named("pipedream", "pipedream"),
    named("dsp (2,1,0)", "dsp", staleness=_stairs(1)),
    named("dsp (4,2,0)", "dsp", staleness=_stairs(2)),
    named("dsp (6,3,0)", "dsp", staleness=_stairs(3)),
    named("dsp (10,5,0)", "dsp", staleness=_stairs(5)),
    named("dsp (2,1,0) stored", "dsp", staleness=_stairs(1), activations="stored"),
    named("dsp (4,2,0) stored", "dsp", staleness=_stairs(2), activations="stored"),
    named("elastic (4,2,0)", "dsp", staleness=_stairs(2), elastic=True),
    named("elastic (6,3,0)", "dsp", staleness=_stairs(3), elastic=True),
    named("elastic (10,5,0)", "dsp", staleness=_stairs(5), elastic=True),
    named("elastic (4,2,0) stored", "dsp", staleness=_stairs(2), activations="stored", elastic=True),
)
TORCH_LABELS = ("torch 1F1B", "torch Interleaved1F1B", "torch ZBVZeroBubble")


CALM = "calm"


def conditions(options: dict[str, Any]) -> dict[str, dict[str, Any] | None]:
    """Names of what the runs of a round meet, and the straggler of each; None: nothing."""
    seed = options["seed"]
    found: dict[str, dict[str, Any] | None] = {CALM: None}
    for percent in options["slow"]:
        found[f"+{percent:g}%"] = {"probability": options["probability"], "factor": 1 + percent / 100, "seed": seed}
    if options["spells"]:
        found["spells"] = {"probability": 0.02, "factor": 3.0, "duration": 3, "seed": seed}
    return found


class Schedule:
    """Which updates are slow by how much.

    Args:
        options: of the command line.
        depth: largest staleness of all rows.

    Attributes:
        runs: the name of the condition of each run.
    """

    def __init__(self, options: dict[str, Any], depth: int) -> None:
        self.steps: int = options["steps"] + SETTLE + depth
        self._conditions = conditions(options)
        self.runs = [*self._conditions] * options["rounds"]
        self.warm_up = 2 * depth + 8
        self._depth = depth

    def begin(self, run: int) -> int:
        """The first update of a run."""
        return self.warm_up + run * self.steps

    def window(self, run: int) -> tuple[int, int]:
        """The timed updates of a run: the first, and the one after the last."""
        return self.begin(run) + SETTLE, self.begin(run + 1) - self._depth

    def straggler(self, run: int) -> Straggler | None:
        """Of the updates of a run; None where it is calm."""
        condition = self._conditions[self.runs[run]]
        if condition is None:
            return None
        return Straggler(**condition, first=self.begin(run), last=self.window(run)[1] - 1)

    def stragglers(self) -> Stragglers:
        """Of all runs."""
        rules = map(self.straggler, range(len(self.runs)))
        return Stragglers(tuple(rule for rule in rules if rule is not None))

    def floor(self, run: int, num_stages: int) -> float:
        """Mean slow-down of the timed steps of all stages, which decoupling cannot avoid."""
        return mean_slowing(Stragglers.of(self.straggler(run)), num_stages, *self.window(run))


# -- in every worker -------------------------------------------------------------------------------------------------


def worker(options: dict[str, Any], out: str) -> None:
    torch.set_num_threads(1)
    job = current_job()
    rows = _rows(options["only"])
    methods = [row.build(job.world_size, options["micro_batches"]) for row in rows if isinstance(row, OwnRow)]
    schedule = Schedule(options, max(method.program().max_lag for method in methods) if methods else 0)
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
            result["staleness"] = [mean_staleness(spans, schedule.window(run)) for run in range(len(schedule.runs))]
            if job.rank == 0 and side.pipeline.method.elastic_rule is None:
                calm = [schedule.window(run) for run, name in enumerate(schedule.runs) if name == CALM]
                result["model_s"] = predicted_windows(side.pipeline.method, mean_times(spans, calm), schedule)
        found.append(result)
        side.close()
    if job.rank == 0:
        floors = [schedule.floor(run, job.world_size) for run in range(len(schedule.runs))]
        Path(out).write_text(json.dumps({"rows": found, "runs": schedule.runs, "floors": floors}))


def mean_staleness(spans: Sequence[Sequence[Span]], window: tuple[int, int]) -> float:
    """Batches by which forwards were ahead of the backwards of some updates: the mean over updates and stages."""
    depths = []
    for own in spans[:-1]:
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


# -- the command -----------------------------------------------------------------------------------------------------


def _rows(only: Sequence[str]) -> list[OwnRow | TorchRow]:
    known: list[OwnRow | TorchRow] = [*OWN_ROWS, *(row for row in TORCH_ROWS if row.label in TORCH_LABELS)]
    return [row for row in known if not only or any(text.lower() in row.label.lower() for text in only)]


def slow_downs(windows_s: Sequence[float], runs: Sequence[str], name: str) -> list[float]:
    """Of each round: the step time over that of the calm run of the same round, minus 1."""
    per_round = len(dict.fromkeys(runs))
    place = runs.index(name)
    return [windows_s[start + place] / windows_s[start] - 1 for start in range(0, len(runs), per_round)]


def _print(results: dict[str, Any], options: dict[str, Any]) -> None:
    runs = results["runs"]
    for name in dict.fromkeys(runs):
        of_name = [run for run, other in enumerate(runs) if other == name]
        speeds = {
            row["label"]: [options["batch_size"] / row["windows_s"][run] for run in of_name] for row in results["rows"]
        }
        of_torch = [statistics.median(speeds[row["label"]]) for row in results["rows"] if row["torch"]]
        best_torch = max(of_torch, default=0.0)
        floor = statistics.median(results["floors"][run] for run in of_name)
        lines = []
        for row in sorted(results["rows"], key=lambda row: -statistics.median(speeds[row["label"]])):
            own = speeds[row["label"]]
            stale = (
                "-" if row["staleness"] is None else f"{statistics.median(row['staleness'][r] for r in of_name):.2f}"
            )
            line = [row["label"], spread(own, 0), f"{statistics.median(own) / best_torch:.2f}" if best_torch else "-"]
            line.append(stale)
            if name != CALM:
                measured = slow_downs(row["windows_s"], runs, name)
                line.append(spread([100 * value for value in measured], 1))
                if row["model_s"] is None:
                    line += ["-", "-"]
                else:
                    model = slow_downs(row["model_s"], runs, name)
                    errors = [100 * (ours - theirs) for ours, theirs in zip(model, measured, strict=True)]
                    line += [f"{100 * statistics.median(model):.1f}", f"{statistics.median(errors):+.1f}"]
            lines.append(line)
        head = ["row", "samples/s", "/ best torch", "staleness"]
        if name == CALM:
            print("\ncalm")
            print(table(head, lines))
        else:
            print(f"\n{name}: floor {100 * floor:.1f}%")
            print(table([*head, "slow-down %", "model %", "model - measured"], lines))


LEGEND = """
slow-down: step time over that of the same row in the calm run of the same round; median (min .. max) over rounds.
floor: mean slow-down of the steps of all stages in the same windows, which no method avoids.
model: the slow-down that the recurrence gives for the very same slow steps, in points; torch's schedules have none, nor
  have elastic rows, whose order depends on time.
staleness: realised, mean over the backwards of all stages but the last.
+N%: each step of each stage is slow by N% with the probability above; spells: with probability 2% a stage starts 3 steps
  at triple time.
Rows are ranked by samples/s: relative slow-down alone flatters the slowest method."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet20")
    parser.add_argument("--stages", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--slow", type=float, nargs="+", default=[20, 50, 100, 150], help="slow-downs in percent")
    parser.add_argument("--spells", action="store_true", help="also spells of 3 steps at triple time")
    parser.add_argument("--probability", type=float, default=1 / 3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=40, help="timed per row, round and slow-down")
    parser.add_argument("--micro-batches", type=int, default=4)
    parser.add_argument("--split", choices=["stored", "recompute", "own"], default="own", help="see sides.Task")
    parser.add_argument("--only", nargs="+", default=[], metavar="TEXT", help="rows whose name contains one of these")
    parser.add_argument("--out", type=Path, help="also write the results as JSON")
    options = vars(parser.parse_args())
    out = options.pop("out")
    if not _rows(options["only"]):
        parser.error(f"no row is called so; there are {', '.join(row.label for row in _rows([]))}")
    print(f"{machine()}; load {os.getloadavg()[0]:.1f} before the start")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "results.json")
        stalewise.launch(worker, num_workers=options["stages"], args=[options, str(file)])
        results = json.loads(file.read_text())
    print(
        f"{options['model']}, batch {options['batch_size']}, K = {options['stages']}, a step is slow with probability "
        f"{options['probability']:.3g}, {options['rounds']} rounds of {options['steps']} steps: median (min .. max)"
    )
    _print(results, options)
    print(f"load {os.getloadavg()[0]:.1f} at the end; much above {options['stages']} says that others worked too")
    print(LEGEND)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps({"machine": machine(), "options": options, **results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
