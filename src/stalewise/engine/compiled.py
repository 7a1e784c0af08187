"""A stage whose layers `torch.compile` compiles.

The module itself stays as it is, so names, buffers and weights are those of the unsplit model; only its calls are
compiled. Compiled code draws its random numbers as torch does, so that forward and recompute, which are two compiled
graphs, drop the same units; and each stage has a limit of its own on how often it is compiled again.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from stalewise.errors import ConfigError
from stalewise.protocol.program import StageProgram

__all__ = ["backend_of", "call_of", "check_compile"]

COMPILER = "inductor"


def backend_of(compile: bool | str) -> str | None:
    """What a user says, as the name of a backend; None: not compiled."""
    if isinstance(compile, bool):
        return COMPILER if compile else None
    return compile


def call_of(module: nn.Module, backend: str | None) -> Callable[[Any], Any]:
    """What runs the layers.

    Args:
        module: the layers.
        backend: of `torch.compile`; None: not compiled.
    """
    if backend is None:
        return module
    options = {"fallback_random": True} if backend == COMPILER else None
    compiled: Callable[[Any], Any] = torch.compile(module, backend=backend, options=options, isolate_recompiles=True)
    return compiled


def check_compile(backend: Any, program: StageProgram, device: torch.device) -> None:
    """Refuse what cannot be compiled, or not be right when it is.

    Raises:
        ConfigError: where there is no such backend, no compiler, or weights change under graphs that use new ones.
    """
    if backend is None:
        return
    known = [*torch.compiler.list_backends(), "aot_eager", "eager"]
    if backend not in known:
        raise ConfigError(f"compile is {backend!r}; it must be True, False, or one of {', '.join(known)}.")
    compiler = os.environ.get("CXX", "g++")
    if backend == COMPILER and device.type == "cpu" and shutil.which(compiler) is None:
        raise ConfigError(
            f"compile is on and there is no C++ compiler {compiler!r}, which torch.compile needs on a CPU. Install g++, "
            "name one in the variable CXX, or leave compile out."
        )
    if program.stores_graphs_over_updates and program.policy.weights == "current":
        raise ConfigError(
            'weights="current" cannot work with compile: compiled code keeps what it has computed from the weights of '
            'the forward. Use weights="stashed" or activations="recompute".'
        )
