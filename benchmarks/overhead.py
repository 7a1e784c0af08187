"""What the distributed engine adds to the compute of its slowest stage.

    python benchmarks/overhead.py --stages 3

Each round times two things in the same K processes, one thread each:

    local     every stage executes its program on tensors that are at hand, all stages at once, no messages
    pipeline  the same stages executing the same program as a pipeline

and prints the step time of the pipeline over that of the slowest local stage. All stages compute in both, because
cores share caches and memory: alone on the machine a stage would be faster than it can ever be in a pipeline.

The verdict is on pipelines that leave a core to the threads that send and receive, and to everything else.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from itertools import pairwise
from pathlib import Path

import torch
from common import add_out, leave, machine, spread, table, verdict
from torch import Tensor, nn

import stalewise
from stalewise.engine.assemble import assemble_stage
from stalewise.engine.interpreter import Interpreter
from stalewise.engine.messages import Activation, Gradient
from stalewise.engine.split import Chain
from stalewise.models import build_model
from stalewise.protocol.trace import Span
from stalewise.runtime.exchange import all_gather_json
from stalewise.runtime.job import current_job

TARGET = 1.03


class TensorsAtHand:
    """Links whose messages are there already."""

    def __init__(self, activation: Activation, gradient: Tensor) -> None:
        self._activation = activation
        self._gradient = gradient

    def load(self, batch: int) -> Activation:
        return self._activation

    def receive_activation(self, batch: int) -> Activation:
        return self._activation

    def send_activation(self, batch: int, activation: Activation) -> None:
        pass

    def receive_gradient(self, batch: int) -> Gradient:
        return Gradient([self._gradient], torch.zeros(()))

    def send_gradient(self, batch: int, gradient: Gradient) -> None:
        pass


def worker(model_name: str, batch_size: int, rounds: int, seconds: float, out: str) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    job = current_job()
    method = stalewise.DSP.minimal(num_stages=job.world_size)
    images, labels = torch.randn(batch_size, 3, 32, 32), torch.randint(0, 10, (batch_size,))

    def sgd(params: list[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.SGD(params, lr=0.01, momentum=0.9)

    pipeline = stalewise.Pipeline(
        build_model(model_name, num_classes=10),
        method=method,
        loss_fn=nn.functional.cross_entropy,
        optimizer=sgd,
        verbose=False,
    )
    for _ in pipeline.train([(images, labels)] * 4, drain=False):
        pass
    assert pipeline.cuts is not None
    local = _local_stage(model_name, method, pipeline.cuts, job.rank, images, labels, sgd)
    step = 0
    ratios, records = [], []
    for _ in range(rounds):
        all_gather_json(None, job.group)
        end = time.perf_counter() + seconds
        times = []
        while (start := time.perf_counter()) < end:
            for action in local.program.step(step):
                local.execute(action, 0)
            step += 1
            times.append(time.perf_counter() - start)
        own = all_gather_json(statistics.mean(times[len(times) // 5 :]), job.group)
        slowest = max(own)
        count = max(8, round(seconds / slowest))
        begin = len(own_trace(pipeline, job.rank))
        for _ in pipeline.train([(images, labels)] * count, drain=False):
            pass
        updates = [span.end_ns for span in own_trace(pipeline, job.rank)[begin:] if span.kind.value == "U"]
        updates = updates[len(updates) // 5 :]
        piped = max(all_gather_json((updates[-1] - updates[0]) / (len(updates) - 1) / 1e9, job.group))
        ratios.append(piped / slowest)
        records.append({"local_s": own, "pipeline_s": piped})
    for _ in pipeline.drain():
        pass
    if job.rank == 0:
        Path(out).write_text(json.dumps({"ratios": ratios, "records": records, "cuts": pipeline.cuts}))


def own_trace(pipeline: stalewise.Pipeline, rank: int) -> list[Span]:
    return list(pipeline.traces()[rank])


def _local_stage(model_name, method, cuts, rank, images, labels, sgd) -> Interpreter:  # type: ignore[no-untyped-def]
    """This rank's stage with its input and output gradient at hand."""
    chain = Chain(build_model(model_name, num_classes=10))
    values = images
    with torch.no_grad():
        bounds = list(pairwise((0, *cuts, len(chain))))
        for stage in range(rank + 1):
            entering, values = values, chain.build(cuts, stage)(values)
    stage = assemble_stage(
        chain.build(cuts, rank),
        index=rank,
        num_stages=len(bounds),
        device=torch.device("cpu"),
        seed=0,
        optimizer=sgd,
        lr_scheduler=None,
        loss_fn=nn.functional.cross_entropy,
        clip_grad_norm=None,
        param_groups=None,
    )
    links = TensorsAtHand(Activation([entering], "tensor", labels), 1e-4 * torch.randn_like(values))
    return Interpreter(stage, method.stage_program(rank), links)


def main() -> None:
    cores = os.cpu_count() or 1
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet56")
    parser.add_argument("--batch-size", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--stages", type=int, nargs="+", default=[max(cores - 1, 1)])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=6.0, help="per side and round")
    add_out(parser)
    options = parser.parse_args()
    print(machine())
    rows, results, verdicts = [], [], []
    for batch_size in options.batch_size:
        for stages in options.stages:
            with tempfile.TemporaryDirectory() as folder:
                out = Path(folder) / "result.json"
                stalewise.launch(
                    worker,
                    num_workers=stages,
                    args=[options.model, batch_size, options.rounds, options.seconds, str(out)],
                )
                result = json.loads(out.read_text())
            results.append({"batch_size": batch_size, "stages": stages, **result})
            rows.append(
                [
                    str(batch_size),
                    str(stages),
                    ",".join(map(str, result["cuts"])),
                    spread([1e3 * max(record["local_s"]) for record in result["records"]], 1),
                    spread([1e3 * record["pipeline_s"] for record in result["records"]], 1),
                    spread(result["ratios"]),
                ]
            )
    print(f"{options.model}, minimal DSP, {options.rounds} rounds: median (min .. max); {cores} cores")
    print(table(["batch", "stages", "cuts", "slowest stage ms", "pipeline ms", "pipeline / stage"], rows))
    for result in results:
        if result["stages"] < cores:
            named = f"pipeline over slowest stage, batch {result['batch_size']}, K = {result['stages']}"
            verdicts.append(verdict(named, statistics.median(result["ratios"]), TARGET))
    leave(options.out, vars(options), results, verdicts)


if __name__ == "__main__":
    main()
