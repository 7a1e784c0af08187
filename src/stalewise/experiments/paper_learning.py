"""The experiments that ask what is learned: convergence, accuracy, staleness, gradient difference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from stalewise.experiments.experiment import Experiment, Part, Plan
from stalewise.experiments.paper_settings import (
    FULL_WORDS,
    LEARNING,
    LEARNING_WORDS,
    ONE_PROCESS,
    PIPELINES,
    RESNET20_CUTS,
    SMOKE,
    SMOKE_WORDS,
    dsp_rows,
    staleness_rows,
)
from stalewise.report.experiment import Plot

__all__ = ["accuracy", "convergence", "gradient_difference", "staleness"]


_WATCHED: Mapping[str, Any] = {"gradient_difference_every": 100}
_WATCHED_SMOKE: Mapping[str, Any] = {
    **SMOKE,
    **ONE_PROCESS,
    "model": "resnet14",
    "partition": "profile",
    "gradient_difference_every": 2,
}


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
                    Part(name="resnet20", methods=PIPELINES, settings=LEARNING),
                    Part(
                        name="resnet20-processes",
                        methods=PIPELINES,
                        settings={**LEARNING, "engine": "distributed", "gradient_difference_every": None, "epochs": 2},
                        seeds=1,
                    ),
                ),
                seeds=3,
                deviations=f"{LEARNING_WORDS} For the time that it takes, 2 epochs with a process for each stage.",
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
                parts=(Part(name="resnet20", methods=PIPELINES, settings=LEARNING),),
                seeds=3,
                deviations=LEARNING_WORDS,
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
    depths: Mapping[str, Any] = {
        "m0.0.0": {},
        **staleness_rows([(2, 1, 0), (4, 2, 0), (6, 3, 0), (10, 5, 0)]),
    }
    # Without staleness it is backpropagation, which other experiments run as well.
    methods = ("m0.0.0=bp", *(text for text in dsp_rows(depths) if text != "m0.0.0=dsp"))

    def depth(name: str, rows: Sequence[str], **given: Any) -> Part:
        return Part(name=name, methods=tuple(rows), options={name: depths[name] for name in _names(rows)}, **given)

    return Experiment(
        name="staleness",
        title="Staleness",
        question="What does staleness cost, in its depth with three stages, and at its least over their number?",
        columns=("accuracy", "best", "loss", "gradient"),
        plots=(Plot("bars", "accuracy"), Plot("bars", "loss"), Plot("bars", "gradient")),
        plans={
            "smoke": Plan(
                parts=(
                    depth("k3", ("m0.0.0=bp", "m4.2.0=dsp"), settings={**_WATCHED_SMOKE, "stages": 3}),
                    *(
                        Part(name=f"k{stages}-minimal", methods=("dsp",), settings={**_WATCHED_SMOKE, "stages": stages})
                        for stages in (2, 8)
                    ),
                ),
                seeds=1,
                deviations=SMOKE_WORDS,
            ),
            "short": Plan(
                parts=(
                    depth("k3", methods, settings=LEARNING),
                    *(
                        Part(
                            name=f"k{stages}-minimal",
                            methods=("dsp",),
                            settings={**LEARNING, "stages": stages, "partition": RESNET20_CUTS[stages]},
                            seeds=1,
                        )
                        for stages in (2, 4, 6, 8, 10)
                    ),
                ),
                seeds=3,
                deviations=f"{LEARNING_WORDS} One seed where the number of stages changes.",
            ),
            "full": Plan(
                parts=(
                    depth("k3", methods, recipe="cifar10-resnet98", settings={**_WATCHED, "stages": 3}),
                    *(
                        Part(
                            name=f"k{stages}-minimal",
                            methods=("dsp",),
                            recipe="cifar10-resnet98",
                            settings={**_WATCHED, "stages": stages},
                        )
                        for stages in (2, 4, 6, 8, 10)
                    ),
                ),
                seeds=3,
                deviations=FULL_WORDS,
            ),
        },
    )


def _names(methods: Sequence[str]) -> list[str]:
    return [text.partition("=")[0] for text in methods]


def gradient_difference() -> Experiment:
    rows = {"m4.2.0": {"staleness": (4, 2, 0)}, "m10.5.0": {"staleness": (10, 5, 0)}}
    methods = ("fr", "ddg", *dsp_rows(rows))
    drops: Mapping[str, Any] = {"lr_schedule": "step", "lr_milestones": (0.5, 0.75), "stages": 3}
    return Experiment(
        name="gradient-difference",
        title="Gradient difference",
        question="How far is each stage's gradient from that of backpropagation, over training and its learning-rate "
        "drops?",
        columns=(
            "gradient",
            "gradient_0",
            "gradient_1",
            "gradient_2",
            "gradient_highest",
            "gradient_lowest",
            "accuracy",
        ),
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
                        settings={**LEARNING, **drops, "epochs": 4, "gradient_difference_every": 20},
                    ),
                ),
                seeds=1,
                deviations=(
                    f"{LEARNING_WORDS} Here 4 epochs from a rate of 0.1, which falls to a tenth after a half and after "
                    "three quarters."
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
