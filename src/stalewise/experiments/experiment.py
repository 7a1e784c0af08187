"""What an experiment is: a declaration of comparisons, tables and plots, at up to three scales.

An experiment has no code of its own. Its parts become comparisons that `stalewise compare` could run, and what they
find becomes rows of one table.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from stalewise.errors import ConfigError
from stalewise.experiments.comparison import ComparisonConfig
from stalewise.experiments.config import TrainConfig
from stalewise.experiments.recipes import recipe
from stalewise.report.experiment import Column, Plot

__all__ = ["SCALES", "Experiment", "GeneratedImages", "Part", "Plan", "Scale"]

Scale = Literal["smoke", "short", "full"]

SCALES: tuple[Scale, ...] = ("smoke", "short", "full")


@dataclass(frozen=True, kw_only=True)
class GeneratedImages:
    """JPEG files in ImageNet's layout, made on the spot; each class is a pattern with noise.

    Args:
        classes: folders.
        per_class: training images of each; a quarter of that, at least one, for testing.
        size: height and width in pixels.
    """

    classes: int = 4
    per_class: int = 12
    size: int = 80


@dataclass(frozen=True, kw_only=True)
class Part:
    """One comparison of an experiment.

    Args:
        name: of its folder and its rows.
        methods: rows, as for `stalewise compare`.
        settings: fields of `TrainConfig`; they count more than the recipe.
        recipe: a named recipe that they start from, or None.
        options: of a row, by its name.
        baselines: as for `stalewise compare`.
        generated: images that are made for it; its data is then `imagenet-..` in that folder.
        seeds: at most so many runs of each row, where they are fewer than the plan's; None: as many.
    """

    name: str
    methods: tuple[str, ...]
    settings: Mapping[str, Any]
    recipe: str | None = None
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    baselines: tuple[str, ...] = ()
    generated: GeneratedImages | None = None
    seeds: int | None = None

    def comparison(self, *, seeds: int, overrides: Mapping[str, Any]) -> ComparisonConfig:
        """What `compare` runs.

        Args:
            seeds: runs of each row, unless the part has fewer.
            overrides: fields of `TrainConfig` that count most, such as where the data are.

        Raises:
            ConfigError: where the declaration is not valid.
        """
        settings = {**(recipe(self.recipe).settings if self.recipe else {}), **self.settings, **overrides}
        settings.setdefault("measure_memory", True)
        return ComparisonConfig(
            methods=self.methods,
            options=self.options,
            baselines=self.baselines,
            seeds=min(seeds, self.seeds or seeds),
            shared=TrainConfig(**{**settings, "method": "bp", "display": "quiet"}),
        )


@dataclass(frozen=True, kw_only=True)
class Plan:
    """An experiment at one scale.

    Args:
        parts: in the order in which they run.
        seeds: runs of each row unless the user says otherwise.
        deviations: from the papers' settings, in words.
    """

    parts: tuple[Part, ...]
    seeds: int
    deviations: str


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """One of the experiments of `stalewise reproduce`.

    Args:
        name: for the command.
        title: for people.
        question: that it answers.
        columns: of its table.
        plots: of its report.
        plans: by scale.
    """

    name: str
    title: str
    question: str
    columns: Sequence[Column]
    plots: Sequence[Plot]
    plans: Mapping[Scale, Plan]

    def plan(self, scale: Scale) -> Plan:
        """At one scale.

        Raises:
            ConfigError: where it does not exist at this scale.
        """
        if scale not in self.plans:
            known = ", ".join(self.plans)
            raise ConfigError(f"{self.name} has no scale {scale!r}; it has {known}.")
        return self.plans[scale]
