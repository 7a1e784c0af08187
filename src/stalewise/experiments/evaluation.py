"""The model of a run, back as the unsplit model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from stalewise.engine.precision import Precision
from stalewise.errors import ConfigError
from stalewise.experiments.config import TrainConfig
from stalewise.experiments.run_data import accuracy, evaluation_batches, load_run_data
from stalewise.models import build_model

__all__ = ["evaluate_run", "load_run_model"]


def load_run_model(folder: Path, *, num_classes: int) -> nn.Sequential:
    """The unsplit model of a run with its trained weights, on the CPU.

    Raises:
        ConfigError: where the folder holds no finished run, or its weights are of another model.
    """
    config = TrainConfig.read(folder / "config.json")
    built = build_model(config.model, num_classes=num_classes)
    model = built if isinstance(built, nn.Sequential) else nn.Sequential(*built)
    path = folder / "model.safetensors"
    try:
        model.load_state_dict(load_file(path))
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"cannot read {path}: {error}. Has the run ended? Give the folder of one that has.") from None
    except RuntimeError as error:
        raise ConfigError(f"{path} does not fit {config.model} with {num_classes} classes: {error}") from None
    return model


def evaluate_run(folder: Path, *, data: str | None, batch_size: int) -> dict[str, Any]:
    """Test accuracy (a fraction) of a run's model.

    Args:
        folder: of the run.
        data: name or path of other data than the run's; they need its classes.
        batch_size: samples per batch.
    """
    config = TrainConfig.read(folder / "config.json")
    split = load_run_data(replace(config, data=data or config.data, train_limit=None))
    model = load_run_model(folder, num_classes=split.num_classes).eval()
    batches = evaluation_batches(config, split, batch_size=batch_size)
    with torch.inference_mode(), Precision(config.autocast).region(torch.device("cpu")):
        correct = sum(float(accuracy(model(images), labels)) * len(labels) for images, labels in batches)
    samples = len(split.test)
    return {"test_accuracy": correct / samples, "samples": samples, "data": data or config.data}
