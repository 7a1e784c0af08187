"""Named training settings, each with its source: data for `stalewise train --recipe NAME`.

A recipe says what to train and how; the method, its stages and its staleness stay the user's (three stages and
minimal DSP unless told otherwise), and whatever is given beside a recipe counts more than the recipe.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from stalewise.errors import ConfigError

__all__ = ["RECIPES", "Recipe", "recipe"]

_CIFAR_SOURCE = (
    "settings of the papers on stale pipelines of this family (Features Replay arXiv:1807.04511, DDG arXiv:1804.10574, "
    "DSP arXiv:1909.02625), as their released code has them"
)
_IMAGENET_SOURCE = (
    "settings of the same papers for ImageNet; weight decay of He et al., arXiv:1512.03385, where they do not say"
)
_CIFAR: Mapping[str, Any] = {
    "epochs": 300,
    "batch_size": 128,
    "lr": 0.01,
    "lr_schedule": "step",
    "lr_milestones": (150 / 300, 225 / 300),
    "momentum": 0.9,
    "nesterov": True,
    "weight_decay": 5e-4,
    "augment": True,
}
_IMAGENET: Mapping[str, Any] = {
    "epochs": 90,
    "batch_size": 256,
    "lr": 0.1,
    "lr_schedule": "step",
    "lr_milestones": (30 / 90, 60 / 90, 80 / 90),
    "momentum": 0.9,
    "nesterov": False,
    "weight_decay": 1e-4,
    "augment": True,
    "loader_workers": 8,
}
_CIFAR_MODELS = {
    "resnet20": "resnet20",
    "resnet56": "resnet56",
    "resnet98": "resnet98",
    "resnet110": "resnet110",
    "resnet164": "resnet164",
    "resnet1001": "resnet1001",
    "vgg19": "vgg19",
    "resnext29": "resnext29-8x64d",
    "wrn28-10": "wrn28-10",
}
_IMAGENET_DEPTHS = (18, 34, 50, 101, 152)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Settings of a training run.

    Args:
        name: by which a user asks for it.
        settings: fields of `TrainConfig`.
        source: where they come from.
    """

    name: str
    settings: Mapping[str, Any]
    source: str


def _all() -> dict[str, Recipe]:
    found = [
        Recipe(name=f"{data}-{name}", settings={"model": model, "data": data, **_CIFAR}, source=_CIFAR_SOURCE)
        for data in ("cifar10", "cifar100")
        for name, model in _CIFAR_MODELS.items()
    ]
    found += [
        Recipe(
            name=f"imagenet-resnet{depth}",
            settings={"model": f"imagenet-resnet{depth}", "data": "imagenet", **_IMAGENET},
            source=_IMAGENET_SOURCE,
        )
        for depth in _IMAGENET_DEPTHS
    ]
    return {entry.name: entry for entry in found}


RECIPES: Mapping[str, Recipe] = _all()
"""By name."""


def recipe(name: str) -> Recipe:
    """The recipe of that name.

    Raises:
        ConfigError: where there is none.
    """
    if name not in RECIPES:
        nearest = difflib.get_close_matches(name, RECIPES, n=1)
        repair = f"Did you mean {nearest[0]!r}?" if nearest else "`stalewise recipes` prints all."
        raise ConfigError(f"there is no recipe {name!r}. {repair}")
    return RECIPES[name]
