"""The method with which a run went, where its configuration left something to the plan."""

from __future__ import annotations

import json
from pathlib import Path

from stalewise.errors import ConfigError
from stalewise.experiments.config import TrainConfig
from stalewise.methods import Method
from stalewise.methods.method import Activations

__all__ = ["kept_activations", "run_method"]


def kept_activations(method: Method) -> list[Activations]:
    """What each stage keeps of a forward, for partition.json."""
    return ["recompute" if stage.recomputes else "stored" for stage in method.program().stages]


def run_method(folder: Path, config: TrainConfig) -> Method:
    """The method of a run, with everything decided.

    Args:
        folder: of the run.
        config: of the run.

    Raises:
        ConfigError: where the run did not get as far as its plan.
    """
    method = config.build_method()
    if method.is_decided:
        return method
    try:
        kept = json.loads((folder / "partition.json").read_text(encoding="utf-8"))["activations"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{folder} does not say what its stages kept, which was left to the plan ({error}); give the folder of a "
            "run that has trained, with this release or a later one."
        ) from None
    return method.with_activations(kept)
