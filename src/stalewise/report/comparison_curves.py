"""The curves of a comparison: accuracy and loss, over epochs and over wall time, as SVG texts for a page.

A row has one colour and one marker in all curves, so that they are told apart by people with any colour vision.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from stalewise.report.comparison_columns import percent_target
from stalewise.report.comparison_data import Comparison, Curve, Spread, TableRow
from stalewise.report.method_colours import method_colours
from stalewise.report.svg import MUTED, draw_svg

__all__ = ["beyond_the_picture", "curves", "key_line"]

_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "p", "<", ">", "h", "d")

_WIDTH, _HEIGHT = 520, 290


def key_line(comparison: Comparison, row: TableRow) -> str:
    """A short piece of the row's line with its marker, for a key of all curves."""

    def draw(figure: Any) -> None:
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set_axis_off()
        axes.plot([0, 1, 2], [0, 0, 0], **_line(comparison, row), markevery=[1], markersize=6)
        axes.set_xlim(-0.05, 2.05)

    return draw_svg(draw, 34, 12, f"key-{_place(comparison, row)}", f"line of {row.name}")


def curves(comparison: Comparison, what: str, over: str) -> str:
    """A line per row: the mean over seeds, and a band from the lowest to the highest.

    Args:
        comparison: what is shown.
        what: "accuracy" or "loss".
        over: "epoch" or "time".
    """
    accuracy = what == "accuracy"

    def draw(figure: Any) -> None:
        from matplotlib.ticker import MaxNLocator, PercentFormatter

        axes = figure.add_axes((46 / _WIDTH, 42 / _HEIGHT, 1 - 58 / _WIDTH, 1 - 54 / _HEIGHT))
        seen: list[float] = []
        ends: list[float] = []
        scale, unit = _time_unit(comparison) if over == "time" else (1.0, "epoch")
        for row in reversed(comparison.rows):
            x, spreads = _points(row.curves, what, over)
            if not x:
                continue
            x = [value / scale for value in x]
            style = _line(comparison, row)
            few = len(x) <= 16
            every = 1 if few else max(1, len(x) // 8)
            axes.plot(
                x,
                [value.mean for value in spreads],
                **style,
                markersize=7 if len(x) == 1 else 5.5 if few else 5,
                markevery=every,
            )
            if any(value.low < value.high for value in spreads):
                axes.fill_between(
                    x,
                    [value.low for value in spreads],
                    [value.high for value in spreads],
                    color=style["color"],
                    alpha=0.13,
                    linewidth=0,
                )
            seen += [bound for value in spreads for bound in (value.low, value.high)]
            ends.append(max(x))
        if accuracy and comparison.target_accuracy is not None and seen:
            axes.axhline(comparison.target_accuracy, color=MUTED, linewidth=0.9, linestyle=(0, (2, 3)), zorder=1)
            axes.annotate(
                percent_target(comparison.target_accuracy),
                (0, comparison.target_accuracy),
                xycoords=("axes fraction", "data"),
                xytext=(3, 3),
                textcoords="offset points",
                fontsize=9.5,
                color=MUTED,
            )
            seen.append(comparison.target_accuracy)
        axes.set_xlabel(unit)
        if over == "epoch":
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8, steps=[1, 2, 5, 10]))
            axes.margins(x=0.03)
            if ends and max(ends) <= 1:
                axes.set_xlim(0, 2)
        elif ends:
            axes.set_xlim(0, 1.03 * max(ends))
        _y_limits(axes, seen, accuracy=accuracy, cap=math.inf if accuracy else _loss_cap(comparison))
        if accuracy and seen:
            wide = max(seen) - min(seen) > 0.1
            axes.yaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=0 if wide else 1))
        axes.spines["left"].set_visible(False)

    noun = "Test accuracy" if accuracy else "Training loss"
    return draw_svg(draw, _WIDTH, _HEIGHT, f"{what}-{over}", f"{noun} of each method by {over}")


def beyond_the_picture(comparison: Comparison) -> list[str]:
    """Names of the rows whose losses leave their picture at the top."""
    cap = _loss_cap(comparison)
    return [name for name, highest in _highest_losses(comparison).items() if highest > cap]


def _loss_cap(comparison: Comparison) -> float:
    """Where the pictures of the loss end: one wild run must not flatten all others."""
    highest = list(_highest_losses(comparison).values())
    return 1.25 * float(np.median(highest)) if len(highest) > 2 else math.inf


def _highest_losses(comparison: Comparison) -> dict[str, float]:
    found = {row.name: _points(row.curves, "loss", "epoch")[1] for row in comparison.rows}
    return {name: max(value.high for value in spreads) for name, spreads in found.items() if spreads}


def _y_limits(axes: Any, seen: Sequence[float], *, accuracy: bool, cap: float) -> None:
    if not seen:
        return
    low, high = min(seen), min(max(seen), cap)
    span = max(high - low, 0.02)
    top = high + 0.08 * span
    axes.set_ylim(max(0.0, low - 0.08 * span), top)
    if accuracy:
        axes.set_yticks([tick for tick in axes.get_yticks() if max(0.0, low - 0.08 * span) <= tick <= min(top, 1.0)])


def _points(curves_of: Sequence[Curve], what: str, over: str) -> tuple[list[float], list[Spread]]:
    """Where the line goes: for every epoch that all runs have a value for, the mean place and the values."""
    by_epoch: dict[int, list[tuple[float, float]]] = {}
    for curve in curves_of:
        values = curve.accuracy if what == "accuracy" else curve.loss
        for epoch, time_s, value in zip(curve.epoch, curve.time_s, values, strict=True):
            place = float(epoch) if over == "epoch" else time_s
            if place is not None and value is not None and math.isfinite(value):
                by_epoch.setdefault(epoch, []).append((place, value))
    points = [points for _, points in sorted(by_epoch.items()) if len(points) == len(curves_of)]
    return (
        [math.fsum(place for place, _ in each) / len(each) for each in points],
        [Spread(tuple(value for _, value in each)) for each in points],
    )


def _time_unit(comparison: Comparison) -> tuple[float, str]:
    longest = max(
        (time_s for row in comparison.rows for curve in row.curves for time_s in curve.time_s if time_s is not None),
        default=0.0,
    )
    return (3600.0, "hours") if longest >= 7200 else (60.0, "minutes") if longest >= 180 else (1.0, "seconds")


def _place(comparison: Comparison, row: TableRow) -> int:
    return next(place for place, other in enumerate(comparison.rows) if other.name == row.name)


def _line(comparison: Comparison, row: TableRow) -> dict[str, Any]:
    """The look of a row's line, the same in all curves of a page."""
    place = _place(comparison, row)
    return {
        "color": method_colours(other.name for other in comparison.rows)[row.name],
        "linewidth": 1.6 if row.baseline else 2.0,
        "linestyle": (0, (4, 2)) if row.baseline else "-",
        "marker": _MARKERS[place % len(_MARKERS)],
        "markeredgecolor": "white",
        "markeredgewidth": 0.7,
    }
