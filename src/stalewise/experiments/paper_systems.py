"""The experiments that ask what it takes: speed-up, stragglers, memory; and ImageNet."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stalewise.experiments.experiment import Experiment, GeneratedImages, Part, Plan
from stalewise.experiments.paper_settings import (
    ALL_METHODS,
    FULL_WORDS,
    ONE_PROCESS,
    SHORT,
    SMOKE,
    SMOKE_WORDS,
    dsp_rows,
    small_cuts,
    staleness_rows,
)
from stalewise.protocol.stragglers import Straggler
from stalewise.report.experiment import Plot

__all__ = ["imagenet", "memory", "speedup", "stragglers"]


def speedup() -> Experiment:
    models = ("resnet164", "resnext29", "vgg19", "resnet1001")
    return Experiment(
        name="speedup",
        title="Speed-up",
        question="How many samples per second does each method train, against backpropagation and one process?",
        columns=("rate", "speed_up", "speed_up_one"),
        plots=(Plot("bars", "rate"), Plot("bars", "speed_up")),
        plans={
            "smoke": Plan(
                parts=tuple(
                    Part(
                        name=f"resnet8-k{stages}",
                        methods=("bp", "gpipe", "fr", "dsp"),
                        baselines=("one-process",),
                        settings={**SMOKE, "epochs": 1, "stages": stages, "partition": small_cuts(stages)},
                    )
                    for stages in (2, 3)
                ),
                seeds=1,
                deviations=SMOKE_WORDS,
            ),
            "short": Plan(
                parts=tuple(
                    Part(
                        name=f"{model}-k{stages}",
                        methods=ALL_METHODS,
                        baselines=("one-process",),
                        settings={
                            **SHORT,
                            "model": model,
                            "stages": stages,
                            "batch_size": batch_size,
                            "epochs": 1,
                            "train_limit": batch_size * batches,
                            "test_limit": 128,
                            "threads": 1,
                        },
                    )
                    for model, batch_size, batches in (("resnet56", 64, 30), ("vgg19", 32, 24))
                    for stages in (2, 3, 4)
                ),
                seeds=2,
                deviations=(
                    "ResNet-56 in place of ResNet-164 and ResNet-1001, no ResNeXt-29, 30 batches of 64 (VGG-19: 24 of "
                    "32) per run with their warm-up and drain; one thread per stage, as many for one process as a "
                    "pipeline has stages."
                ),
            ),
            "full": Plan(
                parts=tuple(
                    Part(
                        name=f"{model}-k{stages}",
                        methods=ALL_METHODS,
                        baselines=("one-process",),
                        recipe=f"cifar10-{model}",
                        settings={"stages": stages, "epochs": 1},
                    )
                    for model in models
                    for stages in (2, 3, 4)
                ),
                seeds=3,
                deviations="One epoch of each, which is enough for throughput.",
            ),
        },
    )


def stragglers() -> Experiment:
    depths = staleness_rows([(2, 1, 0), (4, 2, 0), (6, 3, 0), (10, 5, 0)])

    def part(factor: float, settings: Mapping[str, Any], rows: Mapping[str, Any], recipe: str | None = None) -> Part:
        slow = (Straggler(probability=1 / 3, factor=factor, how="sleep"),)
        return Part(
            name=f"slow-{round(100 * (factor - 1))}%",
            methods=("bp", "gpipe", "ddg", "fr", *dsp_rows(rows)),
            options=rows,
            recipe=recipe,
            settings={**settings, "stages": 3, "stragglers": slow},
        )

    return Experiment(
        name="stragglers",
        title="Stragglers",
        question="How much longer does training take where a third of all steps of each stage are slow?",
        columns=("rate", "slow_down", "floor"),
        plots=(Plot("bars", "slow_down"), Plot("bars", "rate")),
        plans={
            "smoke": Plan(
                parts=(part(2.0, {**SMOKE, "epochs": 1}, {"m4.2.0": depths["m4.2.0"]}),),
                seeds=1,
                deviations=SMOKE_WORDS,
            ),
            "short": Plan(
                parts=tuple(
                    part(
                        factor,
                        {**SHORT, "batch_size": 64, "epochs": 1, "train_limit": 3072, "test_limit": 128, "threads": 1},
                        depths,
                    )
                    for factor in (1.2, 1.5, 2.0, 2.5)
                ),
                seeds=2,
                deviations=(
                    "ResNet-20, 48 batches of 64 per run. A slow step sleeps for its additional time, so that it takes "
                    "no core from other stages."
                ),
            ),
            "full": Plan(
                parts=tuple(
                    part(factor, {"epochs": 1}, depths, recipe="cifar10-resnet164") for factor in (1.2, 1.5, 2.0, 2.5)
                ),
                seeds=3,
                deviations="One epoch of each, which is enough for throughput.",
            ),
        },
    )


def memory() -> Experiment:
    return Experiment(
        name="memory",
        title="Memory",
        question="How much does each method hold at its peak, in all stages and in the largest, over their number?",
        columns=("memory", "memory_stage"),
        plots=(Plot("bars", "memory"),),
        plans={
            "smoke": Plan(
                parts=tuple(
                    Part(
                        name=f"resnet8-k{stages}",
                        methods=("bp", "ddg", "dsp"),
                        settings={
                            **SMOKE,
                            **ONE_PROCESS,
                            "epochs": 1,
                            "stages": stages,
                            "partition": small_cuts(stages),
                            "train_limit": 320,
                        },
                    )
                    for stages in (2, 3)
                ),
                seeds=1,
                deviations=SMOKE_WORDS,
            ),
            "short": Plan(
                parts=tuple(
                    Part(
                        name=f"resnet56-k{stages}",
                        methods=ALL_METHODS,
                        settings={
                            **SHORT,
                            "model": "resnet56",
                            "stages": stages,
                            "epochs": 1,
                            "train_limit": 64 * 12,
                            "test_limit": 128,
                            "threads": 1,
                        },
                    )
                    for stages in (2, 3, 4)
                ),
                seeds=1,
                deviations="ResNet-56, 12 batches per run. Tensors are counted, so more batches change nothing.",
            ),
            "full": Plan(
                parts=tuple(
                    Part(
                        name=f"{model}-k{stages}",
                        methods=ALL_METHODS,
                        recipe=f"cifar10-{model}",
                        settings={"stages": stages, "epochs": 1},
                    )
                    for model in ("resnet164", "resnext29", "vgg19")
                    for stages in (2, 3, 4)
                ),
                seeds=1,
                deviations="One epoch of each: the peak is reached in the first steps.",
            ),
        },
    )


def imagenet() -> Experiment:
    return Experiment(
        name="imagenet",
        title="ImageNet",
        question="What do the methods reach on ImageNet with ResNet-50?",
        columns=("loss", "accuracy", "best", "rate", "speed_up"),
        plots=(Plot("curves"),),
        plans={
            "smoke": Plan(
                parts=(
                    Part(
                        name="resnet50",
                        methods=("bp", "dsp"),
                        generated=GeneratedImages(),
                        settings={
                            "model": "imagenet-resnet50",
                            "data": "imagenet-64",
                            "batch_size": 8,
                            "epochs": 1,
                            "lr": 0.01,
                            "loader_workers": 2,
                            "threads": 1,
                            "stages": 2,
                            "partition": (10,),
                        },
                    ),
                ),
                seeds=1,
                deviations="Everything: some generated images at 64 pixels, two stages, one epoch.",
            ),
            "full": Plan(
                parts=(
                    Part(
                        name="resnet50",
                        methods=("bp", "gpipe", "fr", "dsp"),
                        recipe="imagenet-resnet50",
                        settings={"stages": 4},
                    ),
                ),
                seeds=1,
                deviations=FULL_WORDS,
            ),
        },
    )
