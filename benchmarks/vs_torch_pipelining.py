"""Step times of every method of stalewise and of every schedule of torch.distributed.pipelining, side by side.

    python benchmarks/vs_torch_pipelining.py --stages 3 --batch-size 64
    python benchmarks/vs_torch_pipelining.py --model resnet20 --stages 3 --only dsp 1f1b --rounds 3

All rows train the same model from the same weights on the same batches, with the same optimizer, in the same K
processes with one thread each, and the layers are timed once for all. Then:

    check    every row trains on the first batches; the losses of synchronous rows must be those of a plain loop
             over the unsplit model with as many micro-batches. Serves as warm-up, too.
    trials   rows with micro-batches run with each number of them; the quickest one goes on.
    rounds   in each, every row runs some steps, in an order that changes; so noise of the machine hits all alike.

A step time is the mean time between the updates of a rank, on the rank where it is longest, while all ranks work: the
first steps of a run are skipped, and so is what follows after the first rank was done.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from common import add_out, leave, machine, spread, table, verdict
from sides import (
    TORCH_ROWS,
    OwnRow,
    OwnSide,
    Side,
    Task,
    TorchRow,
    TorchSide,
    loss_fn,
    make_task,
    named,
    optimizer,
    shallow,
)
from torch import nn

import stalewise
from stalewise.methods import METHOD_NAMES
from stalewise.plan.partition import LayerCost, Partition, partition
from stalewise.runtime.exchange import all_gather_json
from stalewise.runtime.job import current_job

LARGE_BATCH = 256
QUICKER_AT_LEAST, QUICKER_AT_LEAST_LARGE = 1.4, 1.1
"""Of the best DSP row over the best torch row, for small batches and for large ones."""

LAST_LOSSES = 8
TOLERANCE = 1e-3
"""Largest difference of a loss from the plain loop's that rounding may explain in the first steps."""


# -- the rows: add methods here, schedules in sides.py --------------------------------------------------------------

OWN_ROWS = (
    named("bp", "bp"),
    named("gpipe", "gpipe", micro_batched=True, activations="stored"),
    named("1f1b", "1f1b", micro_batched=True),
    named("gpipe recompute", "gpipe", micro_batched=True),
    named("dsp minimal", "dsp"),
    named("dsp (K-1-k)", "dsp", staleness=shallow),
    named("dsp minimal stored", "dsp", activations="stored"),
    named("dsp (K-1-k) stored", "dsp", activations="stored", staleness=shallow),
    named("dsp (K-1-k)", "dsp", staleness=shallow, channels_last=True),
    named("dsp (K-1-k) stored", "dsp", activations="stored", staleness=shallow, channels_last=True),
)

LEGEND = """\
/ torch: step time over that of the torch row with the lowest median, round by round; below 1 is quicker than torch.
/ torch rc: the same, of the torch rows that recompute (torch.utils.checkpoint, use_reentrant=False).
M: micro-batches, the quickest of those tried. recomputes: stages that forward a second time before their backward.
kept per rank: most graphs that are alive at once, in batches (1: the graph of a stage for a whole batch; with two
  parts per rank each counts a half); where stages recompute, most stored inputs, and the graph in work; copies of
  the weights where there are several.
loss: mean over the same {last} steps in all rows, the last that all of them trained. Stale methods differ by what
  they are, micro-batched ones because their BatchNorm sees micro-batches: compare rows of equal M.
vs plain: largest difference of a loss from that of a plain loop over the unsplit model with as many micro-batches,
  in the first {check} steps; stale methods have none. NO marks differences above {tolerance:g}."""


def plain_losses(task: Task, micro_batches: int, count: int) -> list[float]:
    """Of a loop over the unsplit model, which averages the gradients of the micro-batches of a batch."""
    model = copy.deepcopy(task.model)
    model = model if isinstance(model, nn.Sequential) else nn.Sequential(*model)
    own = optimizer(model.parameters())
    losses = []
    for step in range(count):
        inputs, targets = task.batches[step % len(task.batches)]
        parts = []
        pairs = zip(inputs.chunk(micro_batches), targets.chunk(micro_batches), strict=True)
        for some_inputs, some_targets in pairs:
            loss = loss_fn(model(some_inputs), some_targets)
            (loss / micro_batches).backward()
            parts.append(loss.item())
        own.step()
        own.zero_grad(set_to_none=True)
        losses.append(statistics.fmean(parts))
    return losses


