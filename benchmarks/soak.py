"""Whether a long run holds on to anything: memory, file descriptors, threads.

Trains a small network in a process per core with DSP, with steps that are slow on purpose, an evaluation 40 times,
and a checkpoint 100 times. Every process notes what it holds 400 times:

    python benchmarks/soak.py                     # 20,000 steps
    python benchmarks/soak.py --steps 400         # a short form

After a tenth of the steps as warm-up, the first and the last tenth of the notes that are left are compared. Required is
that the median resident memory of every process (the workers and the one that launched them) grows by less than 1%,
and that no process has more file descriptors or threads at the end, of which the fewest count, as a checkpoint that is
being written holds some for a while; else the exit code is 1. A run with
`--folder` that was interrupted goes on from its newest checkpoint when it is started again; what its processes held is
then judged for each start by itself.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from common import machine, table
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import stalewise
from stalewise.methods import build_method
from stalewise.protocol.stragglers import Straggler

LIMIT = 0.01
"""By which resident memory may grow."""

CLASSES, FEATURES, WIDTH = 10, 32, 64


class RandomBatches:
    """Batches that are made when they are asked for, each from a seed of its own; can be brought to any place."""

    def __init__(self, begin: int, end: int, size: int) -> None:
        self._next, self._end, self._size = begin, end, size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        while self._next < self._end:
            generator = torch.Generator().manual_seed(self._next)
            self._next += 1
            inputs = torch.randn(self._size, FEATURES, generator=generator)
            yield inputs, inputs[:, :CLASSES].argmax(dim=1)

    def state_dict(self) -> dict[str, int]:
        """Where it stands."""
        return {"next": self._next}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Bring it there."""
        self._next = state["next"]


def accuracy(output: Tensor, target: Tensor) -> Tensor:
    """Fraction of samples whose largest logit is the target's."""
    return (output.argmax(dim=1) == target).float().mean()


