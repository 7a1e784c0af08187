"""Speed-up over backpropagation with more stages: measured to the cores at hand, simulated to 1,024 stages.

    python benchmarks/scaling.py --simulated
    python benchmarks/scaling.py --measured --model resnet56 --batch-size 64

Simulated, a batch costs F + B = 3 in one process, split over K stages; recompute costs another F on all stages but the
last. Two splits of it:

    equal       every stage has an equal part
    measured    the parts that an exact partition of a measured model leaves: `--from runs/x` takes the layer times of
                the run's partition.json, repeats them until there are layers enough, and cuts them into K stages so
                that the slowest is as quick as it can be

Step times are maximum cycle means, and so exact for these costs; links are free, or cost `--latency` of a stage's mean
work. Measured, every method trains the same model on the same batch in K processes with one thread each, in turns.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from common import add_out, leave, machine, spread, table, verdict
from torch import nn

import stalewise
from stalewise.methods import Method, build_method
from stalewise.models import build_model
from stalewise.protocol.actions import Kind
from stalewise.runtime.exchange import all_gather_json
from stalewise.runtime.job import current_job
from stalewise.timing import LinkCost, Links, StepCosts, TimedProgram

BATCH_NS = 30_000_000_000
"""F + B of a whole batch: long, so that a 1,024th of it is still a whole number of nanoseconds to five digits."""
ROWS = ("bp", "gpipe", "1f1b", "ddg", "fr", "pipedream", "dsp-stored", "dsp")
TARGET_S = 10.0
STAGES = (1, 2, 4, 8, 16, 64, 256, 1024)


def method_of(name: str, stages: int, micro_batches: int) -> Method:
    """As compared here: micro-batched methods with M parts, DSP minimal."""
    options = {"micro_batches": micro_batches} if name in ("gpipe", "1f1b") else {}
    if name == "gpipe":
        options["activations"] = "stored"  # type: ignore[assignment]
    return build_method(name, num_stages=stages, **options)


def simulated_step_ns(name: str, parts: Sequence[float], micro_batches: int, latency: float) -> float:
    """Steady step time; `parts` are the stages' shares of a batch."""
    program = method_of(name, len(parts), micro_batches).program()
    forward = [round(BATCH_NS * part / 3) for part in parts]
    times = {Kind.FORWARD: forward, Kind.RECOMPUTE: forward, Kind.BACKWARD: [2 * time for time in forward]}
    links = Links.equal(len(parts), LinkCost(latency_ns=round(latency * BATCH_NS / len(parts))))
    return float(TimedProgram(program, StepCosts.of_kinds(program, times), links).cycle().step_ns)


def cut(layers: Sequence[float], stages: int) -> list[float]:
    """The parts of the contiguous split whose largest part is smallest: bisection on that part, greedily filled."""
    low, high = max(max(layers), sum(layers) / stages), sum(layers)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if _parts_of(layers, middle) <= stages else (middle, high)
    bound, parts = high * (1 + 1e-12), [0.0]
    for index, layer in enumerate(layers):
        left = len(layers) - index
        if parts[-1] and (parts[-1] + layer > bound or left <= stages - len(parts)):
            parts.append(0.0)
        parts[-1] += layer
    return parts


def _parts_of(layers: Sequence[float], most: float) -> int:
    parts, held = 1, 0.0
    for layer in layers:
        parts, held = (parts + 1, layer) if held + layer > most else (parts, held + layer)
    return parts


