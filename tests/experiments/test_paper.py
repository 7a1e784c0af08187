"""The declared experiments: all there, valid at every scale, and within what their networks can be cut into."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from stalewise.errors import ConfigError
from stalewise.experiments.experiment import SCALES
from stalewise.experiments.paper import EXPERIMENTS, experiment
from stalewise.models import build_model

NAMES = ["convergence", "speedup", "accuracy", "stragglers", "memory", "staleness", "gradient-difference", "imagenet"]
DECLARED = [(name, scale) for name in NAMES for scale in SCALES if scale in EXPERIMENTS[name].plans]


@cache
def num_layers(model: str) -> int:
    with torch.device("meta"):
        return len(build_model(model, num_classes=10))


def test_the_eight_experiments() -> None:
    assert list(EXPERIMENTS) == NAMES
    assert len(DECLARED) == 23, "ImageNet has no short scale"


@pytest.mark.parametrize(("name", "scale"), DECLARED)
def test_every_part_can_be_run(name: str, scale: str) -> None:
    plan = experiment(name).plan(scale)
    assert plan.deviations.endswith(".")
    names = [part.name for part in plan.parts]
    assert len(set(names)) == len(names)
    for part in plan.parts:
        config = part.comparison(seeds=plan.seeds, overrides={"data_dir": "/data"})
        assert config.shared.data_dir == "/data"
        assert config.shared.measure_memory
        assert len(list(config.runs())) >= (part.seeds or plan.seeds) * len(part.methods)
        layers = num_layers(config.shared.model)
        assert config.shared.stages <= layers
        if config.shared.partition != "profile":
            assert len(config.shared.partition) == config.shared.stages - 1
            assert 0 < min(config.shared.partition) <= max(config.shared.partition) < layers


@pytest.mark.parametrize("name", NAMES)
def test_full_follows_the_recipes(name: str) -> None:
    for part in experiment(name).plan("full").parts:
        assert part.recipe is not None
        settings = part.comparison(seeds=1, overrides={}).shared
        assert (settings.batch_size, settings.momentum) in ((128, 0.9), (256, 0.9))


def test_what_the_issue_asks_of_each() -> None:
    def shared(name: str, scale: str = "full") -> list:  # type: ignore[type-arg]
        return [part.comparison(seeds=1, overrides={}) for part in experiment(name).plan(scale).parts]

    assert [config.shared.model for config in shared("convergence")] == ["resnet98", "resnet164"]
    assert set(shared("convergence")[0].methods) == {"bp", "fr", "ddg", "dni", "gpipe", "dsp"}
    speed = {(config.shared.model, config.shared.stages) for config in shared("speedup")}
    models = ("resnet164", "resnext29-8x64d", "vgg19", "resnet1001")
    assert speed == {(model, stages) for model in models for stages in (2, 3, 4)}
    assert all(config.baselines == ("one-process",) for config in shared("speedup"))
    assert {config.shared.stages for config in shared("accuracy")} == {3}
    assert [config.shared.stragglers[0].factor for config in shared("stragglers", "short")] == [1.2, 1.5, 2.0, 2.5]
    assert max(config.shared.stages for config in shared("staleness", "short")) == 10
    assert all(config.shared.gradient_difference_every for config in shared("staleness", "short"))
    assert all(config.shared.lr_schedule == "step" for config in shared("gradient-difference", "short"))
    assert [config.shared.model for config in shared("imagenet")] == ["imagenet-resnet50"]


def test_names_and_scales_that_are_none() -> None:
    with pytest.raises(ConfigError, match="there are convergence, speedup"):
        experiment("speed")
    with pytest.raises(ConfigError, match="it has smoke, full"):
        experiment("imagenet").plan("short")
