"""Momentum SGD in the unified form, exactly as defined.

    y_{t+1}   = x_t - alpha_t G_t
    ys_{t+1}  = x_t - s alpha_t G_t                      ys_0 = x_0
    x_{t+1}   = y_{t+1} + beta (ys_{t+1} - ys_t)

s = 0 is heavy ball, s = 1 Nesterov's method, s = 1 / (1 - beta) SGD at the rate alpha / (1 - beta).

`torch.optim.SGD` computes the same for s = 0 and, with nesterov=True, for s = 1, as long as the learning rate stays as
it is: it keeps the sum of gradients and multiplies it with the rate of the moment, so that a change of the rate scales
what was done before. Here old steps keep the rate they were done with, as the proof needs.

Source: Yang, Lin and Li, arXiv:1604.03257 (the form); docs/theory.md, section 5.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer

from stalewise.errors import ConfigError
from stalewise.protocol.numbers import check_real
from stalewise.theory.bounds import checked_momentum

__all__ = ["UnifiedMomentum"]


class UnifiedMomentum(Optimizer):
    """Momentum SGD in the unified form.

    Args:
        params: parameters or parameter groups; a group may have lr, momentum, s of its own.
        lr: alpha, above 0.
        momentum: beta, at least 0 and below 1.
        s: 0 for heavy ball, 1 for Nesterov.

    Raises:
        ConfigError: where a number is out of its range.
    """

    def __init__(self, params: Any, *, lr: float, momentum: float, s: float = 0.0) -> None:
        check_real("lr", lr, "a number of at least 0")
        if lr < 0:
            raise ConfigError(f"lr is {lr!r}; a learning rate is at least 0.")
        checked_momentum(momentum, s)
        super().__init__(params, {"lr": lr, "momentum": momentum, "s": s})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of every parameter that has a gradient.

        Args:
            closure: computes the loss again with a graph, and returns it; or None.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                before = state["ys"] if state else parameter.clone()
                after = parameter.add(parameter.grad, alpha=-group["s"] * group["lr"])
                parameter.add_(parameter.grad, alpha=-group["lr"])
                parameter.add_(after.sub(before), alpha=group["momentum"])
                state["ys"] = after
        return loss
