"""ImageNet residual networks, as sequences of layers that a plan can cut between any two blocks.

    stem        7x7 conv of stride 2, 64, BN, ReLU, 3x3 maximum of stride 2          112 x 112, 56 x 56
    blocks      depth 18: 2 2 2 2    34: 3 4 6 3                basic                 64  128  256   512
                depth 50: 3 4 6 3   101: 3 4 23 3  152: 3 8 36 3   bottleneck        256  512 1024  2048
    head        pool, linear

The sizes are those of 224 x 224 images; any size works.

Source: He et al., arXiv:1512.03385, table 1, with projections where the shape changes (option B).
"""

from __future__ import annotations

from torch import Tensor, nn

from stalewise.errors import ConfigError
from stalewise.models.bottleneck import Bottleneck, projection
from stalewise.models.initialise import he_initialised
from stalewise.models.resnet import Head

__all__ = ["ImageNetBasicBlock", "ImageNetStem", "imagenet_resnet"]

_BASIC = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3)}
_BOTTLENECK = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}
_WIDTHS = (64, 128, 256, 512)
_EXPANSION = 4


class ImageNetStem(nn.Module):
    """7x7 convolution of stride 2, BatchNorm, ReLU, 3x3 maximum of stride 2.

    Args:
        in_channels: channels of the images.
        out_channels: channels of the output [B, out_channels, H / 4, W / 4].
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size=7, stride=2, padding=3, bias=False)
        self.norm = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.pool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        output: Tensor = self.pool(self.relu(self.norm(self.conv(images))))
        return output


class ImageNetBasicBlock(nn.Module):
    """Two 3x3 convolutions, with a projection where the shape changes; the ReLU comes after the sum.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        stride: of the first convolution and of the shortcut.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, kernel_size=3, stride=stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, kernel_size=3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(out_channels)
        same = stride == 1 and in_channels == out_channels
        self.shortcut = nn.Identity() if same else projection(in_channels, out_channels, stride)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.relu(self.norm1(self.conv1(x)))
        output: Tensor = self.relu(self.norm2(self.conv2(inner)) + self.shortcut(x))
        return output


def imagenet_resnet(depth: int, *, num_classes: int = 1000, in_channels: int = 3) -> nn.Sequential:
    """The ImageNet ResNet of He et al. 2015.

    Args:
        depth: 18, 34, 50, 101 or 152.
        num_classes: number of logits.
        in_channels: channels of the images.

    Returns:
        An entry per block, the stem and the head, freshly initialised from torch's global generator.

    Raises:
        ConfigError: where there is no ImageNet ResNet of this depth.
    """
    depths = {**_BASIC, **_BOTTLENECK}
    if depth not in depths:
        raise ConfigError(
            f"there is no ImageNet ResNet of depth {depth}; there are {', '.join(map(str, depths))}. (CIFAR "
            "ResNets are resnet<depth>, without imagenet-.)"
        )
    entries: list[nn.Module] = [ImageNetStem(in_channels, _WIDTHS[0])]
    channels = _WIDTHS[0]
    for index, (width, count) in enumerate(zip(_WIDTHS, depths[depth], strict=True)):
        for block in range(count):
            stride = 2 if index and not block else 1
            out_channels = width if depth in _BASIC else width * _EXPANSION
            if depth in _BASIC:
                entries.append(ImageNetBasicBlock(channels, out_channels, stride))
            else:
                entries.append(Bottleneck(channels, width, out_channels, stride=stride))
            channels = out_channels
    return he_initialised(nn.Sequential(*entries, Head(channels, num_classes)))
