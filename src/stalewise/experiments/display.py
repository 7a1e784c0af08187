"""What a person or a program sees of a run while it goes on."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from stalewise.experiments.config import TrainConfig
from stalewise.plan.depth import Depth
from stalewise.plan.partition import Partition
from stalewise.protocol.bottleneck import Bottleneck

__all__ = ["Display", "JsonDisplay", "LiveDisplay", "PlainDisplay", "make_display"]

REFRESH_S = 0.25


def make_display(kind: str, folder: Path) -> Display:
    """The display of that kind ("auto", "live", "plain", "json", "quiet"); auto is live on a terminal."""
    if kind == "auto":
        kind = "live" if sys.stdout.isatty() else "plain"
    return {"live": LiveDisplay, "plain": PlainDisplay, "json": JsonDisplay, "quiet": Display}[kind](folder)


class Display:
    """Shows nothing; the others show more.

    Args:
        folder: of the run.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __enter__(self) -> Display:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def begin(self, config: TrainConfig, num_batches: int, num_samples: int) -> None:
        """The run begins; an epoch has so many batches and samples."""

    def partition(self, partition: Partition, depth: Depth | None = None) -> None:
        """The cuts are known, and the staleness where the plan chose it."""

    def show(self, record: dict[str, Any], statuses: Sequence[dict[str, Any]]) -> None:
        """A record of `metrics.jsonl`, and how each stage is doing."""

    def end(self, summary: dict[str, Any]) -> None:
        """The training is over."""

    def finished(self, path: Path, summary: dict[str, Any]) -> None:
        """The run folder is complete; the summary now holds the times of steps."""


class JsonDisplay(Display):
    """A JSON object a line on the standard output, for programs."""

    def begin(self, config: TrainConfig, num_batches: int, num_samples: int) -> None:
        self._print({"event": "begin", "config": config.as_dict(), "batches_per_epoch": num_batches})

    def partition(self, partition: Partition, depth: Depth | None = None) -> None:
        chosen = {} if depth is None else {"staleness": depth.as_dict()}
        self._print({"event": "partition", **partition.as_dict(), **chosen})

    def show(self, record: dict[str, Any], statuses: Sequence[dict[str, Any]]) -> None:
        if record["event"] == "epoch":
            stages = [{name: value for name, value in status.items() if name != "steps"} for status in statuses]
            record = {**record, "stages": stages}
        self._print(record)

    def end(self, summary: dict[str, Any]) -> None:
        self._print({"event": "end", **summary})

    def finished(self, path: Path, summary: dict[str, Any]) -> None:
        steps = {name: summary.get(name) for name in ("predicted_step_s", "measured_step_s")}
        self._print({"event": "finished", "folder": str(path), **steps})

    def _print(self, record: dict[str, Any]) -> None:
        print(json.dumps(record), flush=True)


class PlainDisplay(Display):
    """A line per epoch, for logs."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._console = Console(highlight=False, soft_wrap=True)
        self._epochs = 0
        self._rates = StageRates()

    def begin(self, config: TrainConfig, num_batches: int, num_samples: int) -> None:
        self._epochs = config.epochs
        self._console.print(describe(config, num_batches, num_samples))

    def partition(self, partition: Partition, depth: Depth | None = None) -> None:
        self._console.print(partition.table())
        if depth is not None:
            self._console.print(depth.why())

    def show(self, record: dict[str, Any], statuses: Sequence[dict[str, Any]]) -> None:
        if record["event"] == "epoch":
            busy = ", ".join(f"{100 * rate.utilisation:.0f}%" for rate in self._rates.update(statuses))
            self._console.print(epoch_line(record, self._epochs) + (f"  busy {busy}" if busy else ""))
        elif record["event"] == "bottleneck":
            self._console.print(bottleneck_line(record))

    def end(self, summary: dict[str, Any]) -> None:
        self._console.print(summary_line(summary))

    def finished(self, path: Path, summary: dict[str, Any]) -> None:
        predicted, measured = summary.get("predicted_step_s"), summary.get("measured_step_s")
        if predicted and measured:
            self._console.print(
                f"step: {1e3 * measured:.1f} ms measured, {1e3 * predicted:.1f} ms predicted "
                f"({predicted / measured - 1:+.0%})"
            )
        self._console.print(f"report: {path / 'report.html'}")


class LiveDisplay(PlainDisplay):
    """A progress bar and a table of the stages that stay in place, with a line per epoch above."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._progress = Progress(
            TextColumn("epoch {task.fields[epoch]}/{task.fields[epochs]}"),
            BarColumn(bar_width=None),
            TextColumn("batch {task.completed}/{task.total}"),
            TextColumn("loss {task.fields[loss]}"),
            TextColumn("lr {task.fields[lr]}"),
            TextColumn("{task.fields[speed]} samples/s"),
            TimeRemainingColumn(),
            console=self._console,
            expand=True,
        )
        self._task: TaskID | None = None
        self._batch_size = 0
        self._table = stage_table([])
        self._bottleneck = ""
        self._shown = 0.0
        self._speed_from: tuple[float, int] | None = None
        self._live = Live(console=self._console, auto_refresh=False, transient=True)

    def __enter__(self) -> LiveDisplay:
        self._live.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.__exit__(kind, error, trace)

    def begin(self, config: TrainConfig, num_batches: int, num_samples: int) -> None:
        super().begin(config, num_batches, num_samples)
        self._batch_size = config.batch_size
        self._task = self._progress.add_task(
            "train",
            total=config.epochs * num_batches,
            epoch=1,
            epochs=config.epochs,
            loss="-",
            lr="-",
            speed="-",
        )
        self._refresh()

    def show(self, record: dict[str, Any], statuses: Sequence[dict[str, Any]]) -> None:
        if record["event"] == "epoch":
            self._console.print(epoch_line(record, self._epochs))
            self._speed_from = None
            return
        if record["event"] == "bottleneck":
            self._bottleneck = bottleneck_line(record)
        if record["event"] != "batch":
            return
        now = time.perf_counter()
        if now - self._shown < REFRESH_S or self._task is None:
            return
        done = record["batch"] + 1
        speed = "-"
        if self._speed_from is not None:
            then, before = self._speed_from
            speed = f"{(done - before) * self._batch_size / (now - then):.0f}"
        else:
            self._speed_from = (now, done)
        lr = record["lr"]
        self._progress.update(
            self._task,
            completed=done,
            epoch=record["epoch"],
            loss=f"{record['loss']:.3f}",
            lr="-" if lr is None else f"{lr:.4f}",
            speed=speed,
        )
        self._table = stage_table(self._rates.update(statuses))
        self._refresh()

    def _refresh(self) -> None:
        lines = [self._bottleneck] if self._bottleneck else []
        shown: RenderableType = Group(self._table, *lines, self._progress)
        self._live.update(shown, refresh=True)
        self._shown = time.perf_counter()


