"""Peak memory of every stage, beside that of torch.distributed.pipelining.

    python benchmarks/memory.py --model resnet56 --batch-size 64 --stages 3

Every row trains in fresh processes, on the same cuts and batches. The model has not been built when a process notes
its resident size; "resident" is how far the most that it ever had rose above that: the same measure for both sides.
It holds everything, such as workspaces and memory that was freed and kept. For rows of stalewise the bytes of tensors
that a stage held between two actions stand beside it: measured (in processes of their own, because measuring takes
memory), predicted for stages that keep step, and predicted at most, for any timing.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from common import add_out, leave, machine, spread, table, verdict
from sides import (
    TORCH_ROWS,
    OwnRow,
    OwnSide,
    Task,
    TorchRow,
    TorchSide,
    make_batches,
    make_task,
    named,
    shallow,
)
from torch import nn

import stalewise
from stalewise.engine.memory import resident_bytes
from stalewise.models import build_model
from stalewise.plan.memory import predict_memory
from stalewise.plan.partition import LayerCost, fixed_partition
from stalewise.runtime.exchange import all_gather_json
from stalewise.runtime.job import current_job

ROWS: dict[str, OwnRow | TorchRow] = {
    row.label: row
    for row in (
        named("dsp minimal", "dsp"),
        named("dsp minimal stored", "dsp", activations="stored"),
        named("dsp (K-1-k)", "dsp", staleness=shallow),
        named("dsp (K-1-k) stored", "dsp", activations="stored", staleness=shallow),
        named("ddg", "ddg"),
        named("pipedream", "pipedream"),
        named("gpipe stored", "gpipe", micro_batched=True, activations="stored"),
        named("gpipe recompute", "gpipe", micro_batched=True),
        named("1f1b", "1f1b", micro_batched=True),
        *(row for row in TORCH_ROWS if row.parts == 1),
    )
}
MIB = 1 << 20


def profile(options: dict[str, Any], out: str) -> None:
    """Rank 0 leaves what the layers cost, and the cuts of all rows."""
    torch.set_num_threads(1)
    task = make_task(current_job(), options["model"], options["batch_size"], "stored")
    if task.job.rank == 0:
        cuts = task.cuts([False] * task.num_stages)
        Path(out).write_text(json.dumps({"costs": [vars(cost) for cost in task.costs], "cuts": cuts}))


def train(label: str, options: dict[str, Any], measures: bool, profiled: str, out: str) -> None:
    """One row; rank 0 leaves what every rank took."""
    torch.set_num_threads(1)
    job = current_job()
    row = ROWS[label]
    costs = [LayerCost(**cost) for cost in json.loads(Path(profiled).read_text())["costs"]]
    batches = make_batches(options["batch_size"])
    load_libraries()
    before = begin_peak()
    torch.manual_seed(0)
    model = build_model(options["model"], num_classes=10)
    task = Task(job, model, batches, costs, "stored")
    if isinstance(row, TorchRow):
        side: OwnSide | TorchSide = TorchSide(task, row, options["micro_batches"])
    else:
        side = OwnSide(task, row, options["micro_batches"] if row.micro_batched else 1, measure_memory=measures)
    side.run(options["steps"] + 2 * side.depth)
    peak = resident_bytes()
    found = {
        "resident": all_gather_json(None if peak is None or before is None else peak - before, job.group),
        "measured": [memory.total for memory in side.pipeline.memory()] if measures else None,
    }
    side.close()
    if job.rank == 0:
        Path(out).write_text(json.dumps(found))


def load_libraries() -> None:
    """Run a small convolution, so that code which is loaded with the first one does not count."""
    layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 10))
    nn.functional.cross_entropy(layers(torch.zeros(2, 3, 8, 8)), torch.zeros(2, dtype=torch.long)).backward()


def begin_peak() -> int | None:
    """Resident bytes now; the system forgets what the peak was before, where it can."""
    gc.collect()
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        print("the peak before the model was built cannot be forgotten here; it counts as where rows begin from")
    return resident_bytes()


def launched(main: Any, options: dict[str, Any], *args: Any) -> dict[str, Any]:
    """What the processes of one job leave."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "found.json"
        stalewise.launch(main, num_workers=options["stages"], args=[*args, str(out)])
        found: dict[str, Any] = json.loads(out.read_text())
        return found


def predicted(row: OwnRow, options: dict[str, Any], profiled: dict[str, Any]) -> list[list[int]]:
    """In step, and at most, per stage."""
    program = row.build(options["stages"], options["micro_batches"]).program()
    flags = [stage.recomputes for stage in program.stages]
    plan = fixed_partition([LayerCost(**cost) for cost in profiled["costs"]], profiled["cuts"], recompute=flags)
    inputs, targets = make_batches(options["batch_size"])[0]
    sizes = {"input_bytes": inputs.nbytes, "target_bytes": targets.nbytes}
    return [
        [memory.total for memory in predict_memory(plan, program, timing=timing, **sizes)]
        for timing in ("lockstep", "slow")
    ]


