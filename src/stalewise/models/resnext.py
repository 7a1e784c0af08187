"""ResNeXt for CIFAR, as a sequence of layers that a plan can cut between any two blocks.

    ResNeXt-29, C x d       stem        3x3 conv, 64, BN, ReLU
    depth 9n + 2            n blocks    1x1, grouped 3x3 of C * d,     1x1;   256 out,  32 x 32
                            n blocks    1x1, grouped 3x3 of 2 * C * d, 1x1;   512 out,  16 x 16
                            n blocks    1x1, grouped 3x3 of 4 * C * d, 1x1;  1024 out,   8 x  8
                            head        pool, linear

Source: Xie et al., arXiv:1611.05431, section 5.3, with the authors' code (initial weights, stride in the 3x3).
"""

from __future__ import annotations

from torch import nn

from stalewise.errors import ConfigError
from stalewise.models.bottleneck import Bottleneck
from stalewise.models.initialise import he_initialised
from stalewise.models.resnet import Head, Stem

__all__ = ["resnext"]

_STEM_WIDTH = 64
_OUT_WIDTHS = (256, 512, 1024)


def resnext(depth: int, *, cardinality: int, base_width: int, num_classes: int, in_channels: int = 3) -> nn.Sequential:
    """ResNeXt-depth, cardinality x base_width d.

    Args:
        depth: 9n + 2 with n >= 1: 11, 20, 29, ...
        cardinality: C, groups of the 3x3 convolutions.
        base_width: d, channels of each group in the first blocks.
        num_classes: number of logits.
        in_channels: channels of the images.

    Returns:
        3n + 2 entries, freshly initialised from torch's global generator.

    Raises:
        ConfigError: where `depth` is not 9n + 2, or a count is below 1.
    """
    blocks, rest = divmod(depth - 2, 9)
    if blocks < 1 or rest:
        below = 9 * max(blocks, 1) + 2
        raise ConfigError(
            f"depth {depth} is not possible; a ResNeXt for CIFAR has 9n + 2 layers with n >= 1. "
            f"The nearest depth is {below}{f' or {below + 9}' if blocks >= 1 else ''}."
        )
    if cardinality < 1 or base_width < 1:
        raise ConfigError(f"a ResNeXt of {cardinality} x {base_width}d has no channels; give 8 x 64d, for example.")
    entries: list[nn.Module] = [Stem(in_channels, _STEM_WIDTH)]
    channels = _STEM_WIDTH
    for index, out_channels in enumerate(_OUT_WIDTHS):
        width = cardinality * base_width * 2**index
        for block in range(blocks):
            stride = 2 if index and not block else 1
            entries.append(Bottleneck(channels, width, out_channels, stride=stride, groups=cardinality))
            channels = out_channels
    return he_initialised(nn.Sequential(*entries, Head(channels, num_classes)))
