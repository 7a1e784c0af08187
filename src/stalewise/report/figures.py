"""The figures of a run's report, each as an SVG text for a page (`report.svg`).

Colours are told apart by people with any colour vision: blue for the forward pass (light blue where it is
repeated), orange for the backward pass, and neighbours differ in lightness as well. Waiting is hatched.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stalewise.errors import ConfigError
from stalewise.protocol.actions import Kind
from stalewise.protocol.trace import KIND_CODES
from stalewise.report.run_folder import BatchPoint, EpochPoint, Partition
from stalewise.report.svg import FAINT, HATCH, INK, MUTED, draw_svg
from stalewise.report.timeline import Activity, Timeline, Usage, Window
from stalewise.report.wording import duration, percent

__all__ = [
    "accuracy_curve",
    "followed_batch",
    "is_finite",
    "loss_curve",
    "partition_bar",
    "smoothing",
    "stage_colour",
    "time_shares",
    "timeline_picture",
]

_RAW, _LINE, _SECOND = "#b9cde6", "#2f5d9b", "#d9822b"

COLOURS = {
    Activity.FORWARD: "#3d6fb0",
    Activity.RECOMPUTE: "#a3c6ea",
    Activity.BACKWARD: "#eda549",
    Activity.UPDATE: "#7b4b94",
    Activity.SYNTHESIZE: "#c98fa8",
    Activity.SEND: "#4a9d8e",
    Activity.UNRECORDED: "#ffffff",
}
_WAIT_FACE = "#f4f5f7"
_DARK = (Activity.FORWARD, Activity.UPDATE, Activity.SEND)
"""Activities whose colour needs white text."""

_STAGES = ("#4b5a78", "#a9bccf", "#557a72", "#b9d0bb", "#765a78", "#d0b8cc", "#7b684d", "#dac9a6")
"""Dark and light by turns, so that neighbours differ without any hue; none is the colour of an activity."""
_SHOWN = (
    Activity.FORWARD,
    Activity.RECOMPUTE,
    Activity.BACKWARD,
    Activity.UPDATE,
    Activity.SYNTHESIZE,
    Activity.SEND,
)
_NOT_ALWAYS = {Activity.RECOMPUTE: (Kind.RECOMPUTE,), Activity.SYNTHESIZE: (Kind.SYNTHESIZE, Kind.TRAIN_SYNTHESIZER)}
"""Activities that only some methods have, and their kinds."""

_CURVE_WIDTH, _CURVE_HEIGHT, _WIDE = 520, 300, 1080
_MAX_POINTS = 600


def stage_colour(stage: int) -> str:
    """The colour of a stage in every figure and table; it repeats after eight stages."""
    return _STAGES[stage % len(_STAGES)]


def smoothing(num_batches: int) -> int:
    """Batches that the smooth loss curve averages over: a fiftieth of the run, from 5 to 500."""
    return min(max(num_batches // 50, 5), 500)


def loss_curve(batches: Sequence[BatchPoint], epochs: Sequence[EpochPoint]) -> str:
    """Training loss of every batch, its centred moving mean over `smoothing` batches, test loss by epoch.

    Losses that are not finite are left out. Beyond 600 batches the raw curve becomes the band from the lowest
    to the highest loss of neighbouring batches.
    """
    points = [(point.batch, point.loss) for point in batches if is_finite(point.loss)]
    tests = [
        (point.last_batch, point.test_loss)
        for point in epochs
        if is_finite(point.test_loss) and point.last_batch is not None
    ]

    def draw(figure: Any) -> None:
        axes = _curve_axes(figure, "batch")
        tops, bottom = [0.0], 0.0
        if points:
            x, y = (np.array(column, np.float64) for column in zip(*points, strict=True))
            if len(x) > _MAX_POINTS:
                size = math.ceil(len(x) / (_MAX_POINTS // 2))
                starts = np.arange(0, len(x), size)
                low, high = np.minimum.reduceat(y, starts), np.maximum.reduceat(y, starts)
                axes.fill_between(x[starts], low, high, color=_RAW, linewidth=0, alpha=0.75, label="train, each batch")
            else:
                marker = "o" if len(x) <= 30 else ""
                axes.plot(x, y, color=_RAW, linewidth=1.0, marker=marker, markersize=3, label="train, each batch")
            width = smoothing(len(x))
            smooth = _moving_mean(y, width)
            keep = np.unique(np.linspace(0, len(x) - 1, min(len(x), _MAX_POINTS)).astype(np.int64))
            if len(x) > 1:
                axes.plot(x[keep], smooth[keep], color=_LINE, linewidth=2.0, label=f"train, mean of {width}")
            # One wild batch must not flatten the whole curve.
            tops += [float(smooth.max()), float(np.percentile(y, 99.5))]
            bottom = min(0.0, float(y.min()))
        if tests:
            x, y = (np.array(column, np.float64) for column in zip(*tests, strict=True))
            marker = "o" if len(tests) <= 40 else ""
            axes.plot(x, y, color=_SECOND, linewidth=1.2, marker=marker, markersize=4, label="test")
            tops.append(float(np.percentile(y, 95)))
        axes.set_ylim(bottom * 1.08, max(tops) * 1.08 or 1)
        if len({x for x, _ in (*points, *tests)}) == 1:
            axes.set_xlim((points or tests)[0][0] - 1, (points or tests)[0][0] + 1)
        if points or tests:
            axes.legend(loc="best", handlelength=1.6)

    return draw_svg(draw, _CURVE_WIDTH, _CURVE_HEIGHT, "loss", "Training loss by batch and test loss by epoch")


def accuracy_curve(epochs: Sequence[EpochPoint]) -> str:
    """Test accuracy by epoch, the last value written at its end.

    Raises:
        ConfigError: where no epoch has an accuracy.
    """
    points = [(point.epoch, point.test_accuracy) for point in epochs if is_finite(point.test_accuracy)]
    if not points:
        raise ConfigError(
            f"none of {len(epochs)} epochs has a test accuracy; leave the figure out, or evaluate the model."
        )

    def draw(figure: Any) -> None:
        from matplotlib.ticker import PercentFormatter

        axes = _curve_axes(figure, "epoch")
        x, y = (np.array(column, np.float64) for column in zip(*points, strict=True))
        marker = "o" if len(points) <= 40 else ""
        axes.plot(x, y, color=_LINE, linewidth=2.0, marker=marker, markersize=4.5)
        axes.plot(x[-1:], y[-1:], color=_LINE, marker="o", markersize=7)
        axes.annotate(
            percent(float(y[-1])),
            (x[-1], y[-1]),
            # On the side that the curve does not come from.
            xytext=(0, 9 if len(y) < 2 or y[-1] >= y[-2] else -18),
            textcoords="offset points",
            ha="right" if len(points) > 1 else "center",
            fontsize=12,
            fontweight="bold",
            color=_LINE,
        )
        span = max(float(y.max() - y.min()), 0.02)
        low, high = max(0.0, float(y.min()) - 0.15 * span), float(y.max()) + 0.14 * span
        axes.set_ylim(low, high)
        if len(points) == 1:
            axes.set_xlim(x[0] - 1, x[0] + 1)
        axes.set_yticks([tick for tick in axes.get_yticks() if low <= tick <= min(high, 1.0)])
        axes.yaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=0 if span > 0.1 else 1))

    return draw_svg(draw, _CURVE_WIDTH, _CURVE_HEIGHT, "accuracy", "Test accuracy by epoch")


def followed_batch(timeline: Timeline, window: Window) -> int | None:
    """The batch in the middle of those whose first forward and last backward lie within the window."""
    first = timeline.stages[0]
    inside = first.where((first.start_ns >= window.start_ns) & (first.end_ns <= window.end_ns))
    batches = np.intersect1d(inside.only(Kind.FORWARD).batch, inside.only(Kind.BACKWARD).batch)
    batches = batches[batches >= 0]
    return int(batches[len(batches) // 2]) if len(batches) else None


def timeline_picture(timeline: Timeline, window: Window, *, batch: int | None = None) -> str:
    """A row per stage and a box per record, the batch number inside where it fits.

    Args:
        timeline: the records.
        window: the part of the run that is drawn.
        batch: a batch whose boxes are outlined on every stage, to follow it through the pipeline.
    """
    height = 82 + 56 * timeline.num_stages
    left, right, top, bottom = 62, 10, 34, 44
    pixels_per_ns = (_WIDE - left - right) / max(window.end_ns - window.start_ns, 1)

    def draw(figure: Any) -> None:
        axes = figure.add_axes((left / _WIDE, bottom / height, 1 - (left + right) / _WIDE, 1 - (top + bottom) / height))
        for spans in timeline.stages:
            inside = spans.within(window)
            starts = (np.maximum(inside.start_ns, window.start_ns) - window.start_ns) * 1e-6
            ends = (np.minimum(inside.end_ns, window.end_ns) - window.start_ns) * 1e-6
            activities = [Activity.of(KIND_CODES[int(kind)]) for kind in inside.kind]
            for activity in (Activity.WAIT_ACTIVATION, *_SHOWN):
                mask = np.array(
                    [each is activity or (activity.is_wait and each.is_wait) for each in activities], np.bool_
                )
                mask &= (ends - starts) * 1e6 * pixels_per_ns >= 0.4
                if mask.any():
                    bars = np.stack((starts[mask], (ends - starts)[mask]), axis=1)
                    axes.broken_barh(bars, (spans.stage - 0.36, 0.72), zorder=2, **_face(activity, 0.6))
            for row, activity in enumerate(activities):
                number = int(inside.batch[row])
                if number < 0 or activity not in (Activity.FORWARD, Activity.RECOMPUTE, Activity.BACKWARD):
                    continue
                middle, width = (starts[row] + ends[row]) / 2, (ends[row] - starts[row]) * 1e6 * pixels_per_ns
                if number == batch:
                    axes.broken_barh(
                        [(starts[row], ends[row] - starts[row])],
                        (spans.stage - 0.36, 0.72),
                        facecolor="none",
                        edgecolor=INK,
                        linewidth=2.2,
                        zorder=4,
                    )
                # The smaller size is for the long batch numbers of long runs.
                fitting = [each for each in (9.5, 8.0) if width >= 0.6 * each * len(str(number)) + 2]
                if fitting:
                    axes.text(
                        middle,
                        spans.stage,
                        str(number),
                        ha="center",
                        va="center_baseline",
                        fontsize=fitting[0],
                        fontweight="bold" if number == batch else "normal",
                        color="white" if activity in _DARK else INK,
                        zorder=5,
                    )
        axes.set_xlim(0, (window.end_ns - window.start_ns) * 1e-6)
        axes.set_ylim(timeline.num_stages - 0.46, -0.5)
        axes.set_yticks(range(timeline.num_stages), [f"stage {spans.stage}" for spans in timeline.stages])
        axes.tick_params(axis="y", labelcolor=INK, labelsize=11)
        axes.set_xlabel("ms", loc="right", labelpad=1)
        axes.grid(visible=False, axis="y")
        axes.grid(visible=True, axis="x")
        axes.spines["left"].set_visible(False)
        shown = [
            each
            for each in _SHOWN
            if each not in _NOT_ALWAYS or any(len(spans.only(*_NOT_ALWAYS[each])) for spans in timeline.stages)
        ]
        _legend(figure, [*shown, Activity.WAIT_ACTIVATION], left / _WIDE, 1 - 4 / height)

    title = f"What each stage did in {duration(window.seconds)} in the middle of the run"
    return draw_svg(draw, _WIDE, height, "timeline", title)


def time_shares(usage: Usage) -> str:
    """A stacked bar per stage: the part of the window that each activity took."""
    height = 66 + 40 * len(usage.stages)
    left, right, top, bottom = 62, 16, 32, 30

    def draw(figure: Any) -> None:
        from matplotlib.ticker import PercentFormatter

        axes = figure.add_axes((left / _WIDE, bottom / height, 1 - (left + right) / _WIDE, 1 - (top + bottom) / height))
        present = []
        for activity in (*_SHOWN, Activity.WAIT_ACTIVATION, Activity.UNRECORDED):
            shares = [stage.waiting if activity.is_wait else stage.shares[activity] for stage in usage.stages]
            if max(shares) > 0.002:
                present.append((activity, shares))
        base = np.zeros(len(usage.stages))
        for activity, shares in present:
            places = [stage.stage for stage in usage.stages]
            face = _face(activity, 0.8)
            if activity is Activity.UNRECORDED:
                face |= {"edgecolor": "#c5cad3"}
            axes.barh(places, shares, left=base, height=0.68, zorder=2, **face)
            for place, share, start in zip(places, shares, base, strict=True):
                if share * (_WIDE - left - right) > 34:
                    axes.text(
                        start + share / 2,
                        place,
                        percent(share, 0),
                        ha="center",
                        va="center_baseline",
                        fontsize=10.5,
                        color="white" if activity in _DARK else INK,
                        zorder=3,
                    )
            base += np.array(shares)
        axes.set_xlim(0, 1)
        axes.set_ylim(len(usage.stages) - 0.5, -0.5)
        axes.set_yticks(range(len(usage.stages)), [f"stage {stage.stage}" for stage in usage.stages])
        axes.tick_params(axis="y", labelcolor=INK, labelsize=11)
        axes.xaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=0))
        axes.grid(visible=False, axis="y")
        axes.spines["left"].set_visible(False)
        _legend(figure, [activity for activity, _ in present], left / _WIDE, 1 - 4 / height)

    return draw_svg(draw, _WIDE, height, "shares", "Part of the time that each stage spent on each activity")


def partition_bar(partition: Partition) -> tuple[str, str]:
    """The layers as one bar, coloured by stage.

    Returns:
        The figure, and what the width of a layer stands for: measured time where every layer has one, else
        parameters where every layer has them, else nothing (equal widths).
    """
    layers = partition.layers
    seconds = [layer.seconds for layer in layers]
    weights = [layer.parameters for layer in layers]
    known = [value for value in seconds if value is not None and math.isfinite(value)]
    sizes = [1.0] * len(layers)
    meaning = "equal widths: neither times nor parameters of all layers were recorded"
    if len(known) == len(layers) and sum(known) > 0:
        sizes, meaning = known, "width: measured forward and backward time"
    elif all(weight is not None for weight in weights) and sum(weight or 0 for weight in weights) > 0:
        sizes, meaning = (
            [float(weight or 0) for weight in weights],
            "width: parameters, as no times were measured",
        )
    timed = meaning.startswith("width: measured")
    height, edge = 104, 4

    def draw(figure: Any) -> None:
        axes = figure.add_axes((edge / _WIDE, 0.03, 1 - 2 * edge / _WIDE, 0.94))
        axes.set_axis_off()
        total, start = sum(sizes), 0.0
        spans: dict[int | None, tuple[float, float]] = {}
        for layer, size in zip(layers, sizes, strict=True):
            colour = FAINT if layer.stage is None else stage_colour(layer.stage)
            axes.barh([0], [size], left=start, height=1.0, color=colour, edgecolor="white", linewidth=1.6)
            pixels = size / total * (_WIDE - 2 * edge)
            light = _light(colour)
            for text, offset, faded in ((layer.type, 0.14, False), (layer.name, -0.2, True)):
                if pixels > 5.9 * len(text) + 6:
                    axes.text(
                        start + size / 2,
                        offset,
                        text,
                        ha="center",
                        va="center",
                        fontsize=9 if faded else 10,
                        color=INK if light else "white",
                        alpha=0.8 if faded else 1,
                    )
            first, _ = spans.get(layer.stage, (start, start))
            start += size
            spans[layer.stage] = (first, start)
        for stage, (first, end) in spans.items():
            name = "no stage" if stage is None else f"stage {stage}"
            detail = f"{name} · {duration(end - first)}" if timed else name
            pixels = (end - first) / total * (_WIDE - 2 * edge)
            label = next((text for text in (detail, name, str(stage)) if pixels > 6.6 * len(text)), "")
            inset = 0.0015 * total
            axes.plot([first + inset, end - inset], [0.62, 0.62], color=MUTED, linewidth=1.2, solid_capstyle="butt")
            axes.text((first + end) / 2, 0.72, label, ha="center", va="bottom", fontsize=11.5)
        axes.set_xlim(0, total)
        axes.set_ylim(-0.56, 1.12)

    return draw_svg(draw, _WIDE, height, "partition", "The layers of the network, cut into stages"), meaning


def _curve_axes(figure: Any, x_label: str) -> Any:
    from matplotlib.ticker import MaxNLocator

    axes = figure.add_axes((46 / _CURVE_WIDTH, 42 / _CURVE_HEIGHT, 1 - 58 / _CURVE_WIDTH, 1 - 54 / _CURVE_HEIGHT))
    axes.set_xlabel(x_label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8, steps=[1, 2, 5, 10]))
    axes.margins(x=0.02)
    axes.spines["left"].set_visible(False)
    return axes


def _face(activity: Activity, line: float) -> dict[str, Any]:
    if activity.is_wait:
        return {"facecolor": _WAIT_FACE, "edgecolor": HATCH, "hatch": "////", "linewidth": 0.0}
    return {"facecolor": COLOURS[activity], "edgecolor": "white", "linewidth": line}


def _legend(figure: Any, activities: Sequence[Activity], x: float, y: float) -> None:
    from matplotlib.patches import Patch

    handles = []
    for activity in activities:
        face = _face(activity, 0)
        if activity is Activity.UNRECORDED:
            face |= {"edgecolor": "#9ca3af", "linewidth": 0.8}
        label = "waiting" if activity.is_wait else activity.value
        handles.append(Patch(label=label, **face))
    figure.legend(
        handles=handles,
        loc="upper left",
        bbox_to_anchor=(x, y),
        ncols=len(handles),
        handlelength=1.3,
        handleheight=0.9,
        handletextpad=0.5,
        columnspacing=1.6,
        borderpad=0,
        borderaxespad=0,
    )


def _light(colour: str) -> bool:
    """Whether dark text reads better on it: relative luminance by the sRGB weights."""
    red, green, blue = (int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5))
    luminance: float = 0.2126 * red**2.2 + 0.7152 * green**2.2 + 0.0722 * blue**2.2
    return luminance > 0.3


def _moving_mean(values: NDArray[np.float64], width: int) -> NDArray[np.float64]:
    """The mean of the `width` values around each place, of fewer at the ends."""
    window = np.ones(min(width, len(values)))
    mean: NDArray[np.float64] = np.convolve(values, window, "same")
    return mean / np.convolve(np.ones(len(values)), window, "same")


def is_finite(value: float | None) -> bool:
    """Whether a value is there and can be drawn."""
    return value is not None and math.isfinite(value)
