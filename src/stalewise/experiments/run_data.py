"""The data of a run, as configured: what is read, in which batches, and when and how a model is evaluated."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from stalewise.data import Batches, DataSplit, load_data
from stalewise.experiments.config import TrainConfig

__all__ = ["accuracy", "evaluation_batches", "is_evaluated_after", "load_run_data", "training_batches"]

_EVALUATION_BATCH_SIZE = 100
"""Smallest, where those of training are smaller: without gradients they cost little memory."""


def load_run_data(config: TrainConfig) -> DataSplit:
    """Both parts of the data set.

    Raises:
        DataError: where it is missing, truncated or malformed.
    """
    return load_data(
        config.data,
        data_dir=None if config.data_dir is None else Path(config.data_dir),
        train_limit=config.train_limit,
        test_limit=config.test_limit,
    )


def training_batches(config: TrainConfig, data: DataSplit, epoch: int, *, start_batch: int = 0) -> Batches:
    """Those of an epoch, counted from 0, from that batch on."""
    return Batches(
        data.train,
        data.mean,
        data.std,
        batch_size=config.batch_size,
        seed=config.seed,
        epoch=epoch,
        shuffle=True,
        augment=config.augment,
        num_workers=config.loader_workers,
        start_batch=start_batch,
    )


def evaluation_batches(config: TrainConfig, data: DataSplit, *, batch_size: int | None = None) -> Batches:
    """The whole test set, in its order."""
    return Batches(
        data.test,
        data.mean,
        data.std,
        batch_size=batch_size or max(config.batch_size, _EVALUATION_BATCH_SIZE),
        seed=config.seed,
        epoch=0,
        shuffle=False,
        augment=False,
    )


def is_evaluated_after(config: TrainConfig, epoch: int) -> bool:
    """Whether the model is evaluated after that epoch, counted from 0; after the last one always."""
    return (epoch + 1) % config.evaluate_every == 0 or epoch + 1 == config.epochs


def accuracy(output: Tensor, target: Tensor) -> Tensor:
    """Fraction of samples whose largest logit is the target's. output [B, classes], target [B]."""
    return (output.argmax(dim=1) == target).float().mean()
