"""What a comparison of methods found, as values: made by `experiments.comparison_table`, shown by everything else.

A method is run once per seed. Each of its numbers is a `Spread`: what the runs gave, which mean they have, and how
far they lie apart. None stands for what no run recorded.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Comparison", "Curve", "RunLine", "Spread", "StageMemory", "TableRow"]


@dataclass(frozen=True)
class Spread:
    """A number over seeds.

    Args:
        values: one per run that has it, in the order of the seeds; at least one.
    """

    values: tuple[float, ...]

    @classmethod
    def of(cls, values: Iterable[float | None]) -> Spread | None:
        """The values that are known; None where none is."""
        known = tuple(float(value) for value in values if value is not None)
        return cls(known) if known else None

    @property
    def mean(self) -> float:
        """Of the values."""
        return math.fsum(self.values) / len(self.values) if all(map(math.isfinite, self.values)) else math.nan

    @property
    def low(self) -> float:
        """The smallest value."""
        return min(self.values)

    @property
    def high(self) -> float:
        """The largest value."""
        return max(self.values)

    @property
    def deviation(self) -> float | None:
        """Standard deviation of the sample (n - 1 in the denominator); None for a single value."""
        if len(self.values) < 2 or math.isnan(self.mean):
            return None
        return math.sqrt(math.fsum((value - self.mean) ** 2 for value in self.values) / (len(self.values) - 1))

    def as_dict(self) -> dict[str, Any]:
        """JSON values; what is not finite is null."""
        numbers = {"mean": self.mean, "min": self.low, "max": self.high, "std": self.deviation}
        cleaned: dict[str, Any] = {name: _finite(value) for name, value in numbers.items()}
        return {**cleaned, "values": [_finite(value) for value in self.values]}


@dataclass(frozen=True, kw_only=True)
class StageMemory:
    """Peak memory of one stage in bytes, by category; "total" is the peak of the sum.

    Args:
        measured: while the run trained.
        predicted: from the method's program and the model.
        resident: of the whole process, as the operating system counts it.
    """

    measured: Mapping[str, Spread]
    predicted: Mapping[str, float]
    resident: Spread | None

    def as_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "measured": {name: value.as_dict() for name, value in self.measured.items()},
            "predicted": dict(self.predicted),
            "resident": None if self.resident is None else self.resident.as_dict(),
        }


@dataclass(frozen=True, kw_only=True)
class Curve:
    """A run by epochs; equally long columns, with None where an epoch has no such number.

    Args:
        epoch: counted from 1.
        time_s: since the run began, evaluations included.
        loss: training loss.
        accuracy: on the test set, a fraction.
    """

    epoch: tuple[int, ...] = ()
    time_s: tuple[float | None, ...] = ()
    loss: tuple[float | None, ...] = ()
    accuracy: tuple[float | None, ...] = ()


@dataclass(frozen=True, kw_only=True)
class RunLine:
    """One run of a row.

    Args:
        seed: of the run.
        folder: relative to that of the comparison.
        state: "done", "failed" or "missing" (not run yet).
        error: why it failed.
    """

    seed: int
    folder: str
    state: str
    error: str | None = None


@dataclass(frozen=True, kw_only=True)
class TableRow:
    """A method, or a baseline.

    Args:
        name: unique in the comparison, as the user gave it.
        title: for people, such as "DSP(1,1,0;4,2,0)".
        baseline: whether it stands for what a user would do without a pipeline.
        runs: one per seed.
        note: what to know when its numbers are read.
        staleness: as the method declares it, per stage.
        test_accuracy: after the last epoch, a fraction.
        best_accuracy: the highest of all epochs.
        samples_per_s: while training.
        epoch_s: seconds of training per epoch.
        speed_up: samples/s over the mean of backpropagation's.
        calm_runs: without the slow steps of the comparison; none where it has no slow steps.
        slow_down: how much longer the same samples take with the slow steps, as a share; per seed.
        slow_down_model: the same by the analytic model, for the very same slow steps and the durations of calm ones.
        target_s: seconds until the target accuracy, of the runs that reached it.
        target_reached: how many did.
        memory: per stage.
        memory_total: measured, over all stages.
        memory_predicted: over all stages.
        resident_total: over all processes.
        utilisation: per stage.
        staleness_mean: realised, per stage: batches by which the latest forward is ahead of a backward.
        staleness_max: likewise, the largest.
        gradient_difference: last measured, per stage.
        bytes_per_batch: sent by all stages.
        curves: one per run that is done.
    """

    name: str
    title: str
    baseline: bool
    runs: tuple[RunLine, ...]
    note: str = ""
    staleness: tuple[int, ...] = ()
    test_accuracy: Spread | None = None
    best_accuracy: Spread | None = None
    samples_per_s: Spread | None = None
    epoch_s: Spread | None = None
    speed_up: Spread | None = None
    calm_runs: tuple[RunLine, ...] = ()
    slow_down: Spread | None = None
    slow_down_model: Spread | None = None
    target_s: Spread | None = None
    target_reached: int = 0
    memory: tuple[StageMemory, ...] = ()
    memory_total: Spread | None = None
    memory_predicted: float | None = None
    resident_total: Spread | None = None
    utilisation: tuple[Spread | None, ...] = ()
    staleness_mean: tuple[Spread | None, ...] = ()
    staleness_max: tuple[int | None, ...] = ()
    gradient_difference: tuple[Spread | None, ...] = ()
    bytes_per_batch: Spread | None = None
    curves: tuple[Curve, ...] = ()

    @property
    def done(self) -> int:
        """Number of runs with a result."""
        return sum(run.state == "done" for run in self.runs)

    @property
    def failures(self) -> tuple[RunLine, ...]:
        """The runs that failed."""
        return tuple(run for run in (*self.runs, *self.calm_runs) if run.state == "failed")

    @property
    def realised_mean(self) -> Spread | None:
        """Mean over stages of the mean realised staleness."""
        return _over_stages(self.staleness_mean)

    @property
    def remark(self) -> str:
        """The note, and what went wrong, in a line."""
        parts = [self.note] if self.note else []
        reasons: dict[str, list[int]] = {}
        for run in self.failures:
            reasons.setdefault(run.error or "no reason was given", []).append(run.seed)
        for reason, seeds in reasons.items():
            which = "" if len(self.runs) == 1 else f" with seed {', '.join(map(str, seeds))}"
            parts.append(f"failed{which}: {reason}")
        if missing := sum(run.state == "missing" for run in self.runs):
            parts.append(f"{missing} of {len(self.runs)} runs not done yet")
        return "; ".join(parts)

    def as_dict(self) -> dict[str, Any]:
        """JSON values."""
        spreads = {
            name: getattr(self, name)
            for name in (
                "test_accuracy",
                "best_accuracy",
                "samples_per_s",
                "epoch_s",
                "speed_up",
                "slow_down",
                "slow_down_model",
                "target_s",
                "memory_total",
                "resident_total",
                "bytes_per_batch",
            )
        }
        return {
            "name": self.name,
            "title": self.title,
            "baseline": self.baseline,
            "runs": [vars(run) for run in self.runs],
            "remark": self.remark,
            **{name: _described(value) for name, value in spreads.items()},
            "memory_predicted": self.memory_predicted,
            "target_reached": self.target_reached,
            "staleness": list(self.staleness),
            "staleness_mean_all": _described(self.realised_mean),
            "stages": [
                {
                    "utilisation": _described(_entry(self.utilisation, stage)),
                    "staleness_mean": _described(_entry(self.staleness_mean, stage)),
                    "staleness_max": _entry(self.staleness_max, stage),
                    "gradient_difference": _described(_entry(self.gradient_difference, stage)),
                    "memory": None if stage >= len(self.memory) else self.memory[stage].as_dict(),
                }
                for stage in range(max(map(len, (self.utilisation, self.memory, self.gradient_difference))))
            ],
        }


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """All rows of a comparison, and how they came about.

    Args:
        rows: methods in the order in which they were given, then baselines.
        settings: what all runs share: model, data, stages, epochs, ...
        seeds: runs per row.
        cuts: first layers of stages 1 .. K-1; None where they are not known yet.
        target_accuracy: a fraction; None where no run has a result.
        target_given: whether the user chose it.
        floor: mean slow-down of all steps where there are slow ones, which no method avoids; else None.
        machine: names and values: where the runs took place.
        command: by which the comparison was started.
    """

    rows: tuple[TableRow, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)
    seeds: int = 1
    cuts: tuple[int, ...] | None = None
    target_accuracy: float | None = None
    target_given: bool = False
    floor: float | None = None
    machine: Mapping[str, Any] = field(default_factory=dict)
    command: str = ""

    def as_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "target_accuracy": self.target_accuracy,
            "target_given": self.target_given,
            "floor": self.floor,
            "seeds": self.seeds,
            "cuts": None if self.cuts is None else list(self.cuts),
            "settings": dict(self.settings),
            "machine": dict(self.machine),
            "command": self.command,
            "rows": [row.as_dict() for row in self.rows],
        }


def _over_stages(values: tuple[Spread | None, ...]) -> Spread | None:
    """The mean over stages, run by run; None where a stage lacks one."""
    known = [value.values for value in values if value is not None]
    if not known or len(known) < len(values) or len(set(map(len, known))) > 1:
        return None
    return Spread(tuple(math.fsum(run) / len(run) for run in zip(*known, strict=True)))


def _entry(values: tuple[Any, ...], stage: int) -> Any:
    return values[stage] if stage < len(values) else None


def _described(value: Spread | None) -> dict[str, Any] | None:
    return None if value is None else value.as_dict()


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
