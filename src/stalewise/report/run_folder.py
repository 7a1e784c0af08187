"""What a training run left in its folder, read with care.

    config.json        required   what was asked for
    metrics.jsonl      required   a line per batch and per epoch
    environment.json   optional   where it ran
    partition.json     optional   which layers each stage held
    timeline/*.npz     optional   who did what when (`report.timeline`)
    summary.json       optional   written last, so it is missing where a run did not end

Fields may be missing or null: they read as None. What is there must have the right type, or a `ConfigError`
names the file, the line and the repair.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from stalewise.errors import ConfigError
from stalewise.protocol.bottleneck import Bottleneck
from stalewise.protocol.staleness import Staleness
from stalewise.report.record import Record, read_json, read_text
from stalewise.report.timeline import Timeline

__all__ = ["BatchPoint", "EpochPoint", "LayerPart", "Partition", "RunFolder", "StagePart"]


@dataclass(frozen=True, kw_only=True)
class BatchPoint:
    """A `batch` line of metrics.jsonl; `batch` counts over the whole run."""

    batch: int
    epoch: int | None
    loss: float | None
    lr: float | None
    time_s: float | None


@dataclass(frozen=True, kw_only=True)
class EpochPoint:
    """An `epoch` line of metrics.jsonl; `test_accuracy` is a fraction."""

    epoch: int
    train_loss: float | None
    test_loss: float | None
    test_accuracy: float | None
    samples_per_s: float | None
    time_s: float | None
    last_batch: int | None
    """Index of the last batch line before it."""


@dataclass(frozen=True, kw_only=True)
class LayerPart:
    """A layer in partition.json."""

    index: int
    name: str
    type: str
    stage: int | None
    parameters: int | None
    forward_s: float | None
    backward_s: float | None
    output_bytes: int | None

    @property
    def seconds(self) -> float | None:
        """Measured forward and backward together; None unless both are known."""
        if self.forward_s is None or self.backward_s is None:
            return None
        return self.forward_s + self.backward_s


@dataclass(frozen=True, kw_only=True)
class StagePart:
    """A stage in partition.json; `layers` is half open."""

    stage: int
    layers: tuple[int, int] | None
    parameters: int | None
    predicted_s: float | None


@dataclass(frozen=True, kw_only=True)
class Partition:
    """The content of partition.json; `why` says why the plan chose this staleness."""

    method: str | None
    why: str | None
    layers: tuple[LayerPart, ...]
    stages: tuple[StagePart, ...]


@dataclass(frozen=True, kw_only=True)
class RunFolder:
    """A run folder in memory; what is missing is empty or None, and `notes` says so in sentences."""

    path: Path
    config: Record
    environment: Record
    summary: Record
    batches: tuple[BatchPoint, ...]
    epochs: tuple[EpochPoint, ...]
    partition: Partition | None
    timeline: Timeline | None
    staleness: Staleness | None
    notes: tuple[str, ...]
    bottlenecks: tuple[tuple[int, Bottleneck | None], ...] = ()
    """What set the pace from which batch on; None: nothing alone."""

    @classmethod
    def read(cls, path: Path) -> RunFolder:
        """Read a run folder.

        Raises:
            ConfigError: where a required file is missing, or a file is malformed.
        """
        path = Path(path)
        if not path.is_dir():
            raise ConfigError(f"{path} is not a folder; give the folder that a training run wrote.")
        notes: list[str] = []
        config = read_json(path / "config.json", required=True)
        batches, epochs, bottlenecks = _read_metrics(path / "metrics.jsonl", notes)
        optional = {}
        for name, meaning in (
            ("summary.json", "the run did not end, and totals come from the last epoch"),
            ("environment.json", "where the run took place is not known"),
            ("partition.json", "which layers each stage held is not known"),
        ):
            optional[name] = read_json(path / name, required=False)
            if not optional[name]:
                notes.append(f"{name} is missing or empty: {meaning}.")
        staleness = _staleness(config)
        stages = _check_stages(config, staleness)
        return cls(
            path=path,
            config=config,
            environment=optional["environment.json"],
            summary=optional["summary.json"],
            batches=batches,
            epochs=epochs,
            partition=_partition(optional["partition.json"]),
            timeline=_timeline(path, stages, notes),
            staleness=staleness,
            notes=tuple(notes),
            bottlenecks=bottlenecks,
        )

    @property
    def num_stages(self) -> int | None:
        """K, from the first of configuration, staleness, timeline and partition that says it."""
        if (stages := self.config.integer("stages")) is not None:
            return stages
        if self.staleness is not None:
            return len(self.staleness)
        if self.timeline is not None:
            return self.timeline.num_stages
        return len(self.partition.stages) or None if self.partition else None

    def total(self, name: str) -> float | None:
        """A number of summary.json; without it the last epoch's number of that name."""
        if (value := self.summary.number(name)) is not None:
            return value
        if name == "batches":
            return float(self.batches[-1].batch + 1) if self.batches else None
        if not self.epochs:
            return None
        last = self.epochs[-1]
        fallback = {
            "test_accuracy": last.test_accuracy,
            "train_loss": last.train_loss,
            "wall_time_s": last.time_s,
            "samples_per_s": last.samples_per_s,
            "epochs": float(last.epoch),
        }
        return fallback[name]


