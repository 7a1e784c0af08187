"""How stale each stage's backwards really were: how often which staleness, and over the run."""

from __future__ import annotations

from typing import Any

import numpy as np

from stalewise.protocol.actions import Kind
from stalewise.report.figures import stage_colour
from stalewise.report.page import Markup, element, figure, section
from stalewise.report.run_folder import RunFolder
from stalewise.report.svg import MUTED, draw_svg
from stalewise.report.timeline import IntArray, StageSpans, Timeline

__all__ = ["elastic_section", "realised_depths", "staleness_figure"]

_POINTS = 200
"""Points of a line over the run; each is the mean of a part of it."""


def elastic_section(run: RunFolder) -> list[Markup]:
    """What staleness came to, where the declared one is a bound; nothing elsewhere."""
    options = run.config.values.get("options")
    if run.timeline is None or not (isinstance(options, dict) and options.get("elastic")):
        return []
    words = (
        "Staleness is a bound here: a stage backwards a batch as soon as it can, and runs ahead only while something "
        "is slow. The order in which each stage worked is in the folder order; stalewise train --replay repeats it."
    )
    shown = figure(staleness_figure(run.timeline), "Realised staleness of all backwards.", wide=True)
    return [section("Elastic staleness", element("p", words), shown)]


def realised_depths(spans: StageSpans) -> tuple[IntArray, IntArray]:
    """Of each backward the batch, and by how many batches the latest forward was ahead of it."""
    forwards, backwards = spans.only(Kind.FORWARD), spans.only(Kind.BACKWARD)
    latest = np.searchsorted(forwards.start_ns, backwards.start_ns, side="right") - 1
    known = latest >= 0
    batches = backwards.batch[known]
    return batches, forwards.batch[latest[known]] - batches


def staleness_figure(timeline: Timeline) -> str:
    """A histogram and a curve per stage, as SVG; the last stage, which is never stale, is left out."""
    stages = timeline.stages[:-1]
    found = [realised_depths(spans) for spans in stages]
    most = max((int(depths.max()) for _, depths in found if len(depths)), default=0)

    def draw(canvas: Any) -> None:
        left, right = canvas.subplots(1, 2, width_ratios=[1, 2])
        width = 0.8 / max(len(stages), 1)
        for place, (spans, (batches, depths)) in enumerate(zip(stages, found, strict=True)):
            if not len(depths):
                continue
            colour, name = stage_colour(spans.stage), f"stage {spans.stage}, mean {depths.mean():.2f}"
            shares = np.bincount(depths, minlength=most + 1) / len(depths)
            left.bar(np.arange(most + 1) + (place - (len(stages) - 1) / 2) * width, 100 * shares, width, color=colour)
            parts = np.array_split(np.arange(len(depths)), min(_POINTS, len(depths)))
            means = [float(depths[part].mean()) for part in parts]
            right.plot([int(batches[part[0]]) for part in parts], means, color=colour, linewidth=1.4, label=name)
        left.set_xlabel("staleness, batches", color=MUTED)
        left.set_ylabel("backwards, %", color=MUTED)
        right.set_xlabel("batch", color=MUTED)
        right.set_ylim(bottom=0)
        right.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=max(len(stages), 1), borderaxespad=0)
        canvas.tight_layout()

    return draw_svg(draw, 960, 280, "staleness", "Realised staleness of each stage: how often, and over the run")
