"""From the run folders of a comparison to the rows of its table.

run folder ─► measure ─► RunNumbers ─┐
run folder ─► measure ─► RunNumbers ─┼─► aggregate, per method over seeds ─► TableRow ─► Comparison
failed run ──────────────────────────┘
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from stalewise.errors import ConfigError
from stalewise.experiments.comparison import Entry, PlannedRun, Runner
from stalewise.experiments.comparison_plan import ComparisonPlan
from stalewise.experiments.environment import typed_command
from stalewise.experiments.machine import machine
from stalewise.methods import DSP
from stalewise.protocol.actions import Kind
from stalewise.protocol.stragglers import Stragglers
from stalewise.protocol.trace import KIND_CODES, Span
from stalewise.report import RunFolder
from stalewise.report.comparison_data import Comparison, Curve, RunLine, Spread, StageMemory, TableRow
from stalewise.report.timeline import StageSpans, Timeline
from stalewise.report.wording import method_name
from stalewise.timing.slow_steps import mean_slowing, mean_times, predicted_slow_down

__all__ = ["RunNumbers", "Table", "default_target", "measure", "time_to"]

STEADY_STEPS = 100
"""Steps in steady state over which the utilisation is taken, as in the report of a run."""

TARGET_SHARE = 0.95


@dataclass(frozen=True, kw_only=True)
class RunNumbers:
    """What one run measured; see `TableRow` for the numbers. Per stage: staleness, utilisation, memory, difference.

    Args:
        updates: of each stage.
        step_ns: what a step of each stage takes by kind of action, without waits; see `timing.slow_steps.mean_times`.
    """

    test_accuracy: float | None
    best_accuracy: float | None
    samples_per_s: float | None
    epoch_s: float | None
    bytes_per_batch: float | None
    utilisation: tuple[float, ...]
    staleness: tuple[tuple[float, int] | None, ...]
    memory: tuple[Mapping[str, Any], ...]
    gradient_difference: tuple[float | None, ...]
    curve: Curve
    updates: int
    step_ns: Mapping[Kind, Sequence[int]]


def measure(folder: Path) -> RunNumbers:
    """The numbers of a run that is complete.

    Raises:
        ConfigError: where a file of it is missing or malformed.
    """
    run = RunFolder.read(folder)
    accuracies = [point.test_accuracy for point in run.epochs if point.test_accuracy is not None]
    epochs, training_s = run.summary.number("epochs"), run.summary.number("training_s")
    batches = run.summary.number("batches")
    sent = run.summary.integers("bytes_sent")
    timeline = run.timeline
    usage = timeline.usage(timeline.window(STEADY_STEPS)) if timeline else None
    return RunNumbers(
        test_accuracy=run.total("test_accuracy"),
        best_accuracy=max(accuracies, default=None),
        samples_per_s=run.summary.number("samples_per_s"),
        epoch_s=training_s / epochs if training_s is not None and epochs else None,
        bytes_per_batch=sum(sent) / batches if sent is not None and batches else None,
        utilisation=tuple(stage.utilisation for stage in usage.stages) if usage else (),
        staleness=tuple(map(realised_staleness, timeline.stages)) if timeline else (),
        memory=tuple(_stage_memory(run)),
        gradient_difference=_gradient_difference(folder / "metrics.jsonl"),
        updates=(updates := len(timeline.stages[0].only(Kind.UPDATE)) if timeline else 0),
        step_ns=_step_ns(timeline, updates) if timeline and updates else {},
        curve=Curve(
            epoch=tuple(point.epoch for point in run.epochs),
            time_s=tuple(point.time_s for point in run.epochs),
            loss=tuple(point.train_loss for point in run.epochs),
            accuracy=tuple(point.test_accuracy for point in run.epochs),
        ),
    )


def _step_ns(timeline: Timeline, updates: int) -> dict[Kind, list[int]]:
    """Over the middle of the run, where nothing fills or drains for the first time."""
    spans = [
        [
            Span(own.stage, KIND_CODES[kind], -1, start, end)
            for kind, start, end in zip(own.kind.tolist(), own.start_ns.tolist(), own.end_ns.tolist(), strict=True)
        ]
        for own in timeline.stages
    ]
    return mean_times(spans, [(updates // 4, max(updates // 4 + 1, 3 * updates // 4))])


def _stage_memory(run: RunFolder) -> Iterator[Mapping[str, Any]]:
    shares_a_process = run.config.text("engine") == "sequential" and run.config.text("baseline") != "data-parallel"
    for stage, record in enumerate(run.summary.records("memory")):
        # One process that runs all stages must not count once per stage.
        yield {**record.values, "resident": None} if shares_a_process and stage else record.values


def realised_staleness(spans: StageSpans) -> tuple[float, int] | None:
    """Mean and maximum, over all backwards, of the batches by which the latest forward was ahead.

    The mean is below the declared staleness where a run drains often: in warm-up and drain fewer batches are between.
    """
    forwards, backwards = spans.only(Kind.FORWARD), spans.only(Kind.BACKWARD)
    latest = np.searchsorted(forwards.start_ns, backwards.start_ns, side="right") - 1
    known = latest >= 0
    if not known.any():
        return None
    ahead = forwards.batch[latest[known]] - backwards.batch[known]
    return float(ahead.mean()), int(ahead.max())


def time_to(curve: Curve, target: float) -> float | None:
    """Seconds until the first epoch whose test accuracy is at least `target`; None where none is."""
    for time_s, accuracy in zip(curve.time_s, curve.accuracy, strict=True):
        if accuracy is not None and accuracy >= target:
            return time_s
    return None


def default_target(rows: Sequence[TableRow]) -> float | None:
    """0.95 times the worst final accuracy of all rows (means over seeds), rounded down to whole percent."""
    finals = [row.test_accuracy.mean for row in rows if row.test_accuracy is not None]
    finals = [accuracy for accuracy in finals if math.isfinite(accuracy)]
    # The last digits of a product of floats must not decide about a percent.
    return math.floor(100 * TARGET_SHARE * min(finals) + 1e-9) / 100 if finals else None


class Table:
    """The table of a comparison while it grows; a run is read once.

    Args:
        runner: of the comparison.
        target_accuracy: a fraction, or None for `default_target`.
    """

    def __init__(self, runner: Runner, target_accuracy: float | None = None) -> None:
        self._runner = runner
        self._target = target_accuracy
        self._seen: dict[str, RunNumbers] = {}

    def look(self, planned: PlannedRun) -> tuple[RunLine, RunNumbers | None]:
        """How a run stands, and its numbers where it is done. One whose files are malformed counts as failed."""
        state, error = self._runner.state(planned), self._runner.error(planned)
        if state == "done" and planned.folder not in self._seen:
            try:
                self._seen[planned.folder] = measure(self._runner.path / planned.folder)
            except ConfigError as problem:
                state, error = "failed", str(problem)
        line = RunLine(seed=planned.seed, folder=planned.folder, state=state, error=error)
        return line, self._seen[planned.folder] if state == "done" else None

    def comparison(self) -> Comparison:
        """All rows, from what the folder holds now."""
        config = self._runner.config
        rows = [self._row(entry) for entry in config.entries]
        base = next((row.samples_per_s for row, entry in zip(rows, config.entries, strict=True) if _is_bp(entry)), None)
        target = default_target(rows) if self._target is None else self._target
        plan = self._plan()
        return Comparison(
            rows=tuple(_with_ratios(row, base, target) for row in rows),
            settings=config.settings(),
            seeds=config.seeds,
            cuts=plan.cuts if plan else None,
            target_accuracy=target,
            target_given=self._target is not None,
            floor=self._floor(),
            machine=machine(),
            command=typed_command(),
        )

    def _plan(self) -> ComparisonPlan | None:
        """None while it is not made."""
        file = self._runner.path / "partition.json"
        return ComparisonPlan.read(file) if file.is_file() else None

    def _floor(self) -> float | None:
        """Over the updates of the first run that is done."""
        config = self._runner.config
        stragglers, stages = Stragglers.of(config.shared.stragglers), config.shared.stages
        for planned in config.runs():
            _, numbers = self.look(planned)
            if stragglers and not planned.entry.baseline and numbers is not None and numbers.updates:
                return mean_slowing(stragglers, stages, 0, numbers.updates)
        return None

    def _row(self, entry: Entry) -> TableRow:
        config = self._runner.config
        planned = [PlannedRun(entry=entry, seed=seed) for seed in range(config.seeds)]
        looks = [self.look(each) for each in planned]
        done = [numbers for _, numbers in looks if numbers is not None]
        stragglers = Stragglers() if entry.baseline else Stragglers.of(config.shared.stragglers)
        twins = [self.look(replace(each, calm=True)) for each in planned] if stragglers else []
        pairs = [(slow, calm) for (_, slow), (_, calm) in zip(looks, twins, strict=False) if slow and calm]
        plan = self._plan()
        predicted = plan.memory.get(entry.name, ()) if plan else ()
        memory = tuple(_memory(done, stage, predicted) for stage in range(_longest(run.memory for run in done)))
        method = config.of(planned[0], ()).build_method()
        return TableRow(
            name=entry.name,
            title=_title(entry, method),
            baseline=entry.baseline,
            runs=tuple(line for line, _ in looks),
            note=_note(entry, config.shared.stages),
            staleness=() if entry.baseline else tuple(method.staleness),
            test_accuracy=Spread.of(run.test_accuracy for run in done),
            best_accuracy=Spread.of(run.best_accuracy for run in done),
            samples_per_s=Spread.of(run.samples_per_s for run in done),
            calm_runs=tuple(line for line, _ in twins),
            slow_down=Spread.of(
                calm.samples_per_s / slow.samples_per_s - 1
                for slow, calm in pairs
                if slow.samples_per_s and calm.samples_per_s
            ),
            slow_down_model=Spread.of(
                predicted_slow_down(method.program(), calm.step_ns, stragglers, calm.updates)
                for _, calm in pairs
                if calm.updates
            ),
            epoch_s=Spread.of(run.epoch_s for run in done),
            memory=memory,
            memory_total=Spread.of(
                _total(run, lambda stage: (stage.get("measured") or {}).get("total")) for run in done
            ),
            memory_predicted=_sum([stage.predicted.get("total") for stage in memory]),
            resident_total=Spread.of(_resident(run) for run in done),
            utilisation=_per_stage([run.utilisation for run in done]),
            staleness_mean=_per_stage([[part and part[0] for part in run.staleness] for run in done]),
            staleness_max=tuple(
                None if most is None else int(most.high)
                for most in _per_stage([[part and part[1] for part in run.staleness] for run in done])
            ),
            gradient_difference=_per_stage([run.gradient_difference for run in done]),
            bytes_per_batch=Spread.of(run.bytes_per_batch for run in done),
            curves=tuple(run.curve for run in done),
        )


def _with_ratios(row: TableRow, base: Spread | None, target: float | None) -> TableRow:
    """The row with what depends on other rows."""
    speed_up = None
    if row.samples_per_s is not None and base is not None and base.mean > 0:
        speed_up = Spread(tuple(rate / base.mean for rate in row.samples_per_s.values))
    reached = (
        [] if target is None else [seconds for curve in row.curves if (seconds := time_to(curve, target)) is not None]
    )
    return replace(row, speed_up=speed_up, target_s=Spread.of(reached), target_reached=len(reached))


def _title(entry: Entry, method: Any) -> str:
    """The method as people write it, with the options that were given."""
    if entry.baseline:
        return method_name(entry.method)
    options = dict(entry.options)
    if isinstance(method, DSP):
        for known in ("staleness", "queue"):
            options.pop(known, None)
        title = f"DSP({','.join(map(str, method.queue))};{','.join(map(str, method.staleness))})"
        if "stored" in entry.method:
            title += " stored"
    else:
        title = method_name(entry.method)
    return ", ".join([title, *(f"{name.replace('_', ' ')} {value}" for name, value in options.items())])


def _note(entry: Entry, stages: int) -> str:
    if entry.method == "one-process":
        return "the unsplit model in one process that has the threads of all stages"
    if entry.method == "data-parallel":
        return (
            f"the unsplit model on {stages} processes, each with its part of every batch; BatchNorm uses the "
            "statistics of the part"
        )
    return ""


def _is_bp(entry: Entry) -> bool:
    return entry.method == "bp" and not entry.baseline


def _memory(done: Sequence[RunNumbers], stage: int, predicted: Sequence[Mapping[str, float]]) -> StageMemory:
    """One stage over the runs; a prediction of the run itself comes before that of the comparison's profile."""
    parts = [run.memory[stage] for run in done if stage < len(run.memory)]
    measured = [part.get("measured") or {} for part in parts]
    names = dict.fromkeys(name for part in measured for name in part)
    spreads = {name: Spread.of(part.get(name) for part in measured) for name in names}
    own = next((part["predicted"] for part in parts if part.get("predicted")), None)
    fallback = predicted[stage] if stage < len(predicted) else {}
    return StageMemory(
        measured={name: spread for name, spread in spreads.items() if spread is not None},
        predicted={name: value for name, value in (own or fallback).items() if value is not None},
        resident=Spread.of(part.get("resident") for part in parts),
    )


