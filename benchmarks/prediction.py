"""The step time that a plan predicts, against the step time that its pipeline has.

    python benchmarks/prediction.py --stages 2 3 4 --batch-size 64
    python benchmarks/prediction.py --stages 3 --batch-size 256

For each number of stages and each batch size the layers are measured once, in all K processes at the same time, as
`Pipeline` and `stalewise plan` do. Three plans are made of that:

    recompute   every stage but the last keeps inputs alone
    stored      every stage keeps its graphs
    mixed       what the planner chooses within a memory limit halfway between what those two need

Each trains in the same processes, in turns. The prediction is the maximum cycle mean of the plan's program with the
measured times, so it was known before the first step. The verdict is on pipelines that leave a core free; with as many
stages as cores the threads that send and receive take part of a stage's core, which no plan knows of.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from common import add_out, leave, machine, spread, table, verdict
from rounds import interleaved
from sides import PipelineSide, Task, loss_fn, make_batches, optimizer

import stalewise
from stalewise.engine.split import Chain
from stalewise.experiments.run_plan import predict_step
from stalewise.models import build_model
from stalewise.plan.planner import Plan, plan_stages
from stalewise.planning import measure, optimizer_copies
from stalewise.protocol.actions import Kind
from stalewise.runtime.exchange import broadcast_json
from stalewise.runtime.job import current_job

TARGET = 0.10


class PlannedSide(PipelineSide):
    """A plan's pipeline."""

    def __init__(self, task: Task, plan: Plan) -> None:
        super().__init__(task)
        self.depth = plan.method.program().max_lag
        self.pipeline = stalewise.Pipeline(
            copy.deepcopy(task.model),
            method=plan.method,
            loss_fn=loss_fn,
            optimizer=optimizer,
            partition=plan.partition.cuts,
            device="cpu",
            verbose=False,
        )

    def actions(self) -> dict[str, list[float]]:
        """Median seconds of each kind of action, per stage; all ranks ask."""
        return {
            kind.value: [
                statistics.median([(span.end_ns - span.start_ns) / 1e9 for span in trace if span.kind is kind] or [0.0])
                for trace in self.pipeline.traces()
            ]
            for kind in (Kind.FORWARD, Kind.RECOMPUTE, Kind.BACKWARD, Kind.UPDATE)
        }


def plans_of(measured: Any, stages: int) -> dict[str, Plan]:
    """By name; the same on all ranks, because all know the same times."""
    sizes = {"batch": measured.batch(optimizer_copies(optimizer)), "slowdowns": measured.slowdowns}
    plans = {
        kept: plan_stages(measured.layers, stalewise.DSP.minimal(stages, activations=kept), **sizes)
        for kept in ("recompute", "stored")
    }
    least, most = (max(stage.total for stage in plan.memory or ()) for plan in plans.values())
    auto = stalewise.DSP.minimal(stages, activations="auto")
    plans["mixed"] = plan_stages(measured.layers, auto, memory_limit=(least + most) // 2, **sizes)
    return plans


def worker(options: dict[str, Any], batch_size: int, out: str) -> None:
    torch.set_num_threads(1)
    job = current_job()
    torch.manual_seed(0)
    model = build_model(options["model"], num_classes=10)
    batches = make_batches(batch_size)
    device = torch.device("cpu")
    measured = measure(Chain(model), batches[0], loss_fn, device=device, job=job, num_stages=job.world_size)
    task = Task(job, model, batches, list(measured.layers), "own")
    plans = plans_of(measured, job.world_size)
    sides = {name: PlannedSide(task, plan) for name, plan in plans.items()}
    times = interleaved(sides, job, rounds=options["rounds"], seconds=options["seconds"])
    found = {}
    for name, plan in plans.items():
        sides[name].close()
        predicted_s, pace = predict_step(plan, target_bytes=measured.targets)
        stages = plan.partition.stages
        planned = {
            "F": [stage.forward_s for stage in stages],
            "R": [stage.recompute_s for stage in stages],
            "B": [stage.backward_s for stage in stages],
        }
        found[name] = {
            "cuts": plan.partition.cuts,
            "activations": plan.activations,
            "predicted_s": predicted_s,
            "pace": pace,
            "times_s": times[name],
            "planned_actions_s": planned,
            "measured_actions_s": sides[name].actions(),
        }
    found = broadcast_json(found, 0, job.group)
    if job.rank == 0:
        Path(out).write_text(json.dumps(found))


def line_of(name: str, found: dict[str, Any], batch_size: int, stages: int) -> list[str]:
    """Of the table."""
    off = statistics.median(found["times_s"]) / found["predicted_s"] - 1
    slowest = max(range(stages), key=lambda k: sum(times[k] for times in found["planned_actions_s"].values()))
    actions = " ".join(
        f"{kind} {1e3 * found['planned_actions_s'].get(kind, [0.0] * stages)[slowest]:.1f}/{1e3 * own[slowest]:.1f}"
        for kind, own in found["measured_actions_s"].items()
        if own[slowest]
    )
    return [
        str(batch_size),
        str(stages),
        name,
        ",".join(map(str, found["cuts"])),
        "".join({"recompute": "r", "stored": "s", None: "-"}[kept] for kept in found["activations"]),
        f"{1e3 * found['predicted_s']:.1f}",
        spread([1e3 * value for value in found["times_s"]], 1),
        f"{100 * off:+.1f}%",
        f"{slowest}: {actions}",
    ]


def main() -> None:
    cores = os.cpu_count() or 1
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet56")
    parser.add_argument("--batch-size", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--stages", type=int, nargs="+", default=[2, 3])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=4.0, help="per plan and round")
    add_out(parser)
    options = vars(parser.parse_args())
    out_file = options.pop("out")
    print(machine())
    lines, results, worst = [], [], 0.0
    for batch_size in options["batch_size"]:
        for stages in options["stages"]:
            with tempfile.TemporaryDirectory() as folder:
                out = Path(folder) / "result.json"
                stalewise.launch(worker, num_workers=stages, args=[options, batch_size, str(out)])
                plans = json.loads(out.read_text())
            results.append({"batch_size": batch_size, "stages": stages, "plans": plans})
            for name, found in plans.items():
                lines.append(line_of(name, found, batch_size, stages))
                if stages < cores:
                    off = statistics.median(found["times_s"]) / found["predicted_s"] - 1
                    worst = max(worst, abs(off))
    print(
        f"{options['model']}, minimal DSP, {options['rounds']} rounds: median (min .. max); keeps: r inputs, s graphs; "
        "actions of the stage that was planned to be the slowest, planned/measured ms (U: the update)"
    )
    head = ["batch", "K", "plan", "cuts", "keeps", "predicted ms", "measured ms", "off", "actions"]
    print(table(head, lines))
    verdicts = []
    if any(stages < cores for stages in options["stages"]):
        verdicts.append(verdict("largest deviation of a step from its prediction, a core free", worst, TARGET))
    leave(out_file, options, results, verdicts)


if __name__ == "__main__":
    main()
