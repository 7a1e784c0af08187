"""The experiments that ask what is learned: convergence, accuracy, staleness, gradient difference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from stalewise.experiments.experiment import Experiment, Part, Plan
from stalewise.experiments.paper_settings import (
    FULL_WORDS,
    ONE_PROCESS,
    PIPELINES,
    SHORT,
    SHORT_WORDS,
    SMOKE,
    SMOKE_WORDS,
    dsp_rows,
    staleness_rows,
)
from stalewise.report.experiment import Plot

__all__ = ["accuracy", "convergence", "gradient_difference", "staleness"]


def convergence() -> Experiment:
    return Experiment(
        name="convergence",
        title="Convergence",
        question="How do training loss and test accuracy fall and rise, over epochs and over time?",
        columns=("loss", "accuracy", "best", "rate", "speed_up"),
        plots=(Plot("curves"),),
        plans={
            "smoke": Plan(
                parts=(Part(name="resnet8", methods=PIPELINES, settings=SMOKE),), seeds=1, deviations=SMOKE_WORDS
            ),
            "short": Plan(
                parts=(
                    Part(
                        name="resnet20",
                        methods=PIPELINES,
                        settings={**SHORT, "stages": 3, "epochs": 5, "train_limit": 25_000},
                    ),
                ),
                seeds=2,
                deviations=f"ResNet-20 in place of ResNet-98 and ResNet-164, 5 epochs of half of {SHORT_WORDS}.",
            ),
            "full": Plan(
                parts=tuple(
                    Part(name=name, methods=PIPELINES, recipe=f"cifar10-{name}", settings={"stages": 3})
                    for name in ("resnet98", "resnet164")
                ),
                seeds=3,
                deviations=FULL_WORDS,
            ),
        },
    )


def accuracy() -> Experiment:
    rows = ("bp", "gpipe", "dni", "ddg", "fr", "pipedream", "pipemare", "dsp")
    return Experiment(
        name="accuracy",
        title="Accuracy",
        question="Which test accuracy does each method reach with three stages, and how far do seeds lie apart?",
        columns=("best", "accuracy", "loss"),
        plots=(Plot("bars", "best"),),
        plans={
            "smoke": Plan(
                parts=(Part(name="resnet8", methods=("bp", "ddg", "fr", "dsp"), settings={**SMOKE, **ONE_PROCESS}),),
                seeds=2,
                deviations=SMOKE_WORDS,
            ),
            "short": Plan(
                parts=(
                    Part(
                        name="resnet20",
                        methods=rows,
                        settings={**SHORT, **ONE_PROCESS, "stages": 3, "epochs": 4, "train_limit": 25_000},
                    ),
                ),
                seeds=3,
                deviations=(
                    f"ResNet-20 in place of deeper networks, 4 epochs of half of {SHORT_WORDS}. All stages in one "
                    "process, which gives the same numbers as one process each."
                ),
            ),
            "full": Plan(
                parts=tuple(
                    Part(name=name, methods=rows, recipe=f"cifar10-{name}", settings={"stages": 3})
                    for name in ("resnet56", "resnet98", "resnet110", "resnet164", "vgg19", "resnext29")
                ),
                seeds=3,
                deviations=FULL_WORDS,
            ),
        },
    )


def staleness() -> Experiment:
    depths = staleness_rows([(0, 0, 0), (1, 1, 0), (2, 1, 0), (4, 2, 0), (6, 3, 0), (10, 5, 0), (20, 10, 0)])

    def parts(
        settings: Mapping[str, Any], rows: Mapping[str, Any], stages: Sequence[int], recipe: str | None = None
    ) -> tuple[Part, ...]:
        depth = Part(name="k3", methods=dsp_rows(rows), options=rows, recipe=recipe, settings={**settings, "stages": 3})
        width = (
            Part(name=f"k{count}-minimal", methods=("dsp",), recipe=recipe, settings={**settings, "stages": count})
            for count in stages
        )
        return depth, *width

    return Experiment(
        name="staleness",
        title="Staleness",
        question="What does staleness cost, in its depth with three stages, and at its least over their number?",
        columns=("accuracy", "best", "loss", "gradient"),
        plots=(Plot("bars", "accuracy"), Plot("bars", "gradient")),
        plans={
            "smoke": Plan(
                parts=parts(
                    {
                        **SMOKE,
                        **ONE_PROCESS,
                        "model": "resnet14",
                        "partition": "profile",
                        "gradient_difference_every": 2,
                    },
                    {name: depths[name] for name in ("m0.0.0", "m4.2.0")},
                    (2, 8),
                ),
                seeds=1,
                deviations=SMOKE_WORDS,
            ),
            "short": Plan(
                parts=parts(
                    {
                        **SHORT,
                        **ONE_PROCESS,
                        "epochs": 3,
                        "train_limit": 25_000,
                        "gradient_difference_every": 40,
                    },
                    depths,
                    (2, 4, 6, 8, 10),
                ),
                seeds=2,
                deviations=(
                    f"ResNet-20 in place of deeper networks, 3 epochs of half of {SHORT_WORDS}. All stages in one "
                    "process, which gives the same numbers as one process each."
                ),
            ),
            "full": Plan(
                parts=parts({"gradient_difference_every": 100}, depths, (2, 4, 6, 8, 10), recipe="cifar10-resnet98"),
                seeds=3,
                deviations=FULL_WORDS,
            ),
        },
    )


def gradient_difference() -> Experiment:
    rows = {"m4.2.0": {"staleness": (4, 2, 0)}, "m10.5.0": {"staleness": (10, 5, 0)}}
    methods = ("fr", "ddg", *dsp_rows(rows))
    drops: Mapping[str, Any] = {"lr_schedule": "step", "lr_milestones": (0.5, 0.75), "stages": 3}
    return Experiment(
        name="gradient-difference",
        title="Gradient difference",
        question="How far is each stage's gradient from that of backpropagation, over training and its learning-rate "
        "drops?",
        columns=("gradient", "accuracy", "loss"),
        plots=(Plot("gradients"),),
        plans={
            "smoke": Plan(
                parts=(
                    Part(
                        name="resnet8",
                        methods=("fr", "m4.2.0=dsp"),
                        options={"m4.2.0": rows["m4.2.0"]},
                        settings={**SMOKE, **ONE_PROCESS, **drops, "gradient_difference_every": 1},
                    ),
                ),
                seeds=1,
                deviations=SMOKE_WORDS,
            ),
            "short": Plan(
                parts=(
                    Part(
                        name="resnet20",
                        methods=methods,
                        options=rows,
                        settings={
                            **SHORT,
                            **ONE_PROCESS,
                            **drops,
                            "epochs": 8,
                            "train_limit": 16_000,
                            "gradient_difference_every": 20,
                        },
                    ),
                ),
                seeds=2,
                deviations=(
                    "ResNet-20 on 16,000 images of the JPEG copy of CIFAR-10, 8 epochs from a learning rate of 0.1 "
                    "with drops to a tenth after a half and three quarters, in place of 300 epochs from 0.01, and "
                    "without Nesterov."
                ),
            ),
            "full": Plan(
                parts=tuple(
                    Part(
                        name=name,
                        methods=methods,
                        options=rows,
                        recipe=f"cifar10-{name}",
                        settings={"stages": 3, "gradient_difference_every": 100},
                    )
                    for name in ("resnet98", "resnet164")
                ),
                seeds=3,
                deviations=FULL_WORDS,
            ),
        },
    )
