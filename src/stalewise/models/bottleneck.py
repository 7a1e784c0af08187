"""The bottleneck block of ResNet and ResNeXt, with the ReLU after the sum and a projection where the shape changes."""

from __future__ import annotations

from torch import Tensor, nn

__all__ = ["Bottleneck"]


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolution with BatchNorm; the ReLU comes after the sum.

    The 3x3 convolution carries the stride, as in the authors' code of ResNeXt and in the ResNet code that followed the
    paper; in the ResNet paper itself the first 1x1 does. Parameters are the same.

    Args:
        in_channels: channels of the input.
        width: channels of the 3x3 convolution.
        out_channels: channels of the output.
        stride: of the 3x3 convolution and of the shortcut.
        groups: of the 3x3 convolution, the cardinality of ResNeXt.
    """

    def __init__(self, in_channels: int, width: int, out_channels: int, *, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, kernel_size=1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, kernel_size=3, stride=stride, padding=1, groups=groups, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, out_channels, kernel_size=1, bias=False)
        self.norm3 = nn.BatchNorm2d(out_channels)
        same = stride == 1 and in_channels == out_channels
        self.shortcut = nn.Identity() if same else projection(in_channels, out_channels, stride)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        # A stage keeps its input for the recompute, so ReLU in place works only on what this block made.
        inner = self.relu(self.norm1(self.conv1(x)))
        inner = self.relu(self.norm2(self.conv2(inner)))
        output: Tensor = self.relu(self.norm3(self.conv3(inner)) + self.shortcut(x))
        return output


def projection(in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
    """A 1x1 convolution and BatchNorm: option B of He et al. 2015."""
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel_size=1, stride=stride, bias=False), nn.BatchNorm2d(out_channels)
    )
