"""What `stalewise simulate` prints."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from stalewise.experiments.simulation import MeasuredRun
from stalewise.methods import Method
from stalewise.timing import Outcome

__all__ = ["simulation_text"]

LISTED_STAGES = 16
"""Of more stages the text gives the range."""


def simulation_text(
    method: Method, outcome: Outcome, *, run: MeasuredRun | None = None, out: Path | None = None
) -> str:
    """The answer in lines.

    Args:
        method: that was timed.
        outcome: of it.
        run: whose costs were used.
        out: where files were written.
    """
    timetable = outcome.timetable
    step_ms = 1e3 * outcome.step_s
    lines = [f"{_named(method)}, {timetable.num_batches} batches"]
    lines.append(f"step time      {_milliseconds(step_ms)}{_interval(outcome)}")
    if step_ms:
        samples = "" if run is None else f", {1e3 * run.batch_size / step_ms:.1f} samples/s"
        lines.append(f"throughput     {1e3 / step_ms:.3f} batches/s{samples}")
    if run is not None and run.step_s:
        measured = 1e3 * run.step_s
        off = f"; simulated: {100 * (step_ms / measured - 1):+.1f}%" if method == run.method else f" with {run.method}"
        lines.append(f"measured       {_milliseconds(measured)}{off}")
    if timetable.rows is not None:
        lines.append(f"slow-down      {100 * outcome.slow_down:.1f}% over steady steps of the mean costs")
    lines.append(
        f"steady step    {_milliseconds(1e-6 * outcome.calm_step_ns)} with constant costs (maximum cycle mean)"
    )
    lines.append(f"bottleneck     {outcome.bottleneck}")
    lines.append(f"whole run      {_milliseconds(1e-6 * float(timetable.total_ns.mean()))} with warm-up and drain")
    lines.append(f"utilisation    {_shares(outcome.utilisation)}")
    if out is not None:
        lines.append(f"written        {out}")
    return "\n".join(lines)


def _named(method: Method) -> str:
    if method.num_stages <= LISTED_STAGES:
        return f"{method}, staleness {method.staleness}"
    depths = list(method.staleness)
    return f"{method.name} over {method.num_stages:,} stages, staleness {depths[0]} .. {depths[-1]}"


def _shares(utilisation: Sequence[float]) -> str:
    if len(utilisation) <= LISTED_STAGES:
        return ", ".join(f"stage {stage} {100 * share:.1f}%" for stage, share in enumerate(utilisation))
    least = min(range(len(utilisation)), key=utilisation.__getitem__)
    mean = sum(utilisation) / len(utilisation)
    return f"mean {100 * mean:.1f}%, least {100 * utilisation[least]:.1f}% (stage {least})"


def _interval(outcome: Outcome) -> str:
    half = outcome.step_interval_s
    if half is None or not half:
        return ""
    return f" +- {1e3 * half:.3f} ms (95% interval over {outcome.timetable.replicas} replicas)"


def _milliseconds(value: float) -> str:
    return f"{value:.3f} ms"
