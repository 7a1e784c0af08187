"""Initial weights as He et al. proposed them."""

from __future__ import annotations

from torch import nn

__all__ = ["he_initialised"]


def he_initialised(model: nn.Sequential) -> nn.Sequential:
    """`model` with convolutions drawn from a normal distribution with variance 2 / fan-out, and no linear bias.

    BatchNorm keeps its 1 and 0. Fan-out is k * k * output channels, also of grouped convolutions, as in the code of
    the papers that use it.

    Source: He et al., arXiv:1502.01852.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)
    return model
