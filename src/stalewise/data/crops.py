"""The standard crops of ImageNet, as boxes in the image that is decoded; each depends on its key alone.

    training    an area of 8% to 100% of the image, of aspect ratio 3/4 to 4/3, anywhere in it; mirrored with 1/2
    testing     the square in the middle whose side is 224 / 256 of the image's shorter side

A box is cut out and resampled to the size of the batch in one step.

Source: Szegedy et al., arXiv:1409.4842, section 6 (training); Krizhevsky et al. 2012 and He et al., arXiv:1512.03385
(testing: shorter side 256, crop 224). Ten tries for a box that fits, and else the middle, as is usual.
"""

from __future__ import annotations

import math

from stalewise.data.keyed import Stream, keyed_uniforms

__all__ = ["Box", "centre_box", "random_box"]

Box = tuple[float, float, float, float]
"""Left, top, right, bottom, in pixels of the whole image."""

_AREA = (0.08, 1.0)
_ASPECT = (3 / 4, 4 / 3)
_TRIES = 10
_CENTRE = 224 / 256


def random_box(width: int, height: int, index: int, *, seed: int, epoch: int) -> tuple[Box, bool]:
    """The training crop of a sample, and whether it is mirrored.

    Args:
        width: of the image in pixels.
        height: likewise.
        index: of the sample in its data set.
        seed: of the run.
        epoch: counted from 0.
    """
    draws = keyed_uniforms(index, 4 * _TRIES + 1, seed=seed, epoch=epoch, stream=Stream.AUGMENTATION).tolist()
    mirrored = draws[-1] < 0.5
    for area, aspect, across, down in zip(*(draws[start : 4 * _TRIES : 4] for start in range(4)), strict=True):
        pixels = width * height * (_AREA[0] + (_AREA[1] - _AREA[0]) * area)
        ratio = _ASPECT[0] * (_ASPECT[1] / _ASPECT[0]) ** aspect
        box_width, box_height = round(math.sqrt(pixels * ratio)), round(math.sqrt(pixels / ratio))
        if 0 < box_width <= width and 0 < box_height <= height:
            left = int(across * (width - box_width + 1))
            top = int(down * (height - box_height + 1))
            return (left, top, left + box_width, top + box_height), mirrored
    box_width = min(width, round(height * _ASPECT[1]))
    box_height = min(height, round(width / _ASPECT[0]))
    left, top = (width - box_width) // 2, (height - box_height) // 2
    return (left, top, left + box_width, top + box_height), mirrored


def centre_box(width: int, height: int) -> Box:
    """The test crop."""
    side = min(width, height) * _CENTRE
    left, top = (width - side) / 2, (height - side) / 2
    return left, top, left + side, top + side
