"""Synthetic gradients: a small network at a cut that predicts the gradient of a stage's output.

    g_hat = S(h) / N            h: the stage's output for a batch, detached; N: its samples
    loss  = mean((S(h) - N g)^2)   g: the gradient that the stage after computed, itself from synthetic ones

The factor N makes the target the gradient per sample, whose scale does not depend on the batch size. The last layer
starts at zero, so a fresh synthesizer predicts nothing.

Source: Jaderberg et al., arXiv:1608.05343 [S for the idea]; size, scale and optimizer are ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from stalewise.engine.buffers import unchanged_buffers
from stalewise.engine.randomness import preserved_random_state
from stalewise.errors import ConfigError
from stalewise.protocol.policy import SynthesizerPolicy

__all__ = ["Synthesizer", "build_synthesizer"]


def build_synthesizer(example: Tensor, hidden_layers: int) -> nn.Sequential:
    """A network from tensors like `example` to tensors of the same shape.

    Args:
        example: an output of the stage: [N, C, H, W] (convolutions) or [N, .., F] (linear layers over the last axis).
        hidden_layers: as wide as the output, with ReLU (and BatchNorm for images).
    """
    layers: list[nn.Module] = []
    if example.ndim == 4:
        channels = example.shape[1]
        for _ in range(hidden_layers):
            layers += [nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()]
        last: nn.Conv2d | nn.Linear = nn.Conv2d(channels, channels, 3, padding=1)
    else:
        width = example.shape[-1]
        for _ in range(hidden_layers):
            layers += [nn.Linear(width, width), nn.ReLU()]
        last = nn.Linear(width, width)
    nn.init.zeros_(last.weight)
    assert last.bias is not None
    nn.init.zeros_(last.bias)
    return nn.Sequential(*layers, last)


class Synthesizer:
    """The synthesizer of one stage, built at its first batch.

    Args:
        policy: its size and learning rate.
        seed: of its weights.
        device: where it works.
    """

    def __init__(self, policy: SynthesizerPolicy, *, seed: int, device: torch.device) -> None:
        self._policy = policy
        self._seed = seed
        self._device = device
        self._outputs: dict[int, Tensor] = {}
        self._shape, self._dtype = torch.Size(), torch.float32
        self.module: nn.Module | None = None
        self.optimizer: torch.optim.Optimizer | None = None
        self.loss: Tensor | None = None

    def predict(self, output: Tensor, batch: int) -> Tensor:
        """The synthetic gradient of `output`, of its shape; the output is kept until the true one comes."""
        module = self._module_for(output)
        self._outputs[batch] = output
        with torch.no_grad(), unchanged_buffers(module):
            predicted: Tensor = module(_wide(output)) / output.shape[0]
        return predicted.to(output.dtype)

    def train(self, gradient: Tensor | None, batch: int) -> None:
        """One step towards the gradient that came for a batch."""
        output = self._outputs.pop(batch)
        assert self.module is not None
        assert self.optimizer is not None
        if gradient is None:
            return
        loss = nn.functional.mse_loss(self.module(_wide(output)), _wide(gradient) * output.shape[0])
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        # A copy, because the mean over a tensor may be a number in a storage as large as that tensor.
        self.loss = loss.detach().clone()

    def kept(self) -> list[Tensor]:
        """Outputs whose gradient has not come yet."""
        return list(self._outputs.values())

    def snapshot(self) -> dict[str, Any] | None:
        """Everything that it is and holds, by reference; None before its first batch."""
        if self.module is None or self.optimizer is None:
            return None
        return {
            "shape": list(self._shape),
            "dtype": str(self._dtype).removeprefix("torch."),
            "module": dict(self.module.state_dict()),
            "optimizer": self.optimizer.state_dict(),
            "outputs": dict(self._outputs),
            "loss": self.loss,
        }

    def restore(self, snapshot: Mapping[str, Any]) -> None:
        """The inverse of `snapshot`."""
        example = torch.empty(snapshot["shape"], dtype=getattr(torch, snapshot["dtype"]), device=self._device)
        module = self._module_for(example)
        assert self.optimizer is not None
        module.load_state_dict(snapshot["module"])
        self.optimizer.load_state_dict(snapshot["optimizer"])
        self._outputs = dict(snapshot["outputs"])
        self.loss = snapshot["loss"]

    def _module_for(self, output: Tensor) -> nn.Module:
        if self.module is None:
            if output.ndim < 2 or not output.is_floating_point():
                raise ConfigError(
                    f"dni cannot predict the gradient of an output of shape {tuple(output.shape)} and dtype "
                    f"{output.dtype}; cut the model where a floating-point tensor of at least 2 dimensions crosses."
                )
            self._shape, self._dtype = output.shape, output.dtype
            with preserved_random_state(self._device):
                torch.manual_seed(self._seed)
                self.module = build_synthesizer(output, self._policy.hidden_layers).to(
                    self._device, _wide(output).dtype
                )
            self.optimizer = torch.optim.Adam(self.module.parameters(), lr=self._policy.lr)
        return self.module


def _wide(tensor: Tensor) -> Tensor:
    """In float32 at least: small steps of a weight would vanish in what autocast leaves."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
