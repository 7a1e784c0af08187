"""The comparisons of an experiment as lines of its CSV files; numbers have six digits."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from stalewise.experiments.config import TrainConfig
from stalewise.experiments.optimizers import learning_rates
from stalewise.report.comparison_data import Comparison, Spread, TableRow

__all__ = ["curve_rows", "gradient_rows", "result_rows"]


def result_rows(part: str, comparison: Comparison, path: Path) -> Iterator[dict[str, str]]:
    """A line per method of a comparison in `path`: who, and mean and sample deviation of each number over its seeds."""
    timed = _is_timed(comparison)
    one = next((row.samples_per_s for row in comparison.rows if row.name == "one-process"), None)
    for row in comparison.rows:
        numbers = {
            "loss": Spread.of(
                next((loss for loss in reversed(curve.loss) if loss is not None), None) for curve in row.curves
            ),
            "accuracy": row.test_accuracy,
            "best": row.best_accuracy,
            "rate": row.samples_per_s if timed else None,
            "speed_up": row.speed_up if timed else None,
            "speed_up_one": _over(row.samples_per_s, one) if timed else None,
            "slow_down": row.slow_down,
            "floor": None if comparison.floor is None or row.baseline else Spread((comparison.floor,)),
            "memory": row.memory_total,
            "memory_stage": _largest_stage(row),
            **_gradient_differences([_measurements(path / run.folder) for run in row.runs if run.state == "done"]),
        }
        line = {
            "part": part,
            "method": row.name,
            "title": row.title,
            "staleness": " ".join(map(str, row.staleness)),
            "seeds": str(row.done),
            "failed": "; ".join(run.error or "no reason was given" for run in row.failures),
        }
        for name, spread in numbers.items():
            line[f"{name}_mean"] = "" if spread is None else _number(spread.mean)
            line[f"{name}_std"] = "" if spread is None or spread.deviation is None else _number(spread.deviation)
        yield line


def curve_rows(part: str, comparison: Comparison) -> Iterator[dict[str, str]]:
    """A line per epoch of each run."""
    timed = _is_timed(comparison)
    for row in comparison.rows:
        done = [run for run in row.runs if run.state == "done"]
        for run, curve in zip(done, row.curves, strict=True):
            for epoch, time_s, loss, accuracy in zip(
                curve.epoch, curve.time_s, curve.loss, curve.accuracy, strict=True
            ):
                numbers = {"time_s": time_s if timed else None, "loss": loss, "accuracy": accuracy}
                yield {
                    "part": part,
                    "method": row.name,
                    "seed": str(run.seed),
                    "epoch": str(epoch),
                    **{name: "" if value is None else _number(value) for name, value in numbers.items()},
                }


def gradient_rows(part: str, comparison: Comparison, path: Path) -> Iterator[dict[str, str]]:
    """A line per measurement of the gradient difference in each run of a comparison's folder."""
    for row in comparison.rows:
        for run in row.runs:
            if run.state != "done":
                continue
            for found in _measurements(path / run.folder):
                yield {
                    "part": part,
                    "method": row.name,
                    "seed": str(run.seed),
                    "epoch": str(found.epoch),
                    "batch": str(found.batch),
                    "lr": _number(found.lr),
                    **{
                        f"stage{stage}": "" if value is None else _number(value)
                        for stage, value in enumerate(found.stages)
                    },
                }


@dataclass(frozen=True)
class _Measurement:
    """Of the gradient difference of every stage, at the learning rate of its update."""

    epoch: int
    batch: int
    lr: float
    stages: list[float | None]


def _measurements(folder: Path) -> list[_Measurement]:
    """In the order of a run."""
    with (folder / "metrics.jsonl").open(encoding="utf-8") as lines:
        records = [json.loads(line) for line in lines if '"gradient_difference"' in line]
    rates = _rates(folder) if records else []
    return [
        _Measurement(record["epoch"], record["batch"], rates[record["batch"]], record["stages"]) for record in records
    ]


def _gradient_differences(runs: Sequence[Sequence[_Measurement]]) -> dict[str, Spread | None]:
    """Means over a run: of all stages, of each, and of all at the highest and at the lowest learning rate."""

    def mean(stage: int | None = None, extreme: Callable[[Iterable[float]], float] | None = None) -> Spread | None:
        means = []
        for run in runs:
            rate = extreme(found.lr for found in run) if extreme and run else None
            chosen = [found.stages for found in run if rate is None or found.lr == rate]
            values = [
                value
                for stages in chosen
                for value in (stages if stage is None else stages[stage : stage + 1])
                if value is not None
            ]
            means.append(fmean(values) if values else None)
        return Spread.of(means)

    stages = max((len(found.stages) for run in runs for found in run), default=0)
    return {
        "gradient": mean(),
        "gradient_highest": mean(extreme=max),
        "gradient_lowest": mean(extreme=min),
        **{f"gradient_{stage}": mean(stage) for stage in range(stages)},
    }


def _is_timed(comparison: Comparison) -> bool:
    """One process does the stages' work in turn: its times are none of a pipeline, so tables leave them out."""
    return comparison.settings.get("engine") != "sequential"


def _rates(folder: Path) -> list[float]:
    """The learning rate of every update of a run."""
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    return learning_rates(TrainConfig.read(folder / "config.json"), num_updates=summary["batches"])


def _over(rates: Spread | None, one: Spread | None) -> Spread | None:
    if rates is None or one is None or one.mean <= 0:
        return None
    return Spread(tuple(rate / one.mean for rate in rates.values))


def _largest_stage(row: TableRow) -> Spread | None:
    totals = [stage.measured["total"].values for stage in row.memory if "total" in stage.measured]
    return Spread(tuple(map(max, zip(*totals, strict=True)))) if totals else None


def _number(value: float) -> str:
    return f"{value:.6g}"
