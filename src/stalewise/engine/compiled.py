"""A stage whose layers `torch.compile` compiles.

The module itself stays as it is, so names, buffers and weights are those of the unsplit model; only its calls are
compiled. Forward and recompute are two compiled graphs (one builds an autograd graph), and must draw the same masks, so
compiled code draws its random numbers as torch does in eager mode. Each stage has a limit of its own on how
often it is compiled again.
"""

from __future__ import annotations

import inspect
import os
import shutil
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from stalewise.engine.tree import Tree
from stalewise.errors import ConfigError
from stalewise.protocol.program import StageProgram

__all__ = ["backend_of", "call_of", "check_backend", "check_compiled"]

COMPILER = "inductor"
_TRACERS = ("aot_eager", "eager")
"""Backends that trace and compute as eager mode does; torch does not list them."""


def backend_of(compile: Any) -> str | None:
    """What a user says, as the name of a backend; None: not compiled.

    Raises:
        ConfigError: where it is neither true, false nor a name.
    """
    if compile is None or isinstance(compile, bool):
        return COMPILER if compile else None
    known = [*torch.compiler.list_backends(), *_TRACERS]
    if compile not in known:
        raise ConfigError(f"compile is {compile!r}; it must be True, False, or one of {', '.join(known)}.")
    return str(compile)


def check_backend(backend: str | None, device: torch.device) -> None:
    """Refuse a backend that lacks what it needs here.

    Raises:
        ConfigError: where there is no C++ compiler.
    """
    compiler = os.environ.get("CXX", "g++")
    if backend == COMPILER and device.type == "cpu" and shutil.which(compiler) is None:
        raise ConfigError(
            f"compile is on and there is no C++ compiler {compiler!r}, which torch.compile needs on a CPU. Install "
            "g++, name one in the variable CXX, or leave compile out."
        )


def check_compiled(backend: str | None, program: StageProgram) -> None:
    """Refuse stored graphs that are to be backwarded with other weights than those of their forward.

    Raises:
        ConfigError: where layers are compiled and the program is of such a kind.
    """
    if backend is not None and program.stores_graphs_over_updates and program.policy.weights == "current":
        raise ConfigError(
            'weights="current" cannot work with compile: compiled code keeps what it has computed from the weights of '
            'the forward. Use weights="stashed" or activations="recompute".'
        )


def call_of(module: nn.Module, backend: str | None) -> Callable[[Tree], Tree]:
    """What runs the layers.

    Args:
        module: the layers.
        backend: of `torch.compile`; None: not compiled.
    """
    if backend is None:
        return module
    # `module.compile()` would leave an nn.Sequential in eager mode, silently (torch 2.13).
    compiled: Callable[[Tree], Tree] = torch.compile(
        module, backend=backend, options={"fallback_random": True} if backend == COMPILER else None, **_own_limit()
    )

    def call(tree: Tree) -> Tree:
        with warnings.catch_warnings():
            # The tracer looks at .grad of the copies that a first layer may work on in place.
            warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf")
            return compiled(tree)

    return call


def _own_limit() -> dict[str, Any]:
    """Without it, all `nn.Sequential`s of a process share one limit on compiling again (torch before 2.12)."""
    known = inspect.signature(torch.compile).parameters
    return {"isolate_recompiles": True} if "isolate_recompiles" in known else {}
