"""VGG networks with BatchNorm for CIFAR, as sequences of layers that a plan can cut after any convolution.

    VGG-19    64 64 | 128 128 | 256 256 256 256 | 512 512 512 512 | 512 512 512 512 | linear

Each number is an entry: 3x3 convolution, BatchNorm, ReLU, and at a bar a 2x2 maximum. On 32 x 32 images one pixel is
left, so one linear layer takes the place of the three of ImageNet, as in the CIFAR versions that are in use (20.0M
parameters); larger images are averaged over the pixels that are left.

Source: Simonyan and Zisserman, arXiv:1409.1556, table 1 (A, B, D, E). Initial weights as He et al., arXiv:1502.01852:
the paper's own (variance 0.01, the deep ones from shallow ones) predates both BatchNorm and theirs.
"""

from __future__ import annotations

from torch import Tensor, nn

from stalewise.errors import ConfigError
from stalewise.models.initialise import he_initialised
from stalewise.models.resnet import Head

__all__ = ["ConvBlock", "vgg"]

_WIDTHS = (64, 128, 256, 512, 512)
_CONVOLUTIONS = {11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}


class ConvBlock(nn.Module):
    """3x3 convolution, BatchNorm, ReLU, and a 2x2 maximum where `pool` is on.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        pool: whether to halve height and width.
    """

    def __init__(self, in_channels: int, out_channels: int, *, pool: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.pool = nn.MaxPool2d(2) if pool else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.pool(self.relu(self.norm(self.conv(x))))
        return output


def vgg(depth: int, *, num_classes: int, in_channels: int = 3) -> nn.Sequential:
    """VGG with BatchNorm for CIFAR.

    Args:
        depth: 11, 13, 16 or 19.
        num_classes: number of logits.
        in_channels: channels of the images, which are at least 32 x 32 pixels.

    Returns:
        An entry per convolution and the classifier, freshly initialised from torch's global generator.

    Raises:
        ConfigError: where there is no VGG of this depth.
    """
    if depth not in _CONVOLUTIONS:
        raise ConfigError(f"there is no VGG of depth {depth}; there are {', '.join(map(str, _CONVOLUTIONS))}.")
    entries: list[nn.Module] = []
    channels = in_channels
    for width, count in zip(_WIDTHS, _CONVOLUTIONS[depth], strict=True):
        for index in range(count):
            entries.append(ConvBlock(channels, width, pool=index == count - 1))
            channels = width
    model = he_initialised(nn.Sequential(*entries, Head(channels, num_classes)))
    nn.init.normal_(model[-1].classifier.weight, std=0.01)  # type: ignore[arg-type, union-attr]
    return model
