"""DSP on one GPU that its stages share, forwards overlapped with backwards and not, against bp and one process.

    python benchmarks/accelerator.py --model resnet56 --stages 3 --batch-size 64 256

All sides train the same model from the same weights on the same batches, in the same K processes in turn; in one
process rank 0 works and the others wait. A time is from the first step of a round until the GPU has done the last,
with the pipelines filled before. No side looks at its losses within a round (`nonfinite_loss="go-on"`). Activations
cross host memory, because NCCL wants a GPU per process. Stages of several processes take turns on a GPU unless its
multi-process service (MPS) runs, so overlap gains nothing across stages without it.

Without a GPU it says so and ends well. `--device cpu` tries the command itself; its times mean nothing.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import random
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from common import add_out, leave, machine, spread, table
from sides import Batch, OwnSide, Side, Task, loss_fn, make_task, named, optimizer
from torch import Tensor, nn

import stalewise
from stalewise.engine.streams import streams_of
from stalewise.runtime.exchange import all_gather_json
from stalewise.runtime.job import Job, current_job

ONE_PROCESS = "one process"
WARM_UP = 2


class OneProcess(Side):
    """The loop that everybody writes, on rank 0, with copies from pinned memory; losses are read after the loop."""

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        self.depth = 0
        self._device = torch.device(task.device)
        model = copy.deepcopy(task.model)
        self._model = (model if isinstance(model, nn.Sequential) else nn.Sequential(*model)).to(self._device)
        self._optimizer = optimizer(self._model.parameters())
        streams = streams_of(self._device)
        self._pinned = {id(part): streams.pinned(part) for batch in task.batches for part in batch}

    def train(self, batches: Sequence[Batch]) -> list[int]:
        losses: list[Tensor] = []
        for batch in batches if self.task.job.rank == 0 else ():
            inputs, targets = (self._pinned[id(part)].to(self._device, non_blocking=True) for part in batch)
            loss = loss_fn(self._model(inputs), targets)
            loss.backward()
            self._optimizer.step()
            self._optimizer.zero_grad(set_to_none=True)
            losses.append(loss.detach())
        self.losses += [loss.item() for loss in losses]
        return []

    def close(self) -> None:
        pass


def make_sides(task: Task) -> dict[str, Side]:
    """By name; bp and one process are the same computation."""
    on_gpu = torch.device(task.device).type == "cuda"
    unseen = {"nonfinite_loss": "go-on"}
    recompute, stored = named("dsp", "dsp"), named("dsp", "dsp", activations="stored")
    sides: dict[str, Side] = {"dsp recompute, overlap off": OwnSide(task, recompute, 1, overlap=False, **unseen)}
    if on_gpu:
        sides["dsp recompute, overlap on"] = OwnSide(task, recompute, 1, overlap=True, **unseen)
    sides["dsp stored"] = OwnSide(task, stored, 1, **unseen)
    sides["bp"] = OwnSide(task, named("bp", "bp"), 1, **unseen)
    sides[ONE_PROCESS] = OneProcess(task)
    return sides


def step_s(side: Side, job: Job, count: int) -> float:
    """Seconds per step, from when all ranks are ready until the device of every rank is; collective."""
    device = torch.device(side.task.device)
    _done(device, job)
    began = time.perf_counter()
    side.run(count)
    _done(device, job)
    return (time.perf_counter() - began) / count


def _done(device: torch.device, job: Job) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    all_gather_json(None, job.group)


def worker(options: dict[str, Any], batch_size: int, out: str) -> None:
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // options["stages"]))
    job = current_job()
    task = make_task(job, options["model"], batch_size, "own", device=options["device"])
    sides = make_sides(task)
    times: dict[str, list[float]] = {name: [] for name in sides}
    for index in range(-WARM_UP, options["rounds"]):
        order = list(sides)
        random.Random(f"round {index}").shuffle(order)
        for name in order:
            least = 2 * sides[name].depth + 2
            taken = step_s(sides[name], job, least if index < 0 else max(least, options["steps"]))
            times[name] += [taken] if index >= 0 else []
    for side in sides.values():
        side.close()
    peaks = all_gather_json(
        torch.cuda.max_memory_allocated() if torch.device(task.device).type == "cuda" else 0, job.group
    )
    if job.rank == 0:
        Path(out).write_text(json.dumps({"times": times, "peak_bytes_of_all_sides": peaks}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet56")
    parser.add_argument("--batch-size", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--stages", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=50, help="per side and round")
    parser.add_argument("--device", default="cuda:0")
    add_out(parser)
    options = vars(parser.parse_args())
    out_file = options.pop("out")
    on_gpu = options["device"].startswith("cuda")
    if on_gpu and not torch.cuda.is_available():
        print("skipped: this machine has no CUDA device that torch can use")
        return
    print(f"{torch.cuda.get_device_name(options['device']) if on_gpu else 'no GPU'}; {machine()}")
    results = []
    for batch_size in options["batch_size"]:
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "result.json"
            stalewise.launch(worker, num_workers=options["stages"], args=[options, batch_size, str(out)])
            found = json.loads(out.read_text())
        times = found["times"]
        results.append({"batch_size": batch_size, **found})
        print(
            f"\n{options['model']}, batch {batch_size}, K = {options['stages']} processes on one device, "
            f"{options['rounds']} rounds of {options['steps']} steps: median (min .. max)"
        )
        lines = [
            [
                name,
                spread([1e3 * value for value in own], 2),
                f"{batch_size / sorted(own)[len(own) // 2]:.0f}",
                spread([mine / other for mine, other in zip(own, times[ONE_PROCESS], strict=True)]),
            ]
            for name, own in times.items()
        ]
        print(table(["side", "ms per batch", "samples/s", "/ one process"], lines))
    leave(out_file, options, results)


if __name__ == "__main__":
    main()