def network(stages: int) -> nn.Sequential:
    """Two hidden layers a stage, with Dropout and BatchNorm."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for stage in range(stages):
        layers += [nn.Linear(FEATURES if stage == 0 else WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.ReLU()]
        layers += [nn.Linear(WIDTH, WIDTH), nn.Dropout(0.1)]
    return nn.Sequential(*layers[:-2], nn.Linear(WIDTH, CLASSES))


def holding(process: int | str) -> dict[str, int]:
    """What a process holds now: resident bytes, open file descriptors, threads."""
    rollup = Path(f"/proc/{process}/smaps_rollup").read_text()
    resident = next(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Rss:"))
    return {
        "resident": 1024 * resident,
        "descriptors": len(os.listdir(f"/proc/{process}/fd")),
        "threads": len(os.listdir(f"/proc/{process}/task")),
    }


def train(folder: str, options: dict[str, Any]) -> None:
    """In a worker: train, save, evaluate, and note what is held."""
    path = Path(folder)
    torch.set_num_threads(1)
    stages, size = options["stages"], options["batch_size"]
    pipeline = stalewise.Pipeline(
        network(stages),
        method=build_method(options["method"], num_stages=stages),
        loss_fn=cross_entropy,
        optimizer=lambda params: torch.optim.SGD(params, lr=0.01, momentum=0.9),
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1000, gamma=0.9),
        partition=[5 * stage for stage in range(1, stages)],
        stragglers=Straggler(probability=0.05, factor=3.0),
        seed=0,
    )
    point = pipeline.resume(path / "checkpoints", missing_ok=True)
    seen = 0 if point is None else int(point.extra)
    life = options["life"]
    own = (path / f"held.{pipeline.rank}.{life}.jsonl").open("a", encoding="utf-8")
    parent = (path / f"held.launcher.{life}.jsonl").open("a", encoding="utf-8") if pipeline.rank == 0 else None
    times: list[float] = []
    first = pipeline.num_batches // options["epoch"] * options["epoch"]
    if point is not None and point.session_batches is None:
        first = pipeline.num_batches
    for begin in range(first, options["steps"], options["epoch"]):
        end = min(begin + options["epoch"], options["steps"])
        batches = RandomBatches(begin, end, size) if pipeline.rank == 0 else None
        last = time.perf_counter()
        for _ in pipeline.train(batches):
            seen += 1
            now = time.perf_counter()
            times.append(now - last)
            if seen % options["note_every"] == 0:
                own.write(json.dumps({"step": seen, "times": times, **holding("self")}) + "\n")
                own.flush()
                times.clear()
                if parent is not None:
                    parent.write(json.dumps({"step": seen, **holding(os.getppid())}) + "\n")
                    parent.flush()
            if seen % options["save_every"] == 0:
                pipeline.save(path / "checkpoints", keep=2, extra=seen)
            last = time.perf_counter()
        score = pipeline.evaluate(RandomBatches(-4, 0, 100) if pipeline.rank == 0 else None, accuracy)
        if pipeline.rank == 0:
            print(f"{seen} steps, accuracy {score:.3f}", file=sys.stderr, flush=True)
    pipeline.wait_saved()


def judge(path: Path, warm_up: float) -> tuple[list[list[str]], list[str], list[float]]:
    """The rows of the table, what is not as required, and the step times of rank 0 after warm-up, in seconds."""
    rows, failures, times = [], [], []
    for file in sorted(path.glob("held.*.jsonl")):
        _, process, life, _ = file.name.split(".")
        notes = [json.loads(line) for line in file.read_text().splitlines()]
        kept = notes[max(1, round(warm_up * len(notes))) :]
        name = ("launcher" if process == "launcher" else f"stage {process}") + (
            f", start {life}" if life != "0" else ""
        )
        if len(kept) < 2:
            failures.append(f"{name}: {len(notes)} notes are too few to judge")
            continue
        if process == "0":
            times += [value for note in kept for value in note["times"]]
        part = max(1, len(kept) // 10)
        before, after = (
            {
                "resident": statistics.median(note["resident"] for note in some),
                **{what: min(note[what] for note in some) for what in ("descriptors", "threads")},
            }
            for some in (kept[:part], kept[-part:])
        )
        growth = after["resident"] / before["resident"] - 1
        if growth >= LIMIT:
            failures.append(f"{name}: resident memory grows by {growth:.2%}")
        for what in ("descriptors", "threads"):
            if after[what] > before[what]:
                failures.append(f"{name}: {before[what]:.0f} {what} after warm-up, {after[what]:.0f} at the end")
        rows.append(
            [
                name,
                f"{kept[0]['step']} .. {kept[-1]['step']}",
                f"{before['resident'] / 2**20:.2f}",
                f"{after['resident'] / 2**20:.2f}",
                f"{growth:+.2%}",
                *(f"{before[what]:.0f} -> {after[what]:.0f}" for what in ("descriptors", "threads")),
            ]
        )
    return rows, failures, times


def main() -> None:
    """Run, print, judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--stages", type=int, default=os.cpu_count() or 1, help="default: the cores of this machine")
    parser.add_argument("--method", default="dsp")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--epoch", type=int, help="batches between drains and evaluations (default: steps / 40)")
    parser.add_argument("--save-every", type=int, help="batches between checkpoints (default: steps / 100)")
    parser.add_argument("--note-every", type=int, help="batches between notes (default: steps / 400)")
    parser.add_argument("--warm-up", type=float, default=0.1, help="share of the notes that does not count")
    parser.add_argument("--folder", type=Path, help="keep checkpoints and notes here, and go on from them")
    parser.add_argument("--out", type=Path, help="also write the result as JSON")
    arguments = parser.parse_args()
    for name, share in (("epoch", 40), ("save_every", 100), ("note_every", 400)):
        setattr(arguments, name, getattr(arguments, name) or max(1, arguments.steps // share))
    options = {name: value for name, value in vars(arguments).items() if name not in ("folder", "out")}
    print(machine())
    print(", ".join(f"{name} {value}" for name, value in options.items()), flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        path = arguments.folder or Path(temporary)
        path.mkdir(parents=True, exist_ok=True)
        life = len(list(path.glob("held.launcher.*.jsonl")))
        stalewise.launch(train, num_workers=arguments.stages, args=[str(path), {**options, "life": life}])
        rows, failures, times = judge(path, arguments.warm_up)
    head = ["process", "steps", "MiB after warm-up", "MiB at the end", "growth", "descriptors", "threads"]
    print(table(head, rows))
    centiles = statistics.quantiles(times, n=100)
    print(
        f"step time of stage 0: median {1e3 * centiles[49]:.2f} ms, 99th percentile {1e3 * centiles[98]:.2f} ms, "
        f"longest {1e3 * max(times):.2f} ms, {len(times)} steps"
    )
    print("\n".join(f"NOT MET: {failure}" for failure in failures) or "MET: nothing grows")
    if arguments.out is not None:
        result = {
            "machine": machine(),
            "options": options,
            "head": head,
            "rows": rows,
            "step_ms": {"median": 1e3 * centiles[49], "p99": 1e3 * centiles[98], "longest": 1e3 * max(times)},
            "failures": failures,
        }
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
