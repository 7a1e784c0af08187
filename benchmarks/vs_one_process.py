"""DSP against what needs no pipeline: one process with all cores, and data parallelism over all cores.

    python benchmarks/vs_one_process.py --model resnet56 --batch-size 64 256

All sides train the same model with the same samples per update, in the same K processes in turn (K = cores unless
--stages says otherwise; the cores are shared evenly). One process uses all cores, the other ranks wait. Data
parallelism is torch's DistributedDataParallel with a K-th of the batch on each rank; its BatchNorm sees that part.
Each with contiguous images and with channels last (`--format` takes one of them).
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from common import add_out, leave, machine, spread, table
from rounds import interleaved
from sides import Batch, OwnSide, Side, Task, loss_fn, make_task, named, optimizer, shallow
from torch import nn

import stalewise
from stalewise.runtime.data_parallel import DataParallel
from stalewise.runtime.job import current_job

OWN = ("dsp (K-1-k) stored", "dsp (K-1-k) recompute")
FORMATS = {
    "contiguous": (("", False),),
    "channels-last": ((", channels last", True),),
    "both": (("", False), (", channels last", True)),
}
ONE_PROCESS, DATA_PARALLEL = "one process", "data parallel"


def unsplit(task: Task, *, channels_last: bool) -> nn.Sequential:
    """A copy of the model, its weights so in memory."""
    model = copy.deepcopy(task.model)
    whole = model if isinstance(model, nn.Sequential) else nn.Sequential(*model)
    return whole.to(memory_format=torch.channels_last) if channels_last else whole


class OneProcess(Side):
    """The loop that everybody writes, on rank 0 with all cores."""

    def __init__(self, task: Task, *, channels_last: bool) -> None:
        super().__init__(task)
        self.depth = 0
        self._model = unsplit(task, channels_last=channels_last)
        self._optimizer = optimizer(self._model.parameters())

    def train(self, batches: Sequence[Batch]) -> list[int]:
        if self.task.job.rank:
            return []
        ends = []
        threads = torch.get_num_threads()
        torch.set_num_threads(os.cpu_count() or 1)
        for inputs, targets in batches:
            loss = loss_fn(self._model(inputs), targets)
            loss.backward()
            self._optimizer.step()
            self._optimizer.zero_grad(set_to_none=True)
            self.losses.append(loss.item())
            ends.append(time.perf_counter_ns())
        torch.set_num_threads(threads)
        return ends

    def close(self) -> None:
        pass


class AllRanks(Side):
    """Data parallelism."""

    def __init__(self, task: Task, *, channels_last: bool) -> None:
        super().__init__(task)
        self.depth = 0
        self._parallel = DataParallel(
            unsplit(task, channels_last=channels_last),
            loss_fn=loss_fn,
            optimizer=optimizer,
            device=torch.device("cpu"),
        )

    def train(self, batches: Sequence[Batch]) -> list[int]:
        ends = []
        for loss in self._parallel.train(batches):
            self.losses.append(loss)
            ends.append(self.task.job.clock())
        return ends

    def close(self) -> None:
        pass


def make_sides(task: Task, *, channels_last: bool) -> dict[str, Side]:
    """By name."""
    stored = named(OWN[0], "dsp", staleness=shallow, activations="stored", channels_last=channels_last)
    recompute = named(OWN[1], "dsp", staleness=shallow, channels_last=channels_last)
    return {
        OWN[0]: OwnSide(task, stored, 1),
        OWN[1]: OwnSide(task, recompute, 1),
        ONE_PROCESS: OneProcess(task, channels_last=channels_last),
        DATA_PARALLEL: AllRanks(task, channels_last=channels_last),
    }


def worker(options: dict[str, Any], batch_size: int, out: str) -> None:
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // options["stages"]))
    job = current_job()
    task = make_task(job, options["model"], batch_size, "own")
    sides = {
        f"{name}{suffix}": side
        for suffix, channels_last in FORMATS[options["format"]]
        for name, side in make_sides(task, channels_last=channels_last).items()
    }
    times = interleaved(sides, job, rounds=options["rounds"], seconds=options["seconds"])
    for side in sides.values():
        side.close()
    if job.rank == 0:
        Path(out).write_text(json.dumps({"times": times}))


def in_words(times: dict[str, list[float]], batch_size: int) -> str:
    """The quickest DSP row against the quickest of the others."""
    medians = {name: statistics.median(own) for name, own in times.items()}
    own = min((name for name in medians if name.startswith(OWN)), key=medians.__getitem__)
    other = min((name for name in medians if not name.startswith(OWN)), key=medians.__getitem__)
    ratio = medians[own] / medians[other]
    return f"verdict: batch {batch_size}: the quickest DSP row ({own}) takes {ratio:.2f} of the time of {other}"


def main() -> None:
    cores = os.cpu_count() or 1
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet56")
    parser.add_argument("--batch-size", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--stages", type=int, default=cores)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=3.0, help="per side and round")
    parser.add_argument("--format", choices=[*FORMATS], default="both", help="of images in memory")
    add_out(parser)
    options = vars(parser.parse_args())
    out_file = options.pop("out")
    print(machine())
    results = []
    for batch_size in options["batch_size"]:
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "result.json"
            stalewise.launch(worker, num_workers=options["stages"], args=[options, batch_size, str(out)])
            times = json.loads(out.read_text())["times"]
        results.append({"batch_size": batch_size, "times_s": times})
        print(
            f"\n{options['model']}, batch {batch_size}, K = {options['stages']} processes, one process with {cores} "
            f"threads, {options['rounds']} rounds: median (min .. max); load {os.getloadavg()[0]:.1f} at the end"
        )
        lines = []
        for name, own in times.items():
            suffix = ", channels last" if name.endswith(", channels last") else ""
            ratios = [
                spread([mine / other for mine, other in zip(own, times[rival + suffix], strict=True)])
                for rival in (ONE_PROCESS, DATA_PARALLEL)
            ]
            lines.append([name, spread([1e3 * value for value in own], 1), *ratios])
        print(table(["side", "ms per batch", "/ one process", "/ data parallel"], lines))
        print(in_words(times, batch_size))
    print("\nratios are of the same memory format, round by round; below 1 is quicker")
    leave(out_file, options, results)


if __name__ == "__main__":
    main()
