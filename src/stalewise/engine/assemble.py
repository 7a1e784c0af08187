"""From a stage's layers and the user's recipes to a complete `Stage`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from stalewise.engine.precision import FULL_PRECISION, Precision
from stalewise.engine.stage import LossFunction, Stage
from stalewise.errors import ConfigError, StalewiseError
from stalewise.protocol.program import NO_PROGRAM, StageProgram

__all__ = ["ParameterOptions", "assemble_stage"]

ParameterOptions = Callable[[str, nn.Parameter], Mapping[str, Any]]
"""(name in the unsplit model, parameter) -> options of its optimizer group."""


def assemble_stage(
    module: nn.Sequential,
    *,
    index: int,
    num_stages: int,
    device: torch.device,
    seed: int,
    optimizer: Callable[[Any], Optimizer],
    lr_scheduler: Callable[[Optimizer], LRScheduler] | None,
    loss_fn: LossFunction,
    clip_grad_norm: float | None,
    param_groups: ParameterOptions | None,
    program: StageProgram = NO_PROGRAM,
    precision: Precision = FULL_PRECISION,
    compile: str | None = None,
    protects_buffers: bool = False,
    overlap: bool = False,
) -> Stage:
    """Move the layers to their device and give them their optimizer and scheduler; see `Pipeline` for the arguments.

    Raises:
        ConfigError: where a recipe returns something else than it should.
    """
    module.to(device)
    trainable = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    built: Optimizer | None = None
    scheduler: LRScheduler | None = None
    if trainable:
        with _blamed("optimizer", index):
            built = optimizer(list(trainable.values()) if param_groups is None else _grouped(trainable, param_groups))
        if not isinstance(built, Optimizer):
            raise ConfigError(
                f"optimizer returned a {type(built).__name__}; it must return a torch optimizer, such as "
                "torch.optim.SGD(params, lr=0.1)."
            )
        foreign = {id(p) for group in built.param_groups for p in group["params"]} - set(map(id, trainable.values()))
        if foreign:
            raise ConfigError(
                f"optimizer returned an optimizer of {len(foreign)} parameters that are not stage {index}'s; it must "
                "use the params that it is called with, as in lambda params: torch.optim.SGD(params, lr=0.1)."
            )
        if any(
            parameter.default is parameter.empty and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
            for parameter in inspect.signature(built.step).parameters.values()
        ):
            raise ConfigError(
                f"optimizer returned a {type(built).__name__}, whose step needs a closure that computes the loss "
                "again; a stage has no loss of its own. Use one that steps on gradients, such as torch.optim.SGD."
            )
        with _blamed("lr_scheduler", index):
            scheduler = None if lr_scheduler is None else lr_scheduler(built)
        if isinstance(scheduler, ReduceLROnPlateau):
            raise ConfigError(
                "lr_scheduler returned a ReduceLROnPlateau, which steps on a metric; schedulers are stepped once per "
                "update of their stage, without one. Use a schedule over updates, such as OneCycleLR."
            )
        if scheduler is not None and not isinstance(scheduler, LRScheduler):
            raise ConfigError(f"lr_scheduler returned a {type(scheduler).__name__}; it must return a torch scheduler.")
    return Stage(
        module,
        index=index,
        num_stages=num_stages,
        device=device,
        seed=seed,
        optimizer=built,
        lr_scheduler=scheduler,
        loss_fn=loss_fn,
        clip_grad_norm=clip_grad_norm,
        program=program,
        precision=precision,
        compile=compile,
        protects_buffers=protects_buffers,
        overlap=overlap,
    )


@contextmanager
def _blamed(recipe: str, stage: int | None) -> Iterator[None]:
    """Turn what a recipe raises into an error that names it."""
    try:
        yield
    except StalewiseError:
        raise
    except Exception as error:
        where = "" if stage is None else f" for stage {stage}"
        raise ConfigError(
            f"{recipe} failed{where}: {type(error).__name__}: {error}. It is called as the documentation of Pipeline "
            "says; try the call alone."
        ) from error


def _grouped(parameters: Mapping[str, nn.Parameter], options_of: ParameterOptions) -> list[dict[str, Any]]:
    """Parameter groups: equal options together, in order of appearance."""
    groups: list[dict[str, Any]] = []
    for name, parameter in parameters.items():
        with _blamed("param_groups", None):
            given = options_of(name, parameter)
        if given is not None and not isinstance(given, Mapping):
            raise ConfigError(
                f"param_groups returned a {type(given).__name__} for {name!r}; it must return a dict of optimizer "
                'options, such as {"weight_decay": 0.0}, or None.'
            )
        options = dict(given or {})
        for group in groups:
            if {key: value for key, value in group.items() if key != "params"} == options:
                group["params"].append(parameter)
                break
        else:
            groups.append({"params": [parameter], **options})
    return groups
