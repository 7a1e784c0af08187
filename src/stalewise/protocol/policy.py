"""What a stage does with batches, graphs, weights and gradients, beyond the order of its actions.

A program says *when*; the policy says *what of*. Both are values, so no engine needs to know a method's name.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from stalewise.errors import ConfigError
from stalewise.protocol.numbers import check_real

__all__ = ["PLAIN", "BackwardWeights", "DelayCorrection", "StagePolicy", "SynthesizerPolicy"]

BackwardWeights = Literal["stashed", "current"]
"""Which weights the backward of a stored graph uses: those of its forward, or those of the moment."""


@dataclass(frozen=True, kw_only=True)
class DelayCorrection:
    """PipeMare's two remedies for delayed backwards (arXiv:1910.05124).

    Args:
        annealing_updates: T1: update i uses lr / (m_k + 1)^p with p = 1 - min(i / annealing_updates, 1); 0: off.
        discrepancy_decay: T2: D in gamma = D^(1/m_k); the backward uses w - m_k * delta, where delta is the
            exponential moving average, of decay gamma, of the weights' change per update; None: off.
    """

    annealing_updates: int = 0
    discrepancy_decay: float | None = None

    def __post_init__(self) -> None:
        if isinstance(self.annealing_updates, bool) or not isinstance(self.annealing_updates, int):
            raise ConfigError(f"annealing_updates is {self.annealing_updates!r}; it must be a whole number.")
        if self.annealing_updates < 0:
            raise ConfigError(f"annealing_updates is {self.annealing_updates}; it counts updates, 0 turns it off.")
        if self.discrepancy_decay is not None:
            check_real("discrepancy_decay", self.discrepancy_decay)
        if self.discrepancy_decay is not None and not 0 < self.discrepancy_decay < 1:
            raise ConfigError(
                f"discrepancy_decay is {self.discrepancy_decay}; it must lie between 0 and 1, such as 0.135, or be "
                "None to turn the correction off."
            )


@dataclass(frozen=True, kw_only=True)
class SynthesizerPolicy:
    """The small network that predicts the gradient at a cut (DNI, arXiv:1608.05343).

    Args:
        hidden_layers: between its input and its last layer, which starts at zero.
        lr: learning rate of its own optimizer (Adam).
    """

    hidden_layers: int = 1
    lr: float = 1e-3

    def __post_init__(self) -> None:
        if isinstance(self.hidden_layers, bool) or not isinstance(self.hidden_layers, int) or self.hidden_layers < 0:
            raise ConfigError(f"hidden_layers is {self.hidden_layers!r}; it must be a whole number of at least 0.")
        check_real("the synthesizer's lr", self.lr, "a number above 0")
        if not self.lr > 0:
            raise ConfigError(f"the synthesizer's lr is {self.lr}; it must be above 0.")


@dataclass(frozen=True, kw_only=True)
class StagePolicy:
    """Of one stage.

    Args:
        weights: that the backward of a stored graph uses; a recompute always uses the current ones.
        micro_batches: parts that a batch is split into.
        accumulate: batches per update, grouped by global index; their gradients' mean is used.
        gradient_scale: factor of the gradient that is sent to the stage before.
        correction: of a delayed backward, or None.
        synthesizer: predicts the gradient that the stage backwards, or None.
    """

    weights: BackwardWeights = "stashed"
    micro_batches: int = 1
    accumulate: int = 1
    gradient_scale: float = 1.0
    correction: DelayCorrection | None = None
    synthesizer: SynthesizerPolicy | None = None

    def __post_init__(self) -> None:
        if self.weights not in ("stashed", "current"):
            raise ConfigError(f'weights is {self.weights!r}; it must be "stashed" or "current".')
        for name in ("micro_batches", "accumulate"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name} is {value!r}; it must be a whole number of at least 1.")
        check_real("gradient_scale", self.gradient_scale, "above 0 and at most 1")
        if not 0 < self.gradient_scale <= 1:
            raise ConfigError(f"gradient_scale is {self.gradient_scale!r}; it must be above 0 and at most 1.")


PLAIN = StagePolicy()
"""Whole batches, an update each, nothing corrected or predicted."""
