"""What channels last, bfloat16 autocast and `torch.compile` make of a pipeline's step time.

    python benchmarks/compute_options.py --model resnet20 --stages 3 --batch-size 64

All rows are the same DSP pipeline with the same cuts, trained in the same K processes in turn, with the cores shared
evenly. Layers are compiled in the warm-up rounds; without a C++ compiler those rows are left out. The loss is the mean
over the last steps that all rows trained: it shows that they train alike.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from common import machine, spread, table
from rounds import interleaved
from sides import OwnRow, OwnSide, make_task, named, shallow

import stalewise
from stalewise.runtime.exchange import all_gather_json
from stalewise.runtime.job import current_job

LAST_LOSSES = 8


def rows(options: dict[str, Any]) -> list[OwnRow]:
    """The plain one first."""
    settings = {"staleness": shallow, "activations": options["activations"]}
    return [
        named("dsp", "dsp", channels_last=channels_last, autocast=autocast, compile=compile, **settings)
        for compile in ((False, True) if shutil.which(os.environ.get("CXX", "g++")) else (False,))
        for autocast in (None, "bfloat16")
        for channels_last in (False, True)
    ]


def worker(options: dict[str, Any], out: str) -> None:
    torch.set_num_threads(options["threads"])
    job = current_job()
    task = make_task(job, options["model"], options["batch_size"], "stored")
    sides = {row.label: OwnSide(task, row, 1) for row in rows(options)}
    times = interleaved(sides, job, rounds=options["rounds"], seconds=options["seconds"])
    for side in sides.values():
        side.close()
    common = min(len(side.losses) for side in sides.values())
    sent = {name: sum(side.pipeline.bytes_sent()) / side.steps for name, side in sides.items()}
    losses = {name: statistics.fmean(side.losses[common - LAST_LOSSES : common]) for name, side in sides.items()}
    cuts = all_gather_json(next(iter(sides.values())).cuts, job.group)[0]
    if job.rank == 0:
        Path(out).write_text(json.dumps({"times": times, "losses": losses, "sent": sent, "cuts": cuts}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet56")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--stages", type=int, default=3)
    parser.add_argument("--threads", type=int, default=None, help="per stage; default: cores over stages")
    parser.add_argument("--activations", choices=["stored", "recompute"], default="stored")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=6.0, help="per row and round")
    options = vars(parser.parse_args())
    options["threads"] = options["threads"] or max(1, (os.cpu_count() or 1) // options["stages"])
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result.json"
        stalewise.launch(worker, num_workers=options["stages"], args=[options, str(out)])
        found = json.loads(out.read_text())
    print(f"{machine()}; load {os.getloadavg()[0]:.1f} at the end")
    print(
        f"{options['model']}, batch {options['batch_size']}, DSP (K-1-k) {options['activations']}, K = "
        f"{options['stages']}, cuts {tuple(found['cuts'])}, threads per stage {options['threads']}, "
        f"{options['rounds']} rounds: median (min .. max)"
    )
    plain = next(iter(found["times"].values()))
    lines = [
        [
            name,
            spread([1e3 * value for value in times], 1),
            spread([own / other for own, other in zip(times, plain, strict=True)]),
            f"{found['sent'][name] / 2**20:.2f}",
            f"{found['losses'][name]:.4f}",
        ]
        for name, times in found["times"].items()
    ]
    print(table(["row", "ms per batch", "/ plain", "MiB sent per batch", "loss"], lines))


if __name__ == "__main__":
    main()
