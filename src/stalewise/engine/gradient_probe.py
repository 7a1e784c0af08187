"""How far a method's gradient is from that of backpropagation: ||grad_BP - G|| / ||grad_BP|| per stage.

G is what a stage applied for batch j. grad_BP is what backpropagation gives for the same batch with the weights that
every stage had after exactly j updates, which are the weights that it applied G to, with the same masks and batch
statistics.
Stages get there at different times, so each keeps its weights and G when it applies it, and once the first stage has,
the batch goes forward and backward through the kept weights. Nothing of the run is changed by it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from stalewise.engine.messages import Activation
from stalewise.engine.stage import Stage

__all__ = ["GradientProbe"]


class GradientProbe:
    """Measures one stage.

    Args:
        stage: whose gradient is compared.
        every: batches between measurements.
    """

    def __init__(self, stage: Stage, *, every: int) -> None:
        self._stage = stage
        self._every = every
        self._inputs: dict[int, Activation] = {}
        self._kept: dict[int, tuple[dict[str, Tensor], dict[str, Tensor]]] = {}
        self._leaves: list[Tensor] = []
        self._outputs: list[Tensor] = []
        self._weights: dict[str, Tensor] = {}

    def snapshot(self) -> dict[str, Any]:
        """What is kept for measurements that are still to come, by reference."""
        return {
            "inputs": {batch: activation._asdict() for batch, activation in self._inputs.items()},
            "kept": {batch: list(kept) for batch, kept in self._kept.items()},
        }

    def restore(self, snapshot: Mapping[str, Any]) -> None:
        """The inverse of `snapshot`."""
        self._inputs = {batch: Activation(**value) for batch, value in snapshot["inputs"].items()}
        self._kept = {batch: (weights, gradients) for batch, (weights, gradients) in snapshot["kept"].items()}

    def is_due(self, batch: int) -> bool:
        """Whether this batch (global index) is measured."""
        return batch % self._every == 0

    def keep_input(self, activation: Activation, batch: int) -> None:
        """The batch as it came from the loader (first stage)."""
        if self.is_due(batch):
            self._inputs[batch] = activation._replace(values=[value.clone() for value in activation.values])

    def take_input(self, batch: int) -> Activation:
        """What `keep_input` kept."""
        return self._inputs.pop(batch)

    def before_update(self, batch: int) -> None:
        """Keep the weights, and the gradient that is about to be applied to them."""
        if not self.is_due(batch):
            return
        parameters = dict(self._stage.module.named_parameters())
        weights = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        gradients = {
            name: parameter.grad.detach().clone()
            for name, parameter in parameters.items()
            if parameter.grad is not None
        }
        self._kept[batch] = (weights, gradients)

    def forward(self, activation: Activation, batch: int) -> Activation:
        """Forward a batch with the kept weights, with a graph."""
        kept, _ = self._kept[batch]
        trainable = {name for name, parameter in self._stage.module.named_parameters() if parameter.requires_grad}
        self._weights = {name: value.requires_grad_(name in trainable) for name, value in kept.items()}
        self._leaves, self._outputs, output = self._stage.forward_with(self._weights, activation, batch)
        return output

    def backward(self, gradients: list[Tensor | None] | None) -> list[Tensor | None]:
        """Backward it from the gradients of its outputs (None on the last stage: from the loss)."""
        received = [None] * len(self._outputs) if gradients is None else gradients
        roots = [
            (output, gradient)
            for output, gradient in zip(self._outputs, received, strict=True)
            if output.requires_grad and (gradient is not None or gradients is None)
        ]
        if roots:
            torch.autograd.backward([root for root, _ in roots], [gradient for _, gradient in roots])
        passed_on = [leaf.grad for leaf in self._leaves]
        self._leaves, self._outputs = [], []
        return passed_on

    def difference(self, batch: int) -> float | None:
        """||grad_BP - G|| / ||grad_BP|| of this stage; None where grad_BP is 0 or nothing is trained."""
        _, applied = self._kept.pop(batch)
        exact = {name: weight.grad for name, weight in self._weights.items() if weight.requires_grad}
        self._weights = {}
        distance = length = 0.0
        for name, gradient in exact.items():
            theirs = torch.zeros(()) if gradient is None else gradient.double()
            ours = applied.get(name)
            distance += float((theirs - (0 if ours is None else ours.double())).square().sum())
            length += float(theirs.square().sum())
        return (distance / length) ** 0.5 if length else None
