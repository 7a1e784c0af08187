"""How fast the stages of a run turned out to be."""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from stalewise.errors import ConfigError
from stalewise.experiments.profiling import ModelProfile
from stalewise.plan.depth import Jitter
from stalewise.plan.partition import check_cuts
from stalewise.protocol.actions import COMPUTE, Kind
from stalewise.protocol.trace import KIND_CODES
from stalewise.report import Timeline
from stalewise.report.timeline import StageSpans

MOST_STEPS = 1000
"""Of a run, whose jitter counts."""

__all__ = ["RunSpeeds", "read_run_speeds"]

SAME_SPEED = 0.15
"""Stages whose slow-downs differ by less from the middle one count as equally fast."""


@dataclass(frozen=True, kw_only=True)
class RunSpeeds:
    """Of a run.

    Args:
        cuts: with which it ran.
        slowdowns: of each stage against the profile.
        jitter: of its steps, one after another.
    """

    cuts: tuple[int, ...]
    slowdowns: tuple[float, ...]
    jitter: Jitter


def read_run_speeds(folder: Path, profile: ModelProfile) -> RunSpeeds:
    """From the timeline of a run: how much longer than profiled each stage computed, taking the median step.

    Args:
        folder: of the run.
        profile: of its model and batch size.

    Raises:
        ConfigError: where the folder has no timeline or cuts, or they are of another model.
    """
    try:
        cuts = tuple(json.loads((folder / "partition.json").read_text(encoding="utf-8"))["cuts"])
        timeline = Timeline.load(folder)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{folder} holds no finished run ({error}); give the folder of one that has ended.") from None
    num_stages = len(cuts) + 1
    check_cuts(cuts, len(profile.layers), num_stages)
    bounds = (0, *cuts, len(profile.layers))
    ratios = []
    for stage in range(num_stages):
        layers = profile.layers[bounds[stage] : bounds[stage + 1]]
        forward_s = sum(layer.forward_s or 0.0 for layer in layers)
        backward_s = sum(layer.backward_s or 0.0 for layer in layers)
        took, expected = 0.0, 0.0
        for kind, usual_s in ((Kind.FORWARD, forward_s), (Kind.RECOMPUTE, forward_s), (Kind.BACKWARD, backward_s)):
            spans = timeline.stages[stage].only(kind)
            if len(spans):
                took += float(np.median(spans.end_ns - spans.start_ns)) / 1e9
                expected += usual_s
        ratios.append(took / expected if expected else 1.0)
    usual = statistics.median_low(ratios)
    return RunSpeeds(
        cuts=cuts,
        slowdowns=tuple(usual if abs(ratio / usual - 1) < SAME_SPEED else ratio for ratio in ratios),
        jitter=Jitter.of_times([_step_times(spans) for spans in timeline.stages], in_order=True),
    )


def _step_times(spans: StageSpans) -> list[float]:
    """Nanoseconds that a stage computed between two updates, step by step, from the middle of the run."""
    kinds = np.array([kind in COMPUTE for kind in KIND_CODES])[spans.kind]
    spent = np.cumsum(np.where(kinds, spans.end_ns - spans.start_ns, 0))
    at_updates = spent[spans.kind == KIND_CODES.index(Kind.UPDATE)]
    steps = np.diff(at_updates)
    # The first steps fill the pipeline, the last ones drain it.
    skipped = min(len(steps) // 10, 50)
    steps = steps[skipped : len(steps) - skipped]
    middle = max(len(steps) - MOST_STEPS, 0) // 2
    return [float(step) for step in steps[middle : middle + MOST_STEPS]]
