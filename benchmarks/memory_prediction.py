"""What each stage holds at its peak: measured in the sequential engine against predicted from the program.

    python benchmarks/memory_prediction.py --model resnet20 --batch-size 64 --stages 3

The layers are measured once, one by one; the prediction of every method follows from that and its program. Memory is
counted in bytes of tensor storages, so the numbers depend on the machine only through what kernels save.
"""

from __future__ import annotations

import argparse
from dataclasses import fields

import torch
from common import machine, table
from torch import nn

import stalewise
from stalewise.engine.split import Chain
from stalewise.methods import build_method
from stalewise.models import build_model
from stalewise.plan.memory import StageMemory, predict_memory
from stalewise.plan.partition import fixed_partition, partition
from stalewise.plan.profile import profile_layers

METHODS = ("dsp", "dsp-stored", "fr", "ddg", "pipedream", "fdg", "pipemare", "bp", "gpipe", "1f1b", "dni")
CATEGORIES = [field.name for field in fields(StageMemory)]
MIB = 1 << 20


def sgd(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.01, momentum=0.9)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet20")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--stages", type=int, default=3)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--partition", type=int, nargs="+", default=None, help="cuts, the same for all methods")
    parser.add_argument("--categories", action="store_true", help="also a line per category")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    images = torch.randn(options.batch_size, 3, 32, 32)
    labels = torch.randint(0, 10, (options.batch_size,))
    chain = Chain(build_model(options.model, num_classes=10))
    layers = profile_layers(
        chain.layers, images, labels, nn.functional.cross_entropy, device=options.device, names=chain.names
    )
    # One partition for all, so that methods can be compared stage by stage.
    chosen = partition(layers, recompute=[*[True] * (options.stages - 1), False]).cuts
    cuts = tuple(options.partition or chosen)
    print(machine())
    print(f"{options.model}, batch {options.batch_size}, K = {options.stages}, cuts {cuts}, momentum SGD; MiB")
    rows, worst = [], 0.0
    for name in options.methods:
        method = build_method(name, num_stages=options.stages)
        program = method.program()
        plan = fixed_partition(layers, cuts, recompute=[stage.recomputes for stage in program.stages])
        sizes = {"input_bytes": images.nbytes, "target_bytes": labels.nbytes}
        predicted = predict_memory(plan, program, **sizes)
        bounds = predict_memory(plan, program, timing="slow", **sizes)
        torch.manual_seed(0)
        pipeline = stalewise.Pipeline(
            build_model(options.model, num_classes=10),
            method=method,
            loss_fn=nn.functional.cross_entropy,
            optimizer=sgd,
            partition=cuts,
            device=options.device,
            measure_memory=True,
        )
        for _ in pipeline.train([(images.clone(), labels.clone()) for _ in range(2 * program.max_lag + 3)]):
            pass
        for stage, (here, there, bound) in enumerate(zip(pipeline.memory(), predicted, bounds, strict=True)):
            off = there.total / here.total - 1
            worst = max(worst, abs(off))
            rows.append([name, str(stage), "total", *_mib(here.total, there.total), f"{off:+.1%}", *_mib(bound.total)])
            if options.categories:
                for category in CATEGORIES:
                    pair = getattr(here, category), getattr(there, category)
                    rows.append(["", "", category, *_mib(*pair), "", *_mib(getattr(bound, category))])
    print(table(["method", "stage", "of", "measured", "predicted", "off", "if slow"], rows))
    print(f"largest deviation of a total: {worst:.1%}")


def _mib(*sizes: int) -> list[str]:
    return [f"{size / MIB:.2f}" for size in sizes]


if __name__ == "__main__":
    main()
