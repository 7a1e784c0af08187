"""In which order segments are computed, many at a time.

Every segment has a *level* in every local step, level(n) = stride * n + offset, such that all it depends on has a
lower one. So all segments of a level can be computed in one go of array arithmetic:

    minimal DSP, stride 2       level   0     1     2     3     4     5
                              stage 0   A0    .     A1    B..   A2
                              stage 1         A0    .     A1    B..        A: up to the wait for the gradient
                              stage 2               A0          A1         B: from there on

The smallest stride is the maximum cycle mean of the graph with a unit of time per segment, rounded up: levels are the
begins of segments on a clock on which each takes 1. Bubble-free methods have short strides and wide levels; where
stages lock each other (backpropagation), the stride grows with their number, because there is nothing to do at once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from stalewise.timing.costs import IntArray
from stalewise.timing.cycle import maximum_cycle_ratio
from stalewise.timing.period import Period

__all__ = ["Levels", "levels_of"]


@dataclass(frozen=True, eq=False)
class Levels:
    """When each segment may be computed.

    Args:
        stride: levels from one local step to the next.
        offsets: [segments], level of each in local step 0; the lowest is 0.
    """

    stride: int
    offsets: IntArray


def levels_of(period: Period) -> Levels:
    """The levels with the smallest stride.

    Raises:
        ProgramError: where the program deadlocks.
    """
    number = len(period.segments)
    sources, steps = np.full((2, number), -1, np.int64), np.zeros((2, number), np.int64)
    for index, part in enumerate(period.segments):
        sources[0, index], steps[0, index] = part.previous, part.previous_steps
        if part.source is not None:
            sources[1, index], steps[1, index] = part.source, part.source_steps
    ones = np.ones_like(sources)
    ratio, _ = maximum_cycle_ratio(sources, ones, steps, at_least=Fraction(1))
    stride = math.ceil(ratio)
    apart = ones - stride * steps
    offsets = np.zeros(number, np.int64)
    while True:
        through = np.where(sources >= 0, offsets[sources] + apart, 0).max(axis=0)
        if (through <= offsets).all():
            return Levels(stride, offsets - offsets.min())
        offsets = np.maximum(offsets, through)
