"""The bars of a comparison: speed, accuracy and memory of each row, as SVG texts for a page.

The best method is dark, baselines are grey. Stages have the colours that they have in the report of a run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from stalewise.report.comparison_columns import unit_of
from stalewise.report.comparison_data import Comparison, Spread, StageMemory, TableRow
from stalewise.report.figures import stage_colour
from stalewise.report.svg import INK, MUTED, draw_svg
from stalewise.report.wording import NOT_RECORDED, count, percent, size

__all__ = ["CATEGORIES", "accuracy_dots", "memory_bars", "memory_categories", "speed_bars"]

_ACCENT, _LIGHT, _GREY, _FAILED = "#2f5d9b", "#b4c8e1", "#d3d7dd", "#b45343"

CATEGORIES: Mapping[str, str] = {
    "weights": "#4b5a78",
    "stashed": "#765a78",
    "optimizer": "#8fa6bd",
    "gradients": "#eda549",
    "inputs": "#6aa598",
    "graphs": "#3d6fb0",
    "queues": "#c9b98f",
}
"""What memory is used for, and its colour."""

_PANEL, _ROW, _WIDE = 340, 25, 1080


def speed_bars(comparison: Comparison) -> str:
    """Samples per second of each row, and how many times as fast as backpropagation it is."""
    found = [row.samples_per_s for row in comparison.rows]

    def label(row: TableRow) -> tuple[str, ...]:
        assert row.samples_per_s is not None
        times = "" if row.speed_up is None else f"{row.speed_up.mean:.2f}×"
        return count(row.samples_per_s.mean), times

    def draw(axes: Any) -> float:
        best = _best(comparison.rows, found)
        for place, (row, value) in enumerate(zip(comparison.rows, found, strict=True)):
            if value is not None:
                colour = _GREY if row.baseline else _ACCENT if value.mean == best else _LIGHT
                axes.barh([place], [value.mean], height=0.62, color=colour, zorder=2)
                _range(axes, place, value, 0.62)
        axes.set_xlim(left=0)
        return max((value.high for value in found if value is not None), default=1.0)

    return _panel(comparison, found, label, draw, "speed", "Samples per second of each method", room=96)


def accuracy_dots(comparison: Comparison) -> str:
    """Test accuracy of each row: the mean, and the range over seeds."""
    found = [row.test_accuracy for row in comparison.rows]

    def label(row: TableRow) -> tuple[str, ...]:
        return (percent(row.test_accuracy.mean, 2) if row.test_accuracy else "",)

    def draw(axes: Any) -> float:
        known = [value for value in found if value is not None and math.isfinite(value.mean)]
        best = _best(comparison.rows, found)
        low = min((value.low for value in known), default=0.0)
        high = max((value.high for value in known), default=1.0)
        for place, (row, value) in enumerate(zip(comparison.rows, found, strict=True)):
            if value is None:
                continue
            colour = "#9ca3af" if row.baseline else _ACCENT if value.mean == best else "#7fa0cb"
            if value.low < value.high:
                axes.plot([value.low, value.high], [place, place], color=colour, linewidth=3.2, alpha=0.4)
            axes.plot([value.mean], [place], marker="o", markersize=8, color=colour, clip_on=False)
        axes.set_xlim(left=low - 0.06 * max(high - low, 0.01))
        return high

    return _panel(comparison, found, label, draw, "final", "Test accuracy of each method", room=62)


def memory_bars(comparison: Comparison) -> str:
    """Peak memory of each row, stage by stage; a tick marks the prediction."""
    found = [row.memory_total for row in comparison.rows]

    def label(row: TableRow) -> tuple[str, ...]:
        return (size(row.memory_total.mean) if row.memory_total else "",)

    def draw(axes: Any) -> float:
        longest = [1.0]
        for place, row in enumerate(comparison.rows):
            start = 0.0
            for stage, part in enumerate(row.memory if row.memory_total else ()):
                length = part.measured["total"].mean
                axes.barh([place], [length], left=start, height=0.62, color=stage_colour(stage), zorder=2)
                start += length
            longest.append(start)
            if row.memory_total and row.memory_predicted:
                axes.plot([row.memory_predicted] * 2, [place - 0.42, place + 0.42], color=INK, linewidth=1.6, zorder=4)
                longest.append(row.memory_predicted)
        axes.set_xlim(left=0)
        return max(longest)

    return _panel(comparison, found, label, draw, "memory", "Peak memory of each method", room=74)


def memory_categories(comparison: Comparison) -> str:
    """What the memory of each stage is used for: a bar per row and stage, a tick for the predicted total."""
    rows = [row for row in comparison.rows if any(stage.measured for stage in row.memory)]
    bars = [(row, stage) for row in rows for stage in range(len(row.memory))]
    names = [name for name in CATEGORIES if any(_held(row.memory[stage], name) for row, stage in bars)]
    gap = 0.55
    places, place = [], 0.0
    for index, (_, stage) in enumerate(bars):
        place += (1.0 + gap if stage == 0 else 1.0) if index else 0.0
        places.append(place)
    step, top, bottom, left, right = 17, 32, 26, 172, 74
    height = round(top + bottom + step * (place + 1))

    def draw(figure: Any) -> None:
        from matplotlib.patches import Patch
        from matplotlib.ticker import MaxNLocator

        axes = figure.add_axes((left / _WIDE, bottom / height, 1 - (left + right) / _WIDE, 1 - (top + bottom) / height))
        longest = 1.0
        for (row, stage), y in zip(bars, places, strict=True):
            part, start = row.memory[stage], 0.0
            for name in names:
                length = _held(part, name)
                axes.barh([y], [length], left=start, height=0.8, color=CATEGORIES[name], zorder=2)
                start += length
            predicted = part.predicted.get("total")
            if predicted:
                axes.plot([predicted] * 2, [y - 0.5, y + 0.5], color=INK, linewidth=1.6, zorder=4)
            total = part.measured.get("total")
            end = max(start, predicted or 0.0)
            axes.annotate(
                "" if total is None else size(total.mean),
                (end, y),
                xytext=(6, 0),
                textcoords="offset points",
                va="center_baseline",
                fontsize=10,
                color=MUTED,
            )
            longest = max(longest, end)
        axes.set_xlim(0, 1.003 * longest)
        axes.set_ylim(place + 0.6, -0.6)
        axes.set_yticks(places, [f"stage {stage}" for _, stage in bars])
        axes.tick_params(axis="y", labelcolor=MUTED, labelsize=10)
        for row in rows:
            own = [y for (other, _), y in zip(bars, places, strict=True) if other is row]
            axes.annotate(
                row.name,
                (0, sum(own) / len(own)),
                xycoords=("axes fraction", "data"),
                xytext=(-62, 0),
                textcoords="offset points",
                ha="right",
                va="center_baseline",
                fontsize=11.5,
                color=INK,
            )
        unit, scale = unit_of(longest)
        ticks = list(MaxNLocator(nbins=7, steps=[1, 2, 4, 5, 10]).tick_values(0, longest / scale))
        axes.set_xticks(
            [tick * scale for tick in ticks if tick * scale <= longest],
            [f"{tick:g} {unit}" if tick else "0" for tick in ticks if tick * scale <= longest],
        )
        axes.grid(visible=False, axis="y")
        axes.grid(visible=True, axis="x")
        axes.spines["left"].set_visible(False)
        axes.spines["bottom"].set_visible(False)
        axes.tick_params(axis="x", length=0)
        figure.legend(
            handles=[Patch(label=name, facecolor=CATEGORIES[name]) for name in names],
            loc="upper left",
            bbox_to_anchor=(left / _WIDE, 1 - 4 / height),
            ncols=len(names),
            handlelength=1.3,
            handleheight=0.9,
            handletextpad=0.5,
            columnspacing=1.6,
            borderpad=0,
            borderaxespad=0,
        )

    return draw_svg(draw, _WIDE, height, "categories", "Memory of each stage by what it is used for")


def _best(rows: Sequence[TableRow], found: Sequence[Spread | None]) -> float:
    """The highest mean of a method; baselines do not compete."""
    values = [value.mean for row, value in zip(rows, found, strict=True) if value is not None and not row.baseline]
    return max((value for value in values if math.isfinite(value)), default=math.nan)


def _held(part: StageMemory, category: str) -> float:
    return part.measured[category].mean if category in part.measured else 0.0


def _range(axes: Any, place: int, value: Spread, height: float) -> None:
    """A whisker from the lowest to the highest."""
    if value.low < value.high:
        axes.plot([value.low, value.high], [place, place], color=INK, linewidth=1.2, alpha=0.65, zorder=3)
        for bound in (value.low, value.high):
            tick = height / 5
            axes.plot([bound] * 2, [place - tick, place + tick], color=INK, linewidth=1.2, alpha=0.65, zorder=3)


def _panel(
    comparison: Comparison,
    found: Sequence[Spread | None],
    label: Callable[[TableRow], tuple[str, ...]],
    draw_rows: Callable[[Any], float],
    name: str,
    title: str,
    *,
    room: int,
) -> str:
    """A small figure with a line per row: name, what `draw_rows` draws, and the numbers at the right.

    `draw_rows` returns the largest value, which the numbers stand beyond; `room` is the width of all of them.
    """
    rows = comparison.rows
    left = 12 + min(130, round(6.1 * max(len(row.name) for row in rows)))
    height = 10 + _ROW * len(rows)

    def draw(figure: Any) -> None:
        axes = figure.add_axes((left / _PANEL, 0.0, 1 - (left + room) / _PANEL, 1.0))
        axes.set_xlim(right=1.01 * draw_rows(axes))
        axes.set_ylim(len(rows) - 0.5 + 5 / _ROW, -0.5 - 5 / _ROW)
        for place, (row, value) in enumerate(zip(rows, found, strict=True)):
            axes.annotate(
                row.name,
                (0, place),
                xycoords=("axes fraction", "data"),
                xytext=(-9, 0),
                textcoords="offset points",
                ha="right",
                va="center_baseline",
                fontsize=11,
                color=MUTED if row.baseline else INK,
            )
            texts, colour = (label(row), INK) if value is not None else ((NOT_RECORDED,), MUTED)
            if row.failures and not row.done:
                texts, colour = ("failed",), _FAILED
            for column, text in enumerate(texts):
                right = room * (column + 1) / len(texts) if len(texts) > 1 else room
                axes.annotate(
                    text,
                    (1, place),
                    xycoords=("axes fraction", "data"),
                    xytext=(right - 4, 0),
                    textcoords="offset points",
                    ha="right",
                    va="center_baseline",
                    fontsize=11,
                    color=MUTED if column else colour,
                )
        axes.grid(visible=False)
        axes.set_xticks([])
        axes.set_yticks([])
        for spine in axes.spines.values():
            spine.set_visible(False)

    return draw_svg(draw, _PANEL, height, name, title)
