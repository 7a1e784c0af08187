"""Simulated runs: from numbers or from a run's folder, to the files that a run leaves.

simulation.json    what was asked, and the answer
timeline/          every action of every stage (.npz), as in a run's folder
trace.json         the same for Perfetto
timeline.svg       a few steps, drawn as in a run's report
beside.html        with a run given: its picture and the simulated one, on one scale
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from stalewise.errors import ConfigError
from stalewise.experiments.config import TrainConfig
from stalewise.experiments.run_method import run_method
from stalewise.experiments.run_writer import write_json, write_timeline
from stalewise.methods import Method
from stalewise.protocol.actions import Kind
from stalewise.protocol.numbers import check_real
from stalewise.report import Timeline, Window, write_chrome_trace
from stalewise.report.atomic import atomic_text
from stalewise.report.figures import followed_batch, timeline_picture
from stalewise.report.page import element, figure, page
from stalewise.report.wording import duration
from stalewise.timing import LinkCost, Outcome, StepCosts
from stalewise.timing.measured import Measured, by_kind, measure

__all__ = ["MeasuredRun", "costs_of", "link_cost", "read_run", "write_simulation"]

MAX_RECORDS = 500_000
"""Actions in `trace.json`; of a longer run it holds so many from the middle."""
DRAWN_STEPS = 10


@dataclass(frozen=True, kw_only=True)
class MeasuredRun:
    """What a run's folder says of time.

    Args:
        method: that it used.
        measured: costs and links.
        timeline: all of its records.
        batch_size: samples per batch.
    """

    method: Method
    measured: Measured
    timeline: Timeline
    batch_size: int

    @property
    def step_s(self) -> float | None:
        """Median step time of its steady state."""
        return self.timeline.usage(self.timeline.window(100)).step_s

    def costs_for(self, method: Method, *, resample: bool) -> StepCosts:
        """What a step of a method would cost with the work of this run's stages.

        Args:
            method: the run's, or another one over as many stages, whose actions take the mean time of their kind.
            resample: keep a row per measured step; only for the run's own method.

        Raises:
            ConfigError: where the number of stages differs, or another method's steps are to be resampled.
        """
        if method.num_stages != self.method.num_stages:
            raise ConfigError(
                f"the run has {self.method.num_stages} stages and the method {method.num_stages}; costs are known for "
                "the run's stages alone. Give as many, or times with --forward-ms instead of --from."
            )
        program = self.method.program()
        if method.program().stages == program.stages:
            return self.measured.costs if resample else self.measured.costs.mean()
        if resample:
            raise ConfigError(
                f"the run used {self.method}; its steps cannot be resampled for {method}. Leave out --resample."
            )
        return StepCosts.of_kinds(method.program(), by_kind(program, self.measured.costs))


def read_run(path: Path) -> MeasuredRun:
    """Read a folder that `stalewise train` left.

    Raises:
        ConfigError: where it has no configuration or timeline, or shows no complete step.
    """
    config = TrainConfig.read(path / "config.json")
    timeline = Timeline.load(path)
    method = run_method(path, config)
    return MeasuredRun(
        method=method,
        measured=measure(method.program(), timeline.stages),
        timeline=timeline,
        batch_size=config.batch_size,
    )


def costs_of(method: Method, milliseconds: Mapping[Kind, Sequence[float]]) -> StepCosts:
    """Costs from times in milliseconds, one for all stages or one per stage.

    Raises:
        ConfigError: where the number of times fits neither.
    """
    times: dict[Kind, int | Sequence[int]] = {}
    for kind, values in milliseconds.items():
        for value in values:
            check_real(f"the time of a {kind.name.lower()} in ms", value)
        whole = [round(value * 1e6) for value in values]
        times[kind] = whole[0] if len(whole) == 1 else whole
    return StepCosts.of_kinds(method.program(), times)


def link_cost(*, latency_ms: float, gbit_per_s: float | None, message_mib: float) -> LinkCost:
    """What a message costs.

    Raises:
        ConfigError: where a size is given without a bandwidth, or a value is negative.
    """
    if min(latency_ms, message_mib) < 0:
        raise ConfigError(f"latency {latency_ms} ms and message {message_mib} MiB must not be negative.")
    if message_mib and gbit_per_s is None:
        raise ConfigError("--message-mib needs --gbit-per-s: how long a message takes is its size over the bandwidth.")
    bytes_per_s = float("inf") if gbit_per_s is None else gbit_per_s * 1e9 / 8
    return LinkCost.of_bytes(message_mib * 2**20, latency_s=latency_ms * 1e-3, bytes_per_s=bytes_per_s)


def write_simulation(
    path: Path, outcome: Outcome, settings: Mapping[str, Any], *, run: MeasuredRun | None = None
) -> None:
    """Write the files of a simulated run into an empty folder.

    Args:
        path: the folder.
        outcome: with its actions recorded.
        settings: what was asked, as JSON values.
        run: to show it beside.
    """
    traces = outcome.traces()
    timeline = Timeline.from_traces(traces)
    write_json(path / "simulation.json", {"settings": dict(settings), "result": outcome.as_dict()})
    write_timeline(path, traces)
    records = sum(map(len, traces))
    steps = sum(span.kind is Kind.UPDATE for span in traces[0])
    window = timeline.window(max(steps * MAX_RECORDS // records, 1)) if records > MAX_RECORDS else None
    write_chrome_trace(timeline, path / "trace.json", window=window)
    drawn = timeline.window(DRAWN_STEPS)
    picture = timeline_picture(timeline, drawn, batch=followed_batch(timeline, drawn))
    with atomic_text(path / "timeline.svg") as file:
        file.write(picture.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1))
    if run is not None:
        with atomic_text(path / "beside.html") as file:
            file.write(_beside(timeline, outcome, run))


def _beside(timeline: Timeline, outcome: Outcome, run: MeasuredRun) -> str:
    """Both pictures over windows of one length, so that steps can be compared by eye."""
    theirs, ours = run.timeline.window(DRAWN_STEPS), timeline.window(DRAWN_STEPS)
    length = max(theirs.end_ns - theirs.start_ns, ours.end_ns - ours.start_ns)
    pictures = []
    for title, each, window in (("Measured", run.timeline, theirs), ("Simulated", timeline, ours)):
        whole: Window = replace(window, end_ns=window.start_ns + length)
        svg = timeline_picture(each, whole, batch=followed_batch(each, window))
        pictures.append(figure(svg, f"{duration(whole.seconds)} in the middle of the run", wide=True, title=title))
    step = run.step_s
    found = f"Simulated step: {duration(outcome.step_s)}"
    if step:
        found += f"; measured: {duration(step)}; the simulation is off by {100 * (outcome.step_s / step - 1):+.1f}%"
    lead = element("p", f"{found}. The pace is set by {outcome.bottleneck}.", class_="lead")
    return page("Measured and simulated · stalewise", element("h1", "Measured and simulated"), lead, *pictures)
