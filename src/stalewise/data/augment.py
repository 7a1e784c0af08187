"""The usual augmentation of CIFAR: random crops of the zero-padded image, and mirroring.

    bits of a sample   62 ..... 32   31          30 ...... 0
    decide             left edge     mirrored    top edge

Edges are 0 .. 8 in the padded image; 4 is where the image itself is.

Source: He et al., arXiv:1512.03385, section 4.2. Padded with 0 before the normalisation, that is with black.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from stalewise.data.keyed import Stream, keyed_bits

__all__ = ["augment", "normalise"]

_PADDING = 4
_EDGE_BITS = np.uint64(31)
_EDGE_MASK = np.uint64(2**31 - 1)


def augment(images: Tensor, indices: Tensor, *, seed: int, epoch: int, flip: bool) -> Tensor:
    """Crop and mirror each image as its key says, whatever the batch it is in.

    Args:
        images: uint8 [B, C, H, W].
        indices: int64 [B], the index of each image in its data set.
        seed: of the run.
        epoch: counted from 0.
        flip: whether to mirror each image with probability 1/2.

    Returns:
        uint8 [B, C, H, W], a new tensor.

    Raises:
        ConfigError: where `seed` or `epoch` is negative or above 64 bits.
    """
    batch, channels, height, width = images.shape
    bits = keyed_bits(indices.numpy(), seed=seed, epoch=epoch, stream=Stream.AUGMENTATION)
    # (31 random bits * choices) >> 31 is uniform to one part in 10^8, and needs no rejection.
    choices = np.uint64(2 * _PADDING + 1)
    top = (((bits & _EDGE_MASK) * choices) >> _EDGE_BITS).astype(np.int64)
    left = ((((bits >> np.uint64(32)) & _EDGE_MASK) * choices) >> _EDGE_BITS).astype(np.int64)
    mirrored = ((bits >> np.uint64(31)) & np.uint64(1)).astype(bool) & flip

    rows = top[:, None] + np.arange(height)
    across = np.arange(width)
    columns = left[:, None] + np.where(mirrored[:, None], across[::-1], across)
    padded_width = width + 2 * _PADDING
    # One gather crops and mirrors all images at once; it is a third of the time of slicing them one by one.
    pixels = torch.from_numpy((rows * padded_width)[:, :, None] + columns[:, None, :]).view(batch, 1, -1)
    padded = F.pad(images, (_PADDING,) * 4).flatten(2)
    return padded.gather(2, pixels.expand(-1, channels, -1)).view(batch, channels, height, width)


def normalise(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(pixel / 255 - mean) / std per channel.

    Args:
        images: uint8 [B, C, H, W].
        mean: C numbers.
        std: C numbers, none of them 0.

    Returns:
        float32 [B, C, H, W].
    """
    shape = (1, len(mean), 1, 1)
    scaled = images.to(torch.float32).div_(255)
    return scaled.sub_(torch.tensor(mean).view(shape)).div_(torch.tensor(std).view(shape))
