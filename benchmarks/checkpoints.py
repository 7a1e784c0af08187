"""What a checkpoint costs, and how soon a killed job trains again.

Trains a ResNet for CIFAR on random images in a process per stage, saves every few batches, kills one stage with
SIGKILL, and lets the job start again from its newest checkpoint:

    python benchmarks/checkpoints.py --model resnet110 --stages 3 --tries 3 --out checkpoints.json
    python benchmarks/checkpoints.py --model resnet8 --stages 2 --batch-size 8 --saves 2      # a short form

Printed are, per stage, for how long it is held up by a checkpoint (the copy to host memory); the size of a checkpoint
and the time until it is complete on disk; and the time from the SIGKILL to the end of the first step after the restart.
Another try begins only if there is time for it; one that takes longer than is left is ended, and those before it count.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import machine, spread, table
from torch import Tensor
from torch.nn.functional import cross_entropy

import stalewise
from stalewise.checkpoint.folder import complete_checkpoints, verify
from stalewise.engine.stage import Stage
from stalewise.methods import build_method
from stalewise.models import build_model
from stalewise.runtime.job import restart_count


def batches(count: int, size: int) -> list[tuple[Tensor, Tensor]]:
    """Random images and labels; all batches are the same one."""
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randn(size, 3, 32, 32, generator=generator), torch.randint(10, (size,), generator=generator))
    ] * count


def train(folder: str, arguments: dict[str, Any]) -> None:
    """In a worker: train and save; in the first life of the job, kill the asked stage; note times."""
    path = Path(folder)
    torch.manual_seed(0)
    model = build_model(arguments["model"], num_classes=10)
    for layer in model:
        layer.to(memory_format=torch.channels_last)
    pipeline = stalewise.Pipeline(
        model,
        method=build_method(arguments["method"], num_stages=arguments["stages"]),
        loss_fn=cross_entropy,
        optimizer=lambda params: torch.optim.SGD(params, lr=0.01, momentum=0.9, weight_decay=5e-4),
        seed=0,
        verbose=False,
    )
    every, saves = arguments["every"], arguments["saves"]
    kill_at = every * (saves + 1) - every // 2
    data = batches(kill_at + 2 * every, arguments["batch_size"])
    point = pipeline.resume(path / "checkpoints", positioned=True, missing_ok=True)
    first_life = restart_count() == 0
    _note_first_update(path, pipeline.rank, first_life)
    seen = 0 if point is None else point.extra
    start = time.perf_counter()
    steps = []
    for _ in pipeline.train(data[0 if point is None else point.batches :] if pipeline.rank == 0 else None):
        seen += 1
        steps.append(time.perf_counter() - start)
        if first_life and seen == kill_at:
            pipeline.wait_saved()
            (path / f"steps.{pipeline.rank}").write_text(json.dumps(steps))
            if pipeline.rank == arguments["kill"]:
                (path / "killed").write_text(repr(time.monotonic()))
                os.kill(os.getpid(), signal.SIGKILL)
        if seen % every == 0:
            begin = time.monotonic()
            pipeline.save(path / "checkpoints", extra=seen)
            if first_life and seen == every:
                pipeline.wait_saved()
                (path / "complete").write_text(repr(time.monotonic() - begin))
        start = time.perf_counter()


def _note_first_update(path: Path, rank: int, first_life: bool) -> None:
    """Note when this stage has done its first update after a restart."""
    update = Stage.update

    def noted(stage: Stage) -> None:
        update(stage)
        if not (file := path / f"first.{rank}").exists() and not first_life:
            file.write_text(repr(time.monotonic()))

    Stage.update = noted  # type: ignore[method-assign]


def measure(arguments: dict[str, Any]) -> dict[str, Any]:
    """One job with its kill and its restart: seconds and megabytes."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        stalewise.launch(train, num_workers=arguments["stages"], args=[folder, arguments], max_restarts=1)
        manifests = [verify(checkpoint) for checkpoint in complete_checkpoints(path / "checkpoints")]
        killed = float((path / "killed").read_text())
        return {
            "stopped_s": [manifest.stopped_s for manifest in manifests],
            "megabytes": [sum(record.size for record in manifest.files.values()) / 1e6 for manifest in manifests],
            "complete_s": float((path / "complete").read_text()),
            "restart_s": max(float(file.read_text()) for file in path.glob("first.*")) - killed,
            "steps_s": json.loads((path / "steps.0").read_text())[arguments["every"] :],
        }


class TimeIsOver(Exception):
    """Nothing is to be measured any more."""


def _time_is_over(number: int, frame: object) -> None:
    raise TimeIsOver


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet110")
    parser.add_argument("--method", default="dsp")
    parser.add_argument("--stages", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--every", type=int, default=4, help="batches between checkpoints (default 4)")
    parser.add_argument("--saves", type=int, default=5, help="checkpoints before the kill (default 5)")
    parser.add_argument("--kill", type=int, default=1, help="stage that is killed (default 1)")
    parser.add_argument("--tries", type=int, default=1, help="jobs (default 1)")
    parser.add_argument("--seconds", type=int, default=360, help="end after so long (default 360)")
    parser.add_argument("--out", type=Path, help="also write what was measured as JSON")
    arguments = vars(parser.parse_args())
    out, seconds = arguments.pop("out"), arguments.pop("seconds")
    print(machine())
    print(", ".join(f"{name} {value}" for name, value in arguments.items()))
    tries: list[dict[str, Any]] = []
    signal.signal(signal.SIGALRM, _time_is_over)
    signal.alarm(seconds)
    begin, longest = time.monotonic(), 0.0
    try:
        while len(tries) < arguments["tries"] and time.monotonic() - begin + longest < seconds:
            start = time.monotonic()
            tries.append(measure(arguments))
            longest = max(longest, time.monotonic() - start)
    except TimeIsOver:
        print(f"a try was ended after {seconds} s in all")
    signal.alarm(0)
    if not tries:
        sys.exit(f"no try ended within {seconds} s; give more --seconds, a smaller --model or fewer --saves")
    if out is not None:
        out.write_text(json.dumps({"machine": machine(), "options": arguments, "tries": tries}, indent=1) + "\n")
    stops = [stop for found in tries for stop in found["stopped_s"]]
    sizes = [size for found in tries for size in found["megabytes"]]
    steps = [step for found in tries for step in found["steps_s"]]
    completions = [found["complete_s"] for found in tries]
    restarts = [found["restart_s"] for found in tries]
    rows = [
        [str(stage), spread([1e3 * stop[stage] for stop in stops], 1), str(len(stops))]
        for stage in range(arguments["stages"])
    ]
    print(table(["stage", "held up by a checkpoint, ms", "checkpoints"], rows))
    print(f"a step between two losses without the save: {1e3 * statistics.median(steps):.0f} ms (median)")
    print(f"size of a checkpoint: {spread(sizes, 1)} MB, of which each batch in flight keeps its inputs")
    print(f"until it is complete on disk: {spread(completions, 2)} s")
    print(f"from the SIGKILL until every stage has done a step after the restart: {spread(restarts, 1)} s")


if __name__ == "__main__":
    main()