def _total(run: RunNumbers, of_stage: Callable[[Mapping[str, Any]], float | None]) -> float | None:
    """The sum over stages; None where a stage lacks the number."""
    return _sum([of_stage(stage) for stage in run.memory])


def _resident(run: RunNumbers) -> float | None:
    known = [stage["resident"] for stage in run.memory if stage.get("resident") is not None]
    return math.fsum(known) if known else None


def _sum(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return math.fsum(known) if known and len(known) == len(values) else None


def _per_stage(runs: Sequence[Sequence[float | None]]) -> tuple[Spread | None, ...]:
    return tuple(Spread.of(run[stage] for run in runs if stage < len(run)) for stage in range(_longest(runs)))


def _longest(sequences: Any) -> int:
    return max(map(len, sequences), default=0)


def _gradient_difference(metrics: Path) -> tuple[float | None, ...]:
    """Of each stage, as measured last."""
    last: list[float | None] = []
    with metrics.open(encoding="utf-8") as lines:
        for line in lines:
            # A long run has many lines, and few of them are measurements.
            if '"gradient_difference"' not in line:
                continue
            record = json.loads(line)
            if record.get("event") == "gradient_difference":
                stages = record.get("stages") or []
                last += [None] * (len(stages) - len(last))
                last = [old if new is None else float(new) for old, new in zip(last, stages, strict=False)]
    return tuple(last)
