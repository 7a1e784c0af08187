"""The experiments of `stalewise reproduce`, as data.

    smoke   minutes on two cores: that everything works; its numbers say nothing
    short   about an hour each on a few cores: CIFAR-10, shallower networks, few epochs
    full    the papers' settings, as far as they are known

Source: the family of papers on stale pipelines (see `recipes`); what each experiment asks is this project's wording.
"""

from __future__ import annotations

from collections.abc import Mapping

from stalewise.errors import ConfigError
from stalewise.experiments.experiment import Experiment
from stalewise.experiments.paper_learning import accuracy, convergence, gradient_difference, staleness
from stalewise.experiments.paper_systems import imagenet, memory, speedup, stragglers

__all__ = ["EXPERIMENTS", "experiment"]

EXPERIMENTS: Mapping[str, Experiment] = {
    entry.name: entry
    for entry in (
        convergence(),
        speedup(),
        accuracy(),
        stragglers(),
        memory(),
        staleness(),
        gradient_difference(),
        imagenet(),
    )
}
"""By name, in the order in which they are counted."""


def experiment(name: str) -> Experiment:
    """The experiment of that name.

    Raises:
        ConfigError: where there is none.
    """
    if name not in EXPERIMENTS:
        raise ConfigError(f"there is no experiment {name!r}; there are {', '.join(EXPERIMENTS)}.")
    return EXPERIMENTS[name]
