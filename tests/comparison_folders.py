"""Comparisons whose runs are made up: every number is known, and nothing is trained."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from report.synthetic import save_timeline, simulate

from stalewise.errors import WorkerError
from stalewise.experiments import comparison, comparison_output
from stalewise.experiments.comparison import ComparisonConfig
from stalewise.experiments.config import TrainConfig

STAGES, EPOCHS, BATCHES, SAMPLES = 3, 2, 10, 160
CUTS = [2, 3]

MEMORY = ("weights", "stashed", "optimizer", "gradients", "inputs", "graphs", "queues")


def config(methods: Sequence[str] = ("bp", "dsp"), *, seeds: int = 2, **more: Any) -> ComparisonConfig:
    """A small comparison; `more` is of the configuration or of what runs share."""
    own = {name: more.pop(name) for name in ("options", "baselines") if name in more}
    shared = TrainConfig(**{"method": "bp", "model": "resnet8", "epochs": EPOCHS, "stages": STAGES, **more})
    return ComparisonConfig(methods=methods, seeds=seeds, shared=shared, **{"options": {}, "baselines": (), **own})


def write_run(
    folder: Path,
    *,
    accuracy: Sequence[float],
    samples_per_s: float,
    config: Mapping[str, Any],
    memory: bool = True,
    staleness: Sequence[int] | None = (0, 0, 0),
    differences: Sequence[Sequence[float | None]] = (),
) -> None:
    """A run folder: an epoch takes SAMPLES / samples_per_s seconds, and its evaluation half a second."""
    folder.mkdir(parents=True, exist_ok=True)
    epoch_s = SAMPLES / samples_per_s
    lines: list[dict[str, Any]] = []
    for epoch, reached in enumerate(accuracy, start=1):
        lines.append(
            {
                "event": "epoch",
                "epoch": epoch,
                "train_loss": 2.0 / epoch,
                "test_accuracy": reached,
                "samples_per_s": samples_per_s,
                "time_s": epoch * (epoch_s + 0.5),
            }
        )
    for index, stages in enumerate(differences):
        lines.append({"event": "gradient_difference", "batch": index, "epoch": 1, "stages": list(stages), "time_s": 0})
    summary: dict[str, Any] = {
        "test_accuracy": accuracy[-1],
        "train_loss": 2.0 / len(accuracy),
        "wall_time_s": len(accuracy) * (epoch_s + 0.5),
        "training_s": len(accuracy) * epoch_s,
        "samples_per_s": samples_per_s,
        "batches": len(accuracy) * BATCHES,
        "epochs": len(accuracy),
        "bytes_sent": [20_000, 30_000, 10_000],
    }
    if memory:
        parts = {name: 1000 * (index + 1) for index, name in enumerate(MEMORY)}
        summary["memory"] = [
            {
                "stage": stage,
                "measured": {
                    **{name: value * (3 - stage) for name, value in parts.items()},
                    "total": 28_000 * (3 - stage),
                },
                "resident": 2**28,
            }
            for stage in range(STAGES)
        ]
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")
    (folder / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    if staleness is not None:
        save_timeline(folder, simulate(staleness=staleness, epochs=1, batches=BATCHES))


Train = Callable[[TrainConfig, Path], None]


@pytest.fixture
def no_training(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Runs are written at once instead of trained; the names of their folders, in order.

    Method "dni" fails. With the seed k a method reaches 0.8 + k / 100, a stale one a tenth less. Slow steps halve the
    speed of all.
    """
    made: list[str] = []

    def train(config: TrainConfig, path: Path) -> None:
        made.append(path.name.removesuffix(".running"))
        if config.method == "dni":
            (path / "config.json").write_text("{}", encoding="utf-8")
            (path / "summary.json").write_text("{}", encoding="utf-8")
            raise WorkerError("a traceback\nof many lines", cause_type="ValueError", cause="<no> batch | left")
        stale = max(config.build_method().staleness) > 0
        final = round((0.7 if stale else 0.8) + config.seed / 100, 2)
        write_run(
            path,
            accuracy=[final / 2, final],
            samples_per_s=((200.0 if stale else 100.0) + 10 * config.seed) / (2 if config.stragglers else 1),
            config=config.as_dict(),
            staleness=config.build_method().staleness if config.stages == STAGES else None,
            memory=config.stages == STAGES,
            differences=[[0.5, None, 0.0], [0.25 + config.seed / 4, 0.125, 0.0]] if stale else [],
        )

    def launch(main: Callable[..., None], *, num_workers: int, args: Sequence[Any]) -> None:
        folder = Path(args[0])
        if main.__name__ == "_plan_worker":
            predicted = {"memory": [{"graphs": 1, "total": 20_000 * (3 - stage)} for stage in range(STAGES)]}
            plan = {"method": "profile", "cuts": CUTS, "predicted": dict.fromkeys(args[1], predicted)}
            (folder / "partition.json").write_text(json.dumps(plan), encoding="utf-8")
        else:
            train(TrainConfig.read(folder / "config.json"), folder)

    # Figures take a second, and the report has tests of its own.
    monkeypatch.setattr(comparison_output, "write_comparison_report", lambda found, path: path.write_text("report"))
    monkeypatch.setattr(comparison, "run", train)
    monkeypatch.setattr(comparison, "launch", launch)
    monkeypatch.setattr(comparison, "run_data_parallel", lambda config, path, *, ranks: train(config, path))
    return made
