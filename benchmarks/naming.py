"""How many steps it takes until a stage that has become slow is named, live.

    python benchmarks/naming.py
    python benchmarks/naming.py --factor 1.5 --jitter

Each stage in turn takes twice as long from some update on, for ever. Rank 0 watches the statuses that the stages
publish twice a second, as `stalewise train` does. The latency is counted in updates of stage 0, from the first slow one
until the stage is named; it includes the time that the statuses take.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from common import machine, spread, table
from sides import loss_fn, optimizer

import stalewise
from stalewise.models import build_model
from stalewise.protocol.bottleneck import Bottleneck, BottleneckWatch
from stalewise.protocol.stragglers import Straggler
from stalewise.runtime.job import current_job


def worker(options: dict[str, Any], stage: int, out: str) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    job = current_job()
    first, seed = options["first"], options["seed"]
    stragglers = [Straggler(stages=(stage,), factor=options["factor"], first=first, seed=seed)]
    if options["jitter"]:
        stragglers.append(Straggler(probability=1 / 3, factor=1.5, seed=seed + 1))
    pipeline = stalewise.Pipeline(
        build_model(options["model"], num_classes=10),
        method=stalewise.DSP.minimal(num_stages=job.world_size),
        loss_fn=loss_fn,
        optimizer=optimizer,
        partition=options["cuts"] or "profile",
        stragglers=stragglers,
        verbose=False,
    )
    size = options["batch_size"]
    batch = (torch.randn(size, 3, 32, 32), torch.randint(0, 10, (size,)))
    watch = BottleneckWatch(job.world_size, locked=False)
    named: list[dict[str, Any]] = []
    for updates, _ in enumerate(pipeline.train([batch] * (first + options["steps"])), start=1):
        if job.rank == 0 and watch.update(pipeline.statuses()):
            named.append({"updates": updates, "found": watch.current and watch.current.as_dict()})
    if job.rank == 0:
        Path(out).write_text(json.dumps(named))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet20")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--stages", type=int, default=3)
    parser.add_argument("--cuts", type=int, nargs="*", default=[], help="default: a profile")
    parser.add_argument("--factor", type=float, default=2.0)
    parser.add_argument("--first", type=int, default=80, help="update from which on the stage is slow")
    parser.add_argument("--steps", type=int, default=80, help="after it")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jitter", action="store_true", help="and any step 50%% slower, one of three")
    options = vars(parser.parse_args())
    print(f"{machine()}; load {os.getloadavg()[0]:.1f} before the start")
    rows = []
    for stage in range(options["stages"]):
        latencies, told, since, factors = [], 0, [], []
        for round_index in range(options["rounds"]):
            with tempfile.TemporaryDirectory() as folder:
                out = Path(folder, "named.json")
                settings = {**options, "seed": options["seed"] + 2 * round_index}
                stalewise.launch(worker, num_workers=options["stages"], args=[settings, stage, str(out)])
                named = json.loads(out.read_text())
            for telling in named:
                found = Bottleneck.from_record(telling["found"]) if telling["found"] else None
                slow = found is not None and found.stage == stage and found.kind == "compute"
                if found is not None and slow and found.update >= options["first"]:
                    told += 1
                    latencies.append(telling["updates"] - options["first"])
                    since.append(found.since_update - options["first"])
                    factors.append(found.factor)
                    break
        rows.append(
            [
                str(stage),
                f"{told} of {options['rounds']}",
                spread(latencies, 0) if latencies else "-",
                spread(since, 0) if since else "-",
                spread(factors, 2) if factors else "-",
            ]
        )
    print(
        f"{options['model']}, batch {options['batch_size']}, K = {options['stages']}, minimal DSP, one stage "
        f"{options['factor']:g} times as slow from update {options['first']} on: median (min .. max)"
    )
    print(table(["slow stage", "named", "latency, steps", "stated begin - true", "stated factor"], rows))
    print(f"load {os.getloadavg()[0]:.1f} at the end")


if __name__ == "__main__":
    main()