def lines_of(label: str, options: dict[str, Any], runs: list[Any], profiled: dict[str, Any]) -> list[list[str]]:
    """A line per stage, and one for all of them."""
    row = ROWS[label]
    stages = range(options["stages"])
    columns: list[list[int]] = []
    if isinstance(row, OwnRow):
        (measured,) = [run["measured"] for run in runs if run["measured"] is not None]
        columns = [measured, *predicted(row, options, profiled)]
    resident = [run["resident"] for run in runs if run["measured"] is None]
    known = all(size is not None for sizes in resident for size in sizes)
    lines = []
    for stage in (*stages, None):

        def of(sizes: list[int], stage: int | None = stage) -> float:
            return (sum(sizes) if stage is None else sizes[stage]) / MIB

        lines.append(
            [
                label if stage == 0 else "",
                "all" if stage is None else str(stage),
                spread([of(sizes) for sizes in resident], 1) if known else "unknown",
                *([f"{of(sizes):.1f}" for sizes in columns] or ["", "", ""]),
            ]
        )
    return lines


def ratios_to(base: str, runs: dict[str, list[Any]]) -> str:
    """Medians of the resident size of all stages together, of every other row, in words."""
    totals = {
        label: [sum(run["resident"]) for run in several if run["measured"] is None and None not in run["resident"]]
        for label, several in runs.items()
    }
    if not all(totals.values()):
        return "unknown"
    own = statistics.median(totals[base])
    return ", ".join(f"{label} {statistics.median(all_of) / own:.2f}" for label, all_of in totals.items())


def verdicts_of(runs: dict[str, list[Any]]) -> list[dict[str, Any]]:
    """DSP with recompute against what stores graphs, by the measured bytes of all stages together."""
    measured = {
        label.removeprefix("stalewise "): sum(run["measured"])
        for label, several in runs.items()
        for run in several
        if run["measured"] is not None
    }
    pairs = (("dsp minimal", "dsp minimal stored"), ("dsp (K-1-k)", "dsp (K-1-k) stored"))
    pairs += tuple((base, other) for base, _ in pairs for other in ("ddg", "pipedream"))
    return [
        verdict(f"memory of all stages, {base} over {other}", measured[base] / measured[other], 1.0)
        for base, other in pairs
        if base in measured and other in measured
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet56")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--stages", type=int, default=3)
    parser.add_argument("--micro-batches", type=int, default=4, help="of GPipe and 1F1B, on both sides")
    parser.add_argument("--steps", type=int, default=8, help="beside those that fill the pipeline")
    parser.add_argument("--repeats", type=int, default=2, help="fresh processes per row for the resident size")
    parser.add_argument("--only", nargs="+", default=[], metavar="TEXT", help="rows whose name contains one of these")
    parser.add_argument(
        "--allocator",
        choices=["ours", "system"],
        default="ours",
        help="ours: processes keep what they free and ask for huge pages, on both sides; system: as glibc does",
    )
    add_out(parser)
    options = vars(parser.parse_args())
    out_file = options.pop("out")
    labels = [label for label in ROWS if not options["only"] or any(text in label for text in options["only"])]
    if not labels:
        parser.error(f"no row is called so; there are {', '.join(ROWS)}")
    if options["allocator"] == "system":
        os.environ["STALEWISE_ALLOCATOR"] = "system"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "profiled.json"
        profiled = launched(profile, options, options)
        path.write_text(json.dumps(profiled))
        runs: dict[str, list[Any]] = {label: [] for label in labels}
        for repeat in range(options["repeats"]):
            for label in labels:
                print(f"repeat {repeat + 1} of {options['repeats']}: {label}", file=sys.stderr, flush=True)
                runs[label].append(launched(train, options, label, options, False, str(path)))
        for label in labels:
            if isinstance(ROWS[label], OwnRow):
                runs[label].append(launched(train, options, label, options, True, str(path)))
    print(machine())
    print(
        f"{options['model']}, batch {options['batch_size']}, K = {options['stages']}, cuts {tuple(profiled['cuts'])}, "
        f"{options['micro_batches']} micro-batches, momentum SGD; MiB, resident: median (min .. max) of "
        f"{options['repeats']} runs, allocator: {options['allocator']}"
    )
    lines = [line for label in labels for line in lines_of(label, options, runs[label], profiled)]
    print(table(["row", "stage", "resident", "measured", "predicted", "at most"], lines))
    for base in ("stalewise dsp minimal", "stalewise dsp (K-1-k)"):
        if base in runs:
            print(f"resident, all stages, over {base}: {ratios_to(base, runs)}")
    leave(out_file, options, {"profiled": profiled, "runs": runs}, verdicts_of(runs))


if __name__ == "__main__":
    main()