Bottlenecks = tuple[tuple[int, Bottleneck | None], ...]


def _read_metrics(path: Path, notes: list[str]) -> tuple[tuple[BatchPoint, ...], tuple[EpochPoint, ...], Bottlenecks]:
    text = read_text(path)
    batches: list[BatchPoint] = []
    epochs: list[EpochPoint] = []
    bottlenecks: list[tuple[int, Bottleneck | None]] = []
    lines = text.split("\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines):
                # Only a line without its end can be half written: the run was stopped while it wrote.
                notes.append(f"The last line of {path.name}, line {number}, is cut off and left out.")
                continue
            raise ConfigError(
                f"{path}, line {number}: not JSON ({error.msg}). Delete the line; the report does without it."
            ) from error
        if not isinstance(values, dict):
            raise ConfigError(f"{path}, line {number}: {line[:40]!r} is not an object; delete the line.")
        record = Record(values, path, line=number)
        event = record.text("event")
        if event == "batch":
            batches.append(
                BatchPoint(
                    batch=_required(record, "batch"),
                    epoch=record.integer("epoch"),
                    loss=record.number("loss"),
                    lr=record.number("lr"),
                    time_s=record.number("time_s"),
                )
            )
        elif event == "epoch":
            epochs.append(
                EpochPoint(
                    epoch=_required(record, "epoch"),
                    train_loss=record.number("train_loss"),
                    test_loss=record.number("test_loss"),
                    test_accuracy=record.number("test_accuracy"),
                    samples_per_s=record.number("samples_per_s"),
                    time_s=record.number("time_s"),
                    last_batch=batches[-1].batch if batches else None,
                )
            )
        elif event == "bottleneck":
            bottlenecks.append((_required(record, "batch"), _bottleneck(record)))
    if not batches and not epochs:
        notes.append(f"{path.name} holds no batch and no epoch: the run ended before its first batch.")
    return tuple(batches), tuple(epochs), tuple(bottlenecks)


def _bottleneck(record: Record) -> Bottleneck | None:
    try:
        return Bottleneck.from_record(record.values)
    except (KeyError, TypeError) as error:
        raise record.error("kind", f"that of a bottleneck with all its fields (here {error} is amiss)") from error


def _required(record: Record, name: str) -> int:
    value = record.integer(name)
    if value is None:
        raise record.error(name, "a whole number >= 0: it says where the line belongs")
    return value


def _staleness(config: Record) -> Staleness | None:
    values = config.integers("staleness")
    if values is None:
        return None
    try:
        return Staleness(values)
    except ConfigError as error:
        raise config.error("staleness", f"a valid staleness ({error})") from error


def _check_stages(config: Record, staleness: Staleness | None) -> int | None:
    """The number of stages in config.json, with which its other fields agree."""
    stages = config.integer("stages")
    if stages == 0:
        raise config.error("stages", "at least 1")
    if stages is None and staleness is not None:
        stages = len(staleness)
    for name in ("staleness", "queue", "gradient_queue"):
        values = config.integers(name)
        if stages is not None and values is not None and len(values) != stages:
            raise config.error(name, f"one number for each of the {stages} stages")
    return stages


def _timeline(path: Path, stages: int | None, notes: list[str]) -> Timeline | None:
    """The timeline, where every stage has left its file: stages on other hosts may have left theirs there."""
    found = {file.name for file in (path / "timeline").glob("stage*.npz")}
    wanted = {f"stage{index}.npz" for index in range(len(found) if stages is None else stages)}
    if not found:
        notes.append("The timeline is missing: how the stages spent their time is not known.")
    elif found != wanted:
        notes.append(
            f"The timeline is incomplete: it has {', '.join(sorted(found))} and the run has {len(wanted)} stages. "
            "Copy the files of all stages into the folder timeline, and write the report again."
        )
    else:
        return Timeline.load(path)
    return None


def _partition(record: Record) -> Partition | None:
    if not record:
        return None
    stages = []
    for place, stage in enumerate(record.records("stages")):
        layers = stage.integers("layers")
        if layers is not None and (len(layers) != 2 or layers[0] > layers[1]):
            raise stage.error("layers", "the half-open range [first, end]")
        number = stage.integer("stage")
        stages.append(
            StagePart(
                stage=place if number is None else number,
                layers=None if layers is None else (layers[0], layers[1]),
                parameters=stage.integer("parameters"),
                predicted_s=stage.number("predicted_s"),
            )
        )
    parts = []
    for place, layer in enumerate(record.records("layers")):
        number = layer.integer("index")
        index = place if number is None else number
        owner = layer.integer("stage")
        if owner is None:
            owner = next(
                (part.stage for part in stages if part.layers and part.layers[0] <= index < part.layers[1]),
                None,
            )
        parts.append(
            LayerPart(
                index=index,
                name=layer.text("name") or str(index),
                type=layer.text("type") or "layer",
                stage=owner,
                parameters=layer.integer("parameters"),
                forward_s=layer.number("forward_s"),
                backward_s=layer.number("backward_s"),
                output_bytes=layer.integer("output_bytes"),
            )
        )
    return Partition(method=record.text("method"), why=record.text("why"), layers=tuple(parts), stages=tuple(stages))
