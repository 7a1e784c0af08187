"""The checks of what `Pipeline` is given."""

from __future__ import annotations

import math
import os
from typing import Any

import torch
from torch.optim import Optimizer

from stalewise.engine.compiled import backend_of, check_compiled
from stalewise.engine.precision import Precision
from stalewise.errors import ConfigError
from stalewise.methods import Method
from stalewise.protocol.program import Program
from stalewise.runtime.job import Job, in_launched_job

__all__ = [
    "check_compile",
    "check_folder",
    "check_functions",
    "check_gradient_difference",
    "check_numbers",
    "check_precision",
    "is_distributed",
    "resolve_device",
]


def is_distributed(engine: str) -> bool:
    """Whether the engine of that name, here, is the distributed one."""
    if engine not in ("auto", "sequential", "distributed"):
        raise ConfigError(f'engine is {engine!r}; it must be "auto", "sequential" or "distributed".')
    launched = in_launched_job()
    if engine == "distributed" and not launched:
        raise ConfigError(
            'engine="distributed" needs one process per stage, and this process is alone. Start it with '
            'stalewise.launch(main, num_workers=K) or torchrun, or use engine="sequential".'
        )
    return launched and engine != "sequential"


def resolve_device(device: str | torch.device, job: Job | None) -> torch.device:
    """The device of that name for this rank."""
    if device == "auto":
        if not torch.cuda.is_available():
            return torch.device("cpu")
        local_rank = 0 if job is None else job.local_rank
        return torch.device("cuda", local_rank % torch.cuda.device_count())
    try:
        resolved = torch.device(device)
        torch.empty(0, device=resolved)
    except (RuntimeError, AssertionError, TypeError) as error:
        raise ConfigError(f'device {device!r} cannot be used: {error}. Use "auto", "cpu" or "cuda:0".') from None
    if resolved.type == "cuda" and resolved.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return resolved


def check_functions(method: Any, loss_fn: Any, optimizer: Any, lr_scheduler: Any, param_groups: Any) -> None:
    """Refuse what is not a method, an optimizer that is built already, and what cannot be called."""
    if not isinstance(method, Method):
        raise ConfigError(f"method is {method!r}; it must be a method such as stalewise.DSP.minimal(num_stages=3).")
    if isinstance(optimizer, Optimizer):
        raise ConfigError(
            "optimizer is an optimizer already; each stage builds its own. Give a function, such as "
            "lambda params: torch.optim.SGD(params, lr=0.1)."
        )
    required, optional = (
        {"loss_fn": loss_fn, "optimizer": optimizer},
        {
            "lr_scheduler": (lr_scheduler, "optimizer -> scheduler"),
            "param_groups": (param_groups, "(name, parameter) -> options"),
        },
    )
    for name, value in required.items():
        if not callable(value):
            raise ConfigError(f"{name} is {value!r}; it must be a function.")
    for name, (value, signature) in optional.items():
        if value is not None and not callable(value):
            raise ConfigError(f"{name} is {value!r}; it must be a function {signature}, or None.")


def check_folder(name: str, folder: Any) -> None:
    """Refuse what is no path."""
    if folder is None:
        return
    if not isinstance(folder, str | os.PathLike) or not str(folder) or "\0" in str(folder):
        raise ConfigError(f"{name} is {folder!r}; it must be the path of a folder, or None.")


def check_numbers(seed: Any, clip_grad_norm: Any, recv_timeout_s: Any, start_timeout_s: Any) -> None:
    """Refuse numbers out of range."""
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int) or not -(2**63) <= seed < 2**64):
        raise ConfigError(f"seed is {seed!r}; it must be a whole number of 64 bits, or None for torch's own.")
    for name, value, may_be_none in (
        ("clip_grad_norm", clip_grad_norm, True),
        ("recv_timeout_s", recv_timeout_s, True),
        ("start_timeout_s", start_timeout_s, False),
    ):
        is_number = isinstance(value, int | float) and not isinstance(value, bool) and value > 0
        if value == math.inf and name != "clip_grad_norm":
            raise ConfigError(f"{name} is {value!r}; it must be a number above 0, and finite.")
        if not is_number and not (value is None and may_be_none):
            raise ConfigError(f"{name} is {value!r}; it must be a number above 0{', or None' if may_be_none else ''}.")


def check_gradient_difference(every: Any, method: Method) -> None:
    """Refuse an interval that is none, and gradients that belong to several batches."""
    if every is None:
        return
    if isinstance(every, bool) or not isinstance(every, int) or every < 1:
        raise ConfigError(f"gradient_difference_every is {every!r}; it must be a number of batches, or None.")
    if method.elastic_rule is not None:
        raise ConfigError(
            "gradient_difference_every is on and staleness is elastic; its order depends on timing. "
            "Leave it out, or measure with a fixed staleness."
        )
    if getattr(method, "accumulate", 1) > 1:
        raise ConfigError(
            "gradient_difference_every is on and gradients accumulate over batches; the gradient of one batch is never "
            "applied by itself then. Use accumulate=1, or leave it out."
        )


def check_precision(precision: Precision, method: Method) -> None:
    """Refuse a method that cannot work in a precision; of what a plan may decide, the worst."""
    for stage in _worst_case(method).stages:
        precision.check(stage)


def check_compile(compile: Any, method: Method) -> str | None:
    """Refuse a backend that is none, and a method that cannot work with compiled layers; the backend, or None."""
    backend = backend_of(compile)
    for stage in _worst_case(method).stages:
        check_compiled(backend, stage)
    return backend


def _worst_case(method: Method) -> Program:
    """The program; of what a plan may decide, that with most graphs."""
    return (method if method.is_decided else method.with_activations("stored")).program()
