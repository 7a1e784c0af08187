"""The plots of an experiment, from the rows of its CSV files, as SVG text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from stalewise.report.experiment import Column, Plot, Row, cell
from stalewise.report.figures import stage_colour
from stalewise.report.svg import draw_svg

__all__ = ["draw_plot"]

_COLOURS = (
    "#2563eb",
    "#dc2626",
    "#059669",
    "#d97706",
    "#7c3aed",
    "#0891b2",
    "#be185d",
    "#4d7c0f",
    "#6b7280",
    "#92400e",
)
_PANEL_WIDTH, _PANEL_HEIGHT, _LEGEND = 400, 250, 34


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
    """A line of panels for each part: loss and accuracy over epochs and over time."""
    parts = _unique(row["part"] for row in curves)
    kinds = [("epoch", "loss"), ("epoch", "accuracy"), ("time_s", "loss"), ("time_s", "accuracy")]
    colours = _colours(row["method"] for row in curves)
    width, height = _PANEL_WIDTH * 2, _PANEL_HEIGHT * 2 * len(parts) + _LEGEND

    def draw(figure: Any) -> None:
        grid = figure.subplots(2 * len(parts), 2, squeeze=False)
        for index, part in enumerate(parts):
            for place, (x, y) in enumerate(kinds):
                axes = grid[2 * index + place // 2][place % 2]
                for method, colour in colours.items():
                    points = _mean_curve(
                        [row for row in curves if (row["part"], row["method"]) == (part, method)], x, y
                    )
                    axes.plot(*points, color=colour, marker="o", markersize=3, label=method)
                name = {"loss": "training loss", "accuracy": "test accuracy"}[y]
                axes.set_title(f"{part}: {name}", fontsize=11, loc="left")
                axes.set_xlabel({"epoch": "epoch", "time_s": "seconds, evaluations included"}[x])
        _finish(figure, grid[0][0], len(colours), height)

    return draw_svg(draw, width, height, "curves", f"{title}: loss and accuracy over epochs and time")


def _bars(column: Column, title: str, rows: Sequence[Row]) -> str:
    if not rows:
        return ""
    parts = _unique(row["part"] for row in rows)
    colours = _colours(row["method"] for row in rows)
    width, height = max(_PANEL_WIDTH * 2, 60 + 18 * len(rows) + 40 * len(parts)), _PANEL_HEIGHT + 40 + _LEGEND

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        share = 0.85 / len(colours)
        for place, (method, colour) in enumerate(colours.items()):
            own = {row["part"]: row for row in rows if row["method"] == method}
            at = [parts.index(part) + share * (place - (len(colours) - 1) / 2) for part in own]
            heights = [float(row[f"{column}_mean"]) for row in own.values()]
            spreads = [float(row.get(f"{column}_std") or 0) for row in own.values()]
            axes.bar(at, heights, width=0.92 * share, color=colour, label=method, yerr=spreads, ecolor="#374151")
            for x, y, row in zip(at, heights, own.values(), strict=True):
                text = cell(row, column).split(" ±")[0]
                axes.annotate(
                    text, (x, y), xytext=(0, 4), textcoords="offset points", ha="center", fontsize=7.5, rotation=90
                )
        axes.margins(y=0.22)
        axes.set_xticks(range(len(parts)), parts)
        _finish(figure, axes, len(colours), height)

    return draw_svg(draw, width, height, f"bars-{column}", f"{title}: {column.replace('_', ' ')} of each method")


def _gradients(title: str, gradients: Sequence[Row]) -> str:
    """A panel for each method of each part, a line for each stage: the mean over seeds."""
    panels = _unique((row["part"], row["method"]) for row in gradients)
    stages = max(len([name for name in row if name.startswith("stage")]) for row in gradients)
    width, height = _PANEL_WIDTH * 2, _PANEL_HEIGHT * -(-len(panels) // 2) + _LEGEND

    def draw(figure: Any) -> None:
        grid = figure.subplots(-(-len(panels) // 2), 2, squeeze=False)
        for axes, (part, method) in zip(grid.flat, panels, strict=False):
            own = [row for row in gradients if (row["part"], row["method"]) == (part, method)]
            for stage in range(stages):
                points = _mean_curve(own, "batch", f"stage{stage}")
                axes.plot(*points, color=stage_colour(stage), linewidth=1.2, label=f"stage {stage}")
            axes.set_title(f"{part}: {method}", fontsize=11, loc="left")
            axes.set_xlabel("batch")
            axes.set_ylim(bottom=0)
        for axes in list(grid.flat)[len(panels) :]:
            axes.set_visible(False)
        _finish(figure, grid[0][0], stages, height)

    return draw_svg(draw, width, height, "gradients", f"{title}: gradient difference of each stage over training")


def _mean_curve(rows: Iterable[Row], x: str, y: str) -> tuple[list[float], list[float]]:
    """Mean place and mean value over seeds, by epoch or batch."""
    found: dict[int, list[tuple[float, float]]] = {}
    for row in rows:
        if row.get(x) and row.get(y):
            key = int(row["batch"] if "batch" in row else row["epoch"])
            found.setdefault(key, []).append((float(row[x]), float(row[y])))
    places = [sum(place for place, _ in found[key]) / len(found[key]) for key in sorted(found)]
    values = [sum(value for _, value in found[key]) / len(found[key]) for key in sorted(found)]
    return places, values


def _finish(figure: Any, axes: Any, labels: int, height: int) -> None:
    handles, names = axes.get_legend_handles_labels()
    figure.legend(handles, names, loc="upper left", ncols=min(labels, 6), fontsize=9)
    # A second line of the legend, where there are many names.
    used = _LEGEND * (1 if labels <= 6 else 1.6)
    figure.tight_layout(rect=(0, 0, 1, 1 - used / height))


def _unique(values: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(values))


def _colours(methods: Iterable[str]) -> Mapping[str, str]:
    return {method: _COLOURS[place % len(_COLOURS)] for place, method in enumerate(_unique(methods))}
