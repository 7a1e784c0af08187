"""CIFAR residual networks as sequences of layers that a plan can cut between any two blocks.

    entry       basic, depth 6n + 2                 pre-activation bottleneck, depth 9n + 2
    stem        3x3 conv, 16, BN, ReLU              3x3 conv, 16
    n blocks    2 x (3x3 conv), 16,  32 x 32        1x1, 3x3, 1x1 conv,  64 out,  32 x 32
    n blocks    2 x (3x3 conv), 32,  16 x 16        1x1, 3x3, 1x1 conv, 128 out,  16 x 16
    n blocks    2 x (3x3 conv), 64,   8 x  8        1x1, 3x3, 1x1 conv, 256 out,   8 x  8
    head        pool, linear                        BN, ReLU, pool, linear

Each entry is one module, so ResNet-20 has 11 of them. The sizes are those of 32 x 32 images; any size works.

Source: He et al., arXiv:1512.03385, section 4.2 (basic), and arXiv:1603.05027 with the authors' own code for
ResNet-1001 (bottleneck; there the 1x1 convolution that opens a block carries its stride).
"""

from __future__ import annotations

from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from stalewise.errors import ConfigError
from stalewise.models.initialise import he_initialised

__all__ = [
    "BasicBlock",
    "Head",
    "PadShortcut",
    "PreactBottleneck",
    "PreactHead",
    "Stem",
    "basic_resnet",
    "preact_bottleneck_resnet",
]

_STEM_WIDTH = 16
_BASIC_WIDTHS = (16, 32, 64)
_BOTTLENECK_WIDTHS = (64, 128, 256)
_EXPANSION = 4
"""Output channels of a bottleneck per channel of its 3x3 convolution."""


class Stem(nn.Module):
    """First entry of a basic ResNet: 3x3 convolution, BatchNorm, ReLU.

    Args:
        in_channels: channels of the images.
        out_channels: channels of the output [B, out_channels, H, W].
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = _conv3x3(in_channels, out_channels)
        self.norm = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, images: Tensor) -> Tensor:
        output: Tensor = self.relu(self.norm(self.conv(images)))
        return output


class PadShortcut(nn.Module):
    """Option A of He et al. 2015: every `stride`-th pixel, and zeros for the channels that are new.

    It has no parameters. The added channels are half before and half after the old ones.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        added = out_channels - in_channels
        self.before = added // 2
        self.after = added - self.before
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.before, self.after))

    def extra_repr(self) -> str:
        return f"before={self.before}, after={self.after}, stride={self.stride}"


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a parameter-free shortcut; the ReLU comes after the sum.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        stride: of the first convolution and of the shortcut.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = _conv3x3(in_channels, out_channels, stride)
        self.norm1 = nn.BatchNorm2d(out_channels)
        self.conv2 = _conv3x3(out_channels, out_channels)
        self.norm2 = nn.BatchNorm2d(out_channels)
        same = stride == 1 and in_channels == out_channels
        self.shortcut = nn.Identity() if same else PadShortcut(in_channels, out_channels, stride)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        # A stage keeps its input for the recompute, so ReLU in place works only on what this block made.
        inner = self.relu(self.norm1(self.conv1(x)))
        output: Tensor = self.relu(self.norm2(self.conv2(inner)) + self.shortcut(x))
        return output


