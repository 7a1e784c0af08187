"""Wide residual networks for CIFAR, as sequences of layers that a plan can cut between any two blocks.

    stem        3x3 conv, 16
    n blocks    BN, ReLU, 3x3 conv, BN, ReLU, 3x3 conv,   16k,  32 x 32        depth 6n + 4, width k
    n blocks    the same,                                 32k,  16 x 16
    n blocks    the same,                                 64k,   8 x  8
    head        BN, ReLU, pool, linear

Source: Zagoruyko and Komodakis, arXiv:1605.07146 (WRN-n-k), with the authors' code: where the shape changes, the
shortcut is a 1x1 convolution of the first activation. Without the optional dropout.
"""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn

from stalewise.errors import ConfigError
from stalewise.models.initialise import he_initialised
from stalewise.models.resnet import PreactHead

__all__ = ["PreactBasicBlock", "wide_resnet"]

_STEM_WIDTH = 16


class PreactBasicBlock(nn.Module):
    """BatchNorm and ReLU before each of two 3x3 convolutions; nothing after the sum.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        stride: of the first convolution and of the shortcut.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, kernel_size=3, stride=stride, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, kernel_size=3, padding=1, bias=False)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut = (
            None
            if stride == 1 and in_channels == out_channels
            else nn.Conv2d(in_channels, out_channels, kernel_size=1, stride=stride, bias=False)
        )

    def forward(self, x: Tensor) -> Tensor:
        # BatchNorm has made a new tensor, so this ReLU in place leaves the block's input as it is.
        activation = self.relu(self.norm1(x))
        inner: Tensor = self.conv2(self.relu(self.norm2(self.conv1(activation))))
        return inner + (x if self.shortcut is None else self.shortcut(activation))


def wide_resnet(depth: int, width: int, *, num_classes: int, in_channels: int = 3) -> nn.Sequential:
    """WRN-depth-width.

    Args:
        depth: 6n + 4 with n >= 1: 10, 16, 22, 28, 40, ...
        width: k, how many times wider than a CIFAR ResNet.
        num_classes: number of logits.
        in_channels: channels of the images.

    Returns:
        3n + 2 entries, freshly initialised from torch's global generator.

    Raises:
        ConfigError: where `depth` is not 6n + 4, or width is below 1.
    """
    blocks, rest = divmod(depth - 4, 6)
    if blocks < 1 or rest:
        below = 6 * max(blocks, 1) + 4
        raise ConfigError(
            f"depth {depth} is not possible; a wide ResNet has 6n + 4 layers with n >= 1. "
            f"The nearest depth is {below}{f' or {below + 6}' if blocks >= 1 else ''}."
        )
    if width < 1:
        raise ConfigError(f"width is {width}; a wide ResNet is at least once as wide. Give 10 for WRN-28-10.")
    widths = (16 * width, 32 * width, 64 * width)
    entries: list[nn.Module] = [nn.Conv2d(in_channels, _STEM_WIDTH, kernel_size=3, padding=1, bias=False)]
    for index, (before, after) in enumerate(pairwise((_STEM_WIDTH, *widths))):
        entries.append(PreactBasicBlock(before, after, stride=1 if index == 0 else 2))
        entries += [PreactBasicBlock(after, after) for _ in range(blocks - 1)]
    return he_initialised(nn.Sequential(*entries, PreactHead(widths[-1], num_classes)))
