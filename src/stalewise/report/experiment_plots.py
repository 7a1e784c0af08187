"""The plots of an experiment, from the rows of its CSV files, as SVG text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

from stalewise.report.experiment import HEADS, UNITS, Column, Plot, Row
from stalewise.report.method_colours import method_colours
from stalewise.report.svg import draw_svg

__all__ = ["draw_plot"]

_STAGES = ("#2563eb", "#dc2626", "#059669", "#d97706", "#7c3aed", "#0891b2", "#be185d", "#4d7c0f", "#6b7280", "#92400e")
_PANEL_WIDTH, _PANEL_HEIGHT, _LEGEND, _LEGEND_COLUMNS = 400, 250, 34, 6


def draw_plot(plot: Plot, title: str, rows: Sequence[Row], curves: Sequence[Row], gradients: Sequence[Row]) -> str:
    """One plot, or an empty string where there is nothing to draw.

    Args:
        plot: which.
        title: of the experiment, for screen readers.
        rows: of the results: a method in a part.
        curves: an epoch of a run each.
        gradients: a measurement of a run each.
    """
    if plot.kind == "curves":
        return _curves(title, curves) if curves else ""
    if plot.kind == "gradients":
        return _gradients(title, gradients) if gradients else ""
    return _bars(plot.column, title, [row for row in rows if row.get(f"{plot.column}_mean")])


def _curves(title: str, curves: Sequence[Row]) -> str:
    """A line of panels for each part: loss and accuracy over epochs, and over time where that is known."""
    panels = [
        (part, x, y)
        for part in _unique(row["part"] for row in curves)
        for x in ("epoch", "time_s")
        for y in ("loss", "accuracy")
        if any(row[x] and row["part"] == part for row in curves)
    ]
    colours = method_colours(row["method"] for row in curves)
    width, height = _PANEL_WIDTH * 2, _PANEL_HEIGHT * len(panels) // 2 + _legend_height(len(colours))

    def draw(figure: Any) -> None:
        grid = figure.subplots(len(panels) // 2, 2, squeeze=False)
        for axes, (part, x, y) in zip(grid.flat, panels, strict=True):
            for method, colour in colours.items():
                own = [row for row in curves if (row["part"], row["method"]) == (part, method)]
                places, values, lows, highs = _mean_curve(own, x, y)
                axes.plot(places, values, color=colour, marker="o", markersize=3, linewidth=1.4, label=method)
                axes.fill_between(places, lows, highs, color=colour, alpha=0.12, linewidth=0)
            name = {"loss": "training loss", "accuracy": "test accuracy, %"}[y]
            axes.set_title(f"{part}: {name}", fontsize=11, loc="left")
            axes.set_xlabel({"epoch": "epoch", "time_s": "seconds, evaluations included"}[x])
            axes.xaxis.get_major_locator().set_params(integer=True)
        _finish(figure, grid[0][0], len(colours), height)

    return draw_svg(draw, width, height, "curves", f"{title}: loss and accuracy over epochs and time")


def _bars(column: Column, title: str, rows: Sequence[Row]) -> str:
    """A bar for each row, side by side in each part, with the deviation over seeds; a line that no bar can be below."""
    if not rows:
        return ""
    parts = _unique(row["part"] for row in rows)
    colours = method_colours(row["method"] for row in rows)
    slots = len(rows) + len(parts)
    width = max(_PANEL_WIDTH * 2, 60 + 18 * slots)
    height = _PANEL_HEIGHT + 40 + _legend_height(len(colours))
    scale, digits, unit = UNITS[column]

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        # Parts are wide as their rows are many, with a slot between them.
        ticks: list[float] = []
        named: set[str] = set()
        start = 0
        for part in parts:
            own = [row for row in rows if row["part"] == part]
            for place, row in enumerate(own, start):
                mean, spread = (scale * float(row.get(f"{column}_{kind}") or 0) for kind in ("mean", "std"))
                label = None if row["method"] in named else row["method"]
                named.add(row["method"])
                axes.bar(
                    place, mean, width=0.9, color=colours[row["method"]], label=label, yerr=spread, ecolor="#374151"
                )
                axes.annotate(
                    f"{mean:.{digits}f}",
                    (place, mean + spread),
                    xytext=(0, 4),
                    textcoords="offset points",
                    ha="center",
                    fontsize=7.5,
                    rotation=90,
                )
            floors = {float(row["floor_mean"]) for row in own if row.get("floor_mean")}
            if column == "slow_down" and floors:
                ends = (start - 0.5, start + len(own) - 0.5)
                axes.plot(
                    ends,
                    [scale * min(floors)] * 2,
                    color="#111827",
                    linewidth=1.2,
                    linestyle="--",
                    label="floor" if not ticks else None,
                )
            ticks.append(start + (len(own) - 1) / 2)
            start += len(own) + 1
        axes.margins(x=0.02, y=0.22)
        axes.set_xticks(ticks, parts)
        axes.set_title(f"{HEADS[column]}{f', {unit}' if unit else ''}", fontsize=11, loc="left")
        _finish(figure, axes, len(colours), height)

    return draw_svg(draw, width, height, f"bars-{column}", f"{title}: {column.replace('_', ' ')} of each method")


def _gradients(title: str, gradients: Sequence[Row]) -> str:
    """A panel for each method of each part, a line for each stage: the mean over seeds."""
    panels = _unique((row["part"], row["method"]) for row in gradients)
    stages = max(len([name for name in row if name.startswith("stage")]) for row in gradients)
    lines = -(-len(panels) // 2)
    width, height = _PANEL_WIDTH * 2, _PANEL_HEIGHT * lines + _legend_height(stages)

    def draw(figure: Any) -> None:
        grid = figure.subplots(lines, 2, squeeze=False, sharey=True)
        for axes, (part, method) in zip(grid.flat, panels, strict=False):
            own = [row for row in gradients if (row["part"], row["method"]) == (part, method)]
            for stage in range(stages):
                places, values, lows, highs = _mean_curve(own, "batch", f"stage{stage}")
                axes.plot(places, values, color=_STAGES[stage % len(_STAGES)], linewidth=1.2, label=f"stage {stage}")
                axes.fill_between(places, lows, highs, color=_STAGES[stage % len(_STAGES)], alpha=0.12, linewidth=0)
            for drop in _drops(own):
                axes.axvline(drop, color="#9ca3af", linewidth=0.8, linestyle="--")
            axes.set_title(f"{part}: {method}", fontsize=11, loc="left")
            axes.set_xlabel("batch (dashed: the learning rate drops)" if _drops(own) else "batch")
            axes.set_ylim(bottom=0)
        for axes in list(grid.flat)[len(panels) :]:
            axes.set_visible(False)
        _finish(figure, grid[0][0], stages, height)

    return draw_svg(draw, width, height, "gradients", f"{title}: gradient difference of each stage over training")


def _drops(gradients: Sequence[Row]) -> list[float]:
    """Batches where the learning rate fell to less than a half since the measurement before."""
    rates = sorted({(int(row["batch"]), float(row["lr"])) for row in gradients if row.get("lr")})
    return [(a + b) / 2 for (a, before), (b, after) in pairwise(rates) if after < before / 2]


def _mean_curve(rows: Iterable[Row], x: str, y: str) -> tuple[list[float], list[float], list[float], list[float]]:
    """Mean place, and mean, least and greatest value over seeds, by epoch or batch. Accuracies are in percent."""
    found: dict[int, list[tuple[float, float]]] = {}
    for row in rows:
        if row.get(x) and row.get(y):
            key = int(row["batch"] if "batch" in row else row["epoch"])
            found.setdefault(key, []).append((float(row[x]), float(row[y]) * (100 if y == "accuracy" else 1)))
    points = [tuple(zip(*found[key], strict=True)) for key in sorted(found)]
    places, values = ([sum(numbers[axis]) / len(numbers[axis]) for numbers in points] for axis in (0, 1))
    return places, values, [min(values) for _, values in points], [max(values) for _, values in points]


def _legend_height(labels: int) -> int:
    return _LEGEND if labels <= _LEGEND_COLUMNS else round(1.6 * _LEGEND)


def _finish(figure: Any, axes: Any, labels: int, height: int) -> None:
    handles, names = axes.get_legend_handles_labels()
    figure.legend(handles, names, loc="upper left", ncols=min(labels, _LEGEND_COLUMNS), fontsize=9)
    figure.tight_layout(rect=(0, 0, 1, 1 - _legend_height(labels) / height))


def _unique(values: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(values))