class StageRate:
    """What a stage did between two statuses."""

    def __init__(self, status: dict[str, Any], before: dict[str, Any] | None) -> None:
        before = before or {"time_ns": status["time_ns"], "busy_ns": 0, "wait_ns": 0}
        elapsed = max(status["time_ns"] - before["time_ns"], 1)
        self.stage: int = status["stage"]
        self.batch: int = status["batch"]
        self.updates: int = status["updates"]
        self.utilisation = min((status["busy_ns"] - before["busy_ns"]) / elapsed, 1.0)
        self.waiting = min((status["wait_ns"] - before["wait_ns"]) / elapsed, 1.0)
        self.activations_waiting: int | None = status.get("activations_waiting")
        self.gradients_waiting: int | None = status.get("gradients_waiting")
        self.staleness = _mean_depth(status.get("staleness_counts"), before.get("staleness_counts"))


def _mean_depth(counts: Sequence[int] | None, before: Sequence[int] | None) -> float | None:
    """Mean realised staleness of the backwards between two counts; None where it is fixed, or none took place."""
    if counts is None:
        return None
    new = [count - (before[depth] if before else 0) for depth, count in enumerate(counts)]
    return sum(depth * count for depth, count in enumerate(new)) / sum(new) if sum(new) else None


class StageRates:
    """Rates over the last interval; a status that did not change keeps its rate."""

    def __init__(self) -> None:
        self._last: dict[int, dict[str, Any]] = {}
        self._rates: dict[int, StageRate] = {}

    def update(self, statuses: Sequence[dict[str, Any]]) -> list[StageRate]:
        """The rate of each stage, in order."""
        for status in statuses:
            stage = status["stage"]
            last = self._last.get(stage)
            if last is None or status["time_ns"] > last["time_ns"]:
                if last is not None:
                    self._rates[stage] = StageRate(status, last)
                self._last[stage] = status
        return [self._rates[stage] for stage in sorted(self._rates)]


def stage_table(rates: Sequence[StageRate]) -> Table:
    """The stages as a table."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("stage")
    names = ["batch", "busy", "waiting", "activations queued", "gradients queued"]
    elastic = any(rate.staleness is not None for rate in rates)
    for name in (*names, "staleness") if elastic else names:
        table.add_column(name, justify="right")
    for rate in rates:
        table.add_row(
            str(rate.stage),
            str(rate.batch),
            f"{100 * rate.utilisation:.0f}%",
            f"{100 * rate.waiting:.0f}%",
            "-" if rate.activations_waiting is None else str(rate.activations_waiting),
            "-" if rate.gradients_waiting is None else str(rate.gradients_waiting),
            *(["-" if rate.staleness is None else f"{rate.staleness:.1f}"] if elastic else []),
        )
    return table


def describe(config: TrainConfig, num_batches: int, num_samples: int) -> str:
    """The run in a sentence."""
    method = config.build_method()
    stale = method.staleness if method.knows_staleness else "as the plan chooses"
    return (
        f"{config.model} on {config.data} ({num_samples} samples, {num_batches} batches of {config.batch_size} "
        f"an epoch), {config.method} with staleness {stale} on {config.stages} stages, {config.engine}"
    )


def epoch_line(record: dict[str, Any], epochs: int) -> str:
    """An epoch in a line."""
    loss, accuracy = record["train_loss"], record["test_accuracy"]
    parts = [f"epoch {record['epoch']:>{len(str(epochs))}}/{epochs}"]
    parts.append("loss -" if loss is None else f"loss {loss:.4f}")
    if accuracy is not None:
        parts.append(f"test accuracy {100 * accuracy:.2f}%")
    parts.append(f"{record['samples_per_s']:.0f} samples/s")
    parts.append(f"{record['time_s']:.1f} s")
    return "  ".join(parts)


def bottleneck_line(record: dict[str, Any]) -> str:
    """What sets the pace from now on, in a line."""
    found = Bottleneck.from_record(record)
    return "no stage limits the pace alone" if found is None else found.sentence()


def summary_line(summary: dict[str, Any]) -> str:
    """The result in a line."""
    epochs = "1 epoch" if summary["epochs"] == 1 else f"{summary['epochs']} epochs"
    return (
        f"test accuracy {100 * summary['test_accuracy']:.2f}% after {epochs}, "
        f"{summary['wall_time_s']:.1f} s in all, {summary['samples_per_s']:.0f} samples/s while training"
    )