def simulated(options: argparse.Namespace) -> tuple[list[Any], list[dict[str, Any]]]:
    """Print the tables; their numbers and the verdict."""
    print(machine())
    layers, results = None, []
    if options.run is not None:
        record = json.loads((options.run / "partition.json").read_text())
        if any(layer.get("forward_s") is None for layer in record["layers"]):
            sys.exit(
                f"{options.run} was cut by hand, so its layers have no times; give a run with --partition profile."
            )
        layers = [layer["forward_s"] + layer["backward_s"] for layer in record["layers"]]
    for title, known in (("equal", None), (f"measured: {options.run}", layers)):
        if title != "equal" and known is None:
            continue
        rows = []
        speedups: dict[str, dict[int, float]] = {}
        for name in ROWS:
            cells = [name]
            speedups[name] = {}
            for stages in options.stages:
                parts = [1 / stages] * stages
                if known is not None:
                    many = list(known) * -(-4 * stages // len(known))
                    parts = [part / sum(many) for part in cut(many, stages)]
                # Backpropagation takes turns: its step is the whole batch on any number of stages, and the links.
                serial = BATCH_NS * (1 + 2 * (stages - 1) * options.latency / stages)
                speedup = serial / simulated_step_ns(name, parts, options.micro_batches, options.latency)
                speedups[name][stages] = speedup
                cells.append(f"{speedup:.2f}")
            rows.append(cells)
        results.append({"parts": title, "speedups": speedups})
        print(f"Simulated speed-up over bp on as many stages; {title} parts, M = {options.micro_batches},")
        print(f"latency {options.latency:g} of a stage's mean work")
        print(table(["method", *(f"K={stages}" for stages in options.stages)], rows), end="\n\n")
    began = time.process_time()
    program = stalewise.DSP.minimal(1024).program()
    unit = 1_000_000
    costs = StepCosts.of_kinds(program, {Kind.FORWARD: unit, Kind.RECOMPUTE: unit, Kind.BACKWARD: 2 * unit})
    total = TimedProgram(program, costs).run(10_000).total_ns[0]
    print(f"minimal DSP, 1,024 stages, 10,000 batches: {total / 4 / unit:.0f} steps long with warm-up and drain,")
    print("timed on one core")
    verdicts = [verdict("seconds for 1,024 stages x 10,000 batches", time.process_time() - began, TARGET_S)]
    return results, verdicts


def worker(model: str, batch_size: int, rounds: int, seconds: float, micro_batches: int, out: str) -> None:
    """Every method in turns, in this rank."""
    torch.set_num_threads(1)
    job = current_job()
    images, labels = torch.randn(batch_size, 3, 32, 32), torch.randint(0, 10, (batch_size,))
    cuts: tuple[int, ...] | None = None
    pipelines = {}
    for name in ROWS:
        torch.manual_seed(0)
        pipelines[name] = stalewise.Pipeline(
            build_model(model, num_classes=10),
            method=method_of(name, job.world_size, micro_batches),
            loss_fn=nn.functional.cross_entropy,
            optimizer=lambda params: torch.optim.SGD(params, lr=0.01, momentum=0.9),
            partition="profile" if cuts is None else cuts,
            verbose=False,
        )
        for _ in pipelines[name].train([(images, labels)] * 2, drain=True):
            pass
        cuts = pipelines[name].cuts
    steps: dict[str, list[float]] = {name: [] for name in ROWS}
    for _ in range(rounds):
        for name, pipeline in pipelines.items():
            all_gather_json(None, job.group)
            count, begin = 4, time.perf_counter()
            for _ in pipeline.train([(images, labels)] * count, drain=True):
                pass
            shared = max(all_gather_json(time.perf_counter() - begin, job.group))
            count = max(8, round(seconds * count / shared))
            all_gather_json(None, job.group)
            begin = time.perf_counter()
            for _ in pipeline.train([(images, labels)] * count, drain=True):
                pass
            steps[name].append(max(all_gather_json(time.perf_counter() - begin, job.group)) / count)
    if job.rank == 0:
        Path(out).write_text(json.dumps({"steps": steps, "cuts": cuts}))


def measured(options: argparse.Namespace) -> list[Any]:
    """Print the table; its numbers."""
    print(machine())
    print(f"{options.model}, batch {options.batch_size}, one thread a stage, warm-up and drain included, ")
    print(f"{options.rounds} rounds in turns, median (min .. max); speed-up over bp on as many stages, round by round")
    rows, results = [], []
    for stages in options.stages:
        if stages > (os.cpu_count() or 1):
            continue
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "steps.json"
            arguments = [options.model, options.batch_size, options.rounds, options.seconds, options.micro_batches]
            stalewise.launch(worker, num_workers=stages, args=[*arguments, str(out)])
            result = json.loads(out.read_text())
        results.append({"stages": stages, **result})
        serial = result["steps"]["bp"]
        for name, times in result["steps"].items():
            ratios = [slow / quick for slow, quick in zip(serial, times, strict=True)]
            rows.append([str(stages), name, spread([1e3 * value for value in times], 1), spread(ratios, 2)])
    print(table(["K", "method", "ms per batch", "speed-up"], rows))
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--simulated", action="store_true")
    parser.add_argument("--measured", action="store_true")
    parser.add_argument("--stages", type=int, nargs="+", help="default: 1 .. 1024, or 1 .. cores")
    parser.add_argument("--micro-batches", type=int, default=8)
    parser.add_argument("--from", dest="run", type=Path, help="a run whose layer times are split")
    parser.add_argument("--latency", type=float, default=0.0, help="of a message, as a part of a stage's mean work")
    parser.add_argument("--model", default="resnet56")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=2.5, help="per method and round")
    add_out(parser)
    options = parser.parse_args()
    results: dict[str, Any] = {}
    verdicts: list[dict[str, Any]] = []
    if options.simulated or not options.measured:
        chosen = argparse.Namespace(**{**vars(options), "stages": options.stages or STAGES})
        results["simulated"], verdicts = simulated(chosen)
    if options.measured:
        cores = range(1, (os.cpu_count() or 1) + 1)
        results["measured"] = measured(argparse.Namespace(**{**vars(options), "stages": options.stages or cores}))
    leave(options.out, vars(options), results, verdicts)


if __name__ == "__main__":
    main()