def steady_step_s(ends: Sequence[Sequence[int]], *, skipped: int) -> float:
    """Seconds per step while all ranks work.

    Args:
        ends: of the updates of each rank, in ns of one clock.
        skipped: first updates of each rank that do not count.
    """
    begin, end = max(own[min(skipped, len(own) - 4)] for own in ends), min(own[-1] for own in ends)
    steady = [[moment for moment in own if begin <= moment <= end] for own in ends]
    steady = [inner if len(inner) > 1 else [*own[-2:]] for inner, own in zip(steady, ends, strict=True)]
    return max((inner[-1] - inner[0]) / (len(inner) - 1) for inner in steady) / 1e9


# -- the race, in every worker ---------------------------------------------------------------------------------------


class Race:
    """Checks, trials and rounds of one batch size; every rank runs it alike.

    Args:
        task: what is trained.
        options: of the command line.
        out: where rank 0 writes what it found.
    """

    def __init__(self, task: Task, options: dict[str, Any], out: Path) -> None:
        self.task = task
        self.options = options
        self.out = out
        self.sides: dict[str, dict[int, Side]] = {}
        self.errors: dict[str, dict[int, str]] = {}
        self.times: dict[str, list[float]] = {}
        self.trials: dict[str, dict[int, list[float]]] = {}
        self.differences: dict[str, list[float]] = {}
        self.rows = {row.label: row for row in _rows(options["only"])}
        self.began = time.monotonic()

    def run(self) -> dict[str, Any]:
        self._check()
        for trial in range(self.options["trials"]):
            self._say(f"trial {trial + 1} of {self.options['trials']}")
            self._trial(trial)
        self._choose()
        for index in range(self.options["rounds"]):
            self._say(f"round {index + 1} of {self.options['rounds']}")
            self._round(index)
        return self._results()

    def _check(self) -> None:
        """Build every side, let it take its first steps, and compare the losses with the plain loop's."""
        count = self.options["check_steps"]
        tried = sorted({1, *self.options["micro_batches"]})
        self._say(f"plain loops with {tried} micro-batches")
        own = {
            micro_batches: plain_losses(self.task, micro_batches, count)
            for micro_batches in tried[self.task.job.rank :: self.task.num_stages]
        }
        gathered = all_gather_json([*own.items()], self.task.job.group)
        plain = {micro_batches: losses for pairs in gathered for micro_batches, losses in pairs}
        for label, row in self.rows.items():
            numbers = self.options["micro_batches"] if row.micro_batched else [1]
            self.sides[label], self.errors[label], self.trials[label] = {}, {}, {}
            if label in self.options["failed"]:
                self.errors[label][numbers[0]] = self.options["failed"][label]
                continue
            self._say(f"checking {label}")
            for micro_batches in numbers:
                make = OwnSide if isinstance(row, OwnRow) else TorchSide
                side = self._try(label, micro_batches, functools.partial(make, self.task, row, micro_batches))
                if side is not None:
                    self.sides[label][micro_batches] = side
                    self._take_time(label, micro_batches, count=count + side.depth)
            self.differences[label] = [
                abs(own_loss - plain_loss)
                for side in self.sides[label].values()
                if side.exact and side.micro_batches in plain
                for own_loss, plain_loss in zip(self._losses(side), plain[side.micro_batches], strict=False)
            ]

    def _trial(self, index: int) -> None:
        everyone = [(label, number) for label, sides in self.sides.items() for number in sides]
        random.Random(f"trial {index}").shuffle(everyone)
        for label, micro_batches in everyone:
            if micro_batches in self.sides[label]:
                known = self.trials[label][micro_batches]
                seconds = self._take_time(label, micro_batches, known[-1], 0.5)
                if seconds is not None:
                    # the first entry was the check's: of its first steps
                    self.trials[label][micro_batches] = [*(known if index else []), seconds]

    def _choose(self) -> None:
        """Keep the quickest number of micro-batches of each row."""
        for label, sides in self.sides.items():
            for micro_batches in sorted(sides, key=lambda number: min(self.trials[label][number]))[1:]:
                sides.pop(micro_batches).close()
            self.times[label] = []

    def _round(self, index: int) -> None:
        order = [label for label, sides in self.sides.items() if sides]
        random.Random(f"round {index}").shuffle(order)
        for label in order:
            (micro_batches,) = self.sides[label]
            known = statistics.median([*self.trials[label][micro_batches], *self.times[label]])
            seconds = self._take_time(label, micro_batches, known, 1.0)
            if seconds is not None:
                self.times[label].append(seconds)

    def _take_time(
        self, label: str, micro_batches: int, step_s: float = 0.0, share: float = 0.0, *, count: int | None = None
    ) -> float | None:
        """Seconds per step of a run; None, and the side is dropped, where it failed.

        Args:
            label: of the row.
            micro_batches: of the side.
            step_s: what a step takes, as far as known.
            share: of the seconds that the user gave to a run.
            count: steps of the run, where that is fixed.
        """
        side = self.sides[label][micro_batches]
        if count is None:
            count = max(8 + 3 * side.depth, round(share * self.options["seconds"] / step_s))
        ends = self._try(label, micro_batches, functools.partial(side.run, count))
        if ends is None:
            del self.sides[label][micro_batches]
            return None
        seconds = steady_step_s(all_gather_json(ends, self.task.job.group), skipped=max(2 + side.depth, count // 5))
        self.trials[label].setdefault(micro_batches, [seconds])
        return seconds

    def _try(self, label: str, micro_batches: int, work: Callable[[], Any]) -> Any:
        """What `work` returns; None, and a reason in `errors`, where it failed on any rank."""
        if self.task.job.rank == 0:
            self.out.write_text(json.dumps({"running": label}))
        all_gather_json(None, self.task.job.group)
        result = reason = None
        try:
            result = work()
        except stalewise.WorkerError:
            raise
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            if isinstance(self.rows[label], OwnRow) and self.sides[label].get(micro_batches):
                raise  # a method that fails in its steps ends the job: the others learn of it by themselves
        reasons = [text for text in all_gather_json(reason, self.task.job.group) if text]
        if reasons:
            self.errors[label][micro_batches] = min(reasons, key=lambda text: "imeout" in text or "imed out" in text)
            return None
        return result

    def _losses(self, side: Side) -> list[float]:
        """Of the rank that has the last stage, on every rank."""
        return max(all_gather_json(side.losses, self.task.job.group), key=len)

    def _results(self) -> dict[str, Any]:
        survivors = {label: side for label, sides in self.sides.items() for side in sides.values()}
        for side in survivors.values():
            side.close()
        common = min((side.steps for side in survivors.values()), default=0)
        rows = []
        for label, row in self.rows.items():
            side = survivors.get(label)
            found: dict[str, Any] = {
                "label": label,
                "torch": isinstance(row, TorchRow),
                "error": None,
                "trials_s": self.trials[label],
                "errors": self.errors[label],
            }
            if side is None:
                reasons = list(self.errors[label].values())
                found["error"] = reasons[-1] if reasons else "nothing ran"
            else:
                found |= {
                    "micro_batches": next(iter(self.sides[label])) if row.micro_batched else None,
                    "times_s": self.times[label],
                    "cuts": side.cuts,
                    "recomputes": side.recomputes,
                    "kept": side.kept,
                    "loss": statistics.fmean(self._losses(side)[common - LAST_LOSSES : common]),
                    "differences": self.differences[label],
                    "steps": side.steps,
                }
            rows.append(found)
        return {"rows": rows, "common_steps": common}

    def _say(self, text: str) -> None:
        if self.task.job.rank == 0:
            print(f"{time.monotonic() - self.began:6.0f} s  {text}", file=sys.stderr, flush=True)


def worker(options: dict[str, Any], batch_size: int, out: str) -> None:
    torch.set_num_threads(1)
    job = current_job()
    task = make_task(job, options["model"], batch_size, options["split"])
    results = Race(task, options, Path(out)).run()
    results["costs"] = [vars(cost) for cost in task.costs]
    if job.rank == 0:
        Path(out).write_text(json.dumps(results))


# -- the command -----------------------------------------------------------------------------------------------------


def _rows(only: Sequence[str]) -> list[OwnRow | TorchRow]:
    own = [row for row in OWN_ROWS if row.name in METHOD_NAMES]
    known_names = {row.name for row in own} | {"dsp-stored"}  # it has a row of another name
    own += [named(name, name) for name in METHOD_NAMES if name not in known_names]
    known: list[OwnRow | TorchRow] = [*TORCH_ROWS, *own]
    return [row for row in known if not only or any(text.lower() in row.label.lower() for text in only)]


def race(options: dict[str, Any], batch_size: int) -> dict[str, Any]:
    """The results of one batch size; a row that takes a worker down is left out and the race begun anew."""
    failed: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "results.json")
        while True:
            try:
                stalewise.launch(
                    worker, num_workers=options["stages"], args=[{**options, "failed": failed}, batch_size, str(out)]
                )
                found: dict[str, Any] = json.loads(out.read_text())
                return found
            except stalewise.WorkerError as error:
                label = json.loads(out.read_text()).get("running") if out.exists() else None
                if label is None or label in failed:
                    raise
                failed[label] = f"{error.cause_type}: {error.cause}"
                print(f"{label} ended the workers: {failed[label]}\nonce more without it", file=sys.stderr)


def _print(results: dict[str, Any], options: dict[str, Any], batch_size: int) -> None:
    rows = results["rows"]
    timed = [row for row in rows if row.get("times_s")]
    torch_rows = [row for row in timed if row["torch"]]
    quickest, quickest_rc = (
        min(some, key=lambda row: statistics.median(row["times_s"]), default=None)
        for some in (torch_rows, [row for row in torch_rows if row["recomputes"] != "-"])
    )

    def ratio(row: dict[str, Any], other: dict[str, Any] | None) -> str:
        if other is None:
            return "-"
        return spread([own / best for own, best in zip(row["times_s"], other["times_s"], strict=False)], 2)

    lines = []
    for row in rows:
        if row not in timed:
            continue
        exact = all(difference <= TOLERANCE for difference in row["differences"])
        lines.append(
            [
                row["label"],
                str(row["micro_batches"] or "-"),
                spread([1e3 * seconds for seconds in row["times_s"]], 1),
                f"{batch_size / statistics.median(row['times_s']):.0f}",
                ratio(row, quickest),
                ratio(row, quickest_rc),
                ",".join(map(str, row["cuts"])),
                row["recomputes"],
                row["kept"],
                f"{row['loss']:.4f}",
                f"{max(row['differences']):.0e}{'' if exact else ' NO'}" if row["differences"] else "-",
            ]
        )
    head = ["row", "M", "step ms", "samples/s", "/ torch", "/ torch rc"]
    head += ["cuts", "recomputes", "kept per rank", "loss", "vs plain"]
    print(
        f"\n{options['model']}, batch {batch_size}, K = {options['stages']}, split: {options['split']}, "
        f"{options['rounds']} rounds: median (min .. max); {results['common_steps']} steps or more per row"
    )
    print(table(head, lines))
    for row in rows:
        if row not in timed:
            print(f"  {row['label']}: {_short(row['error'] or 'nothing was timed')}")
    _print_trials(rows)
    costs = [LayerCost(**cost) for cost in results["costs"]]
    num_stages = options["stages"]
    flags = [options["split"] != "stored" and stage < num_stages - 1 for stage in range(num_stages)]
    plan: Partition = partition(costs, recompute=flags)
    print("\nthe split, from a profile of the layers alone" + (" (for rows that recompute)" if any(flags) else ""))
    print(plan.table())


def _verdicts(rows: Sequence[dict[str, Any]], batch_size: int) -> list[dict[str, Any]]:
    """The quickest DSP row against the quickest of torch; with recompute against the quickest of torch that has it."""
    timed = [row for row in rows if row.get("times_s")]
    own = [row for row in timed if row["label"].startswith("stalewise dsp")]
    others = [row for row in timed if row["torch"]]
    most = 1 / (QUICKER_AT_LEAST if batch_size < LARGE_BATCH else QUICKER_AT_LEAST_LARGE)
    found = []
    for what, limit, ours, theirs in (
        ("best dsp", most, own, others),
        (
            "best dsp that recomputes",
            1.0,
            [row for row in own if row["recomputes"] != "-"],
            [row for row in others if row["recomputes"] != "-"],
        ),
    ):
        if ours and theirs:
            one, other = (min(some, key=lambda row: statistics.median(row["times_s"])) for some in (ours, theirs))
            ratio = statistics.median(a / b for a, b in zip(one["times_s"], other["times_s"], strict=False))
            named = f"batch {batch_size}, {what} ({one['label']}) over the best such torch row ({other['label']})"
            found.append(verdict(named, ratio, limit))
    return found


def _print_trials(rows: Sequence[dict[str, Any]]) -> None:
    tried = [row for row in rows if len(row["trials_s"]) + len(row["errors"]) > 1]
    numbers = sorted({int(number) for row in tried for number in (*row["trials_s"], *row["errors"])})
    if not tried:
        return
    print("\ntrials, quickest step in ms, by the number of micro-batches")
    cells = [
        [
            row["label"],
            *(f"{1e3 * min(row['trials_s'][str(n)]):.1f}" if str(n) in row["trials_s"] else "x" for n in numbers),
        ]
        for row in tried
    ]
    print(table(["row", *map(str, numbers)], cells))
    for row in tried:
        for number, reason in row["errors"].items():
            print(f"  x {row['label']}, {number} micro-batches: {_short(reason)}")


def _short(reason: str) -> str:
    text = " ".join(reason.split())
    return text if len(text) <= 200 else f"{text[:200]}.."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet56")
    parser.add_argument("--stages", type=int, default=os.cpu_count())
    parser.add_argument("--batch-size", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=6.0, help="per row and round; half of it per trial")
    parser.add_argument("--trials", type=int, default=2, help="runs from which the number of micro-batches is chosen")
    parser.add_argument("--check-steps", type=int, default=8, help="that are compared with the plain loop")
    parser.add_argument("--micro-batches", type=int, nargs="+", default=[2, 4, 8, 16])
    parser.add_argument("--only", nargs="+", default=[], metavar="TEXT", help="rows whose name contains one of these")
    parser.add_argument(
        "--split",
        choices=["stored", "recompute", "own"],
        default="stored",
        help="same cuts for all rows, balanced for stages that store their graphs (suits torch) or that recompute "
        "except the last (suits DSP); or for each row those that suit it. All from one profile.",
    )
    add_out(parser)
    options = vars(parser.parse_args())
    out_file = options.pop("out")
    if options["check_steps"] < 4:
        parser.error("--check-steps is at least 4")
    if not _rows(options["only"]):
        parser.error(f"no row is called so; there are {', '.join(row.label for row in _rows([]))}")
    print(f"{machine()}; load {os.getloadavg()[0]:.1f} before the start")
    everything, verdicts = [], []
    for batch_size in options["batch_size"]:
        results = race(options, batch_size)
        _print(results, options, batch_size)
        everything.append({"batch_size": batch_size, **results})
        verdicts += _verdicts(results["rows"], batch_size)
        print(f"load {os.getloadavg()[0]:.1f} at the end; much above {options['stages']} says that others worked too")
    print("\n" + LEGEND.format(last=LAST_LOSSES, check=options["check_steps"], tolerance=TOLERANCE))
    leave(out_file, options, everything, verdicts)


if __name__ == "__main__":
    main()