class PreactBottleneck(nn.Module):
    """BatchNorm and ReLU before each of a 1x1, a 3x3 and a 1x1 convolution; nothing after the sum.

    Where the shape changes, the shortcut is a 1x1 convolution of the first activation rather than of the
    input, as in the authors' code.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output, a multiple of 4.
        stride: of the first convolution and of the shortcut.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__()
        width = out_channels // _EXPANSION
        self.norm1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, width, kernel_size=1, stride=stride, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.conv2 = _conv3x3(width, width)
        self.norm3 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, out_channels, kernel_size=1, bias=False)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut = (
            None
            if stride == 1 and in_channels == out_channels
            else nn.Conv2d(in_channels, out_channels, kernel_size=1, stride=stride, bias=False)
        )

    def forward(self, x: Tensor) -> Tensor:
        # BatchNorm has made a new tensor, so this ReLU in place leaves the block's input as it is.
        activation = self.relu(self.norm1(x))
        inner = self.relu(self.norm2(self.conv1(activation)))
        inner = self.relu(self.norm3(self.conv2(inner)))
        residual: Tensor = self.conv3(inner)
        return residual + (x if self.shortcut is None else self.shortcut(activation))


class Head(nn.Module):
    """Last entry of a basic ResNet: mean over all pixels, then a linear classifier.

    Args:
        in_channels: channels of the last block.
        num_classes: columns of the output [B, num_classes], which are logits.
    """

    def __init__(self, in_channels: int, num_classes: int) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.classifier = nn.Linear(in_channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.flatten(self.pool(x)))
        return logits


class PreactHead(nn.Module):
    """Last entry of a pre-activation ResNet: the BatchNorm and ReLU that are still due, then `Head`.

    Args:
        in_channels: channels of the last block.
        num_classes: columns of the output [B, num_classes], which are logits.
    """

    def __init__(self, in_channels: int, num_classes: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(in_channels)
        self.relu = nn.ReLU(inplace=True)
        self.head = Head(in_channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.relu(self.norm(x)))
        return logits


def basic_resnet(depth: int, *, num_classes: int, in_channels: int = 3) -> nn.Sequential:
    """The CIFAR ResNet of He et al. 2015 with option-A shortcuts.

    Args:
        depth: 6n + 2 with n >= 1: 8, 14, 20, 32, 44, 56, 110, ...
        num_classes: number of logits.
        in_channels: channels of the images.

    Returns:
        3n + 2 entries, freshly initialised from torch's global generator.

    Raises:
        ConfigError: where `depth` is not 6n + 2.
    """
    blocks_per_width = _blocks_per_width(depth, layers_per_block=2)
    entries: list[nn.Module] = [Stem(in_channels, _STEM_WIDTH)]
    for width_before, width in pairwise((_STEM_WIDTH, *_BASIC_WIDTHS)):
        stride = 1 if width == _BASIC_WIDTHS[0] else 2
        entries.append(BasicBlock(width_before, width, stride))
        entries += [BasicBlock(width, width) for _ in range(blocks_per_width - 1)]
    return he_initialised(nn.Sequential(*entries, Head(_BASIC_WIDTHS[-1], num_classes)))


def preact_bottleneck_resnet(depth: int, *, num_classes: int, in_channels: int = 3) -> nn.Sequential:
    """The CIFAR pre-activation bottleneck ResNet of He et al. 2016.

    Args:
        depth: 9n + 2 with n >= 1: 11, 20, 29, 164, 1001, ...
        num_classes: number of logits.
        in_channels: channels of the images.

    Returns:
        3n + 2 entries, freshly initialised from torch's global generator.

    Raises:
        ConfigError: where `depth` is not 9n + 2.
    """
    blocks_per_width = _blocks_per_width(depth, layers_per_block=3)
    entries: list[nn.Module] = [_conv3x3(in_channels, _STEM_WIDTH)]
    for width_before, width in pairwise((_STEM_WIDTH, *_BOTTLENECK_WIDTHS)):
        stride = 1 if width == _BOTTLENECK_WIDTHS[0] else 2
        entries.append(PreactBottleneck(width_before, width, stride))
        entries += [PreactBottleneck(width, width) for _ in range(blocks_per_width - 1)]
    return he_initialised(nn.Sequential(*entries, PreactHead(_BOTTLENECK_WIDTHS[-1], num_classes)))


def _blocks_per_width(depth: int, *, layers_per_block: int) -> int:
    """n of depth = 3 * layers_per_block * n + 2: three widths, and a layer each in the stem and the head."""
    period = 3 * layers_per_block
    blocks, rest = divmod(depth - 2, period)
    if blocks >= 1 and rest == 0:
        return blocks
    kind = "a basic" if layers_per_block == 2 else "a pre-activation bottleneck"
    below = period * max(blocks, 1) + 2
    nearest = f"{below} or {below + period}" if blocks >= 1 else str(below)
    raise ConfigError(
        f"depth {depth} is not possible; {kind} ResNet for CIFAR has {period}n + 2 layers with n >= 1. "
        f"The nearest depth is {nearest}."
    )


def _conv3x3(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, kernel_size=3, stride=stride, padding=1, bias=False)
