"""A run folder as training would leave it, from the rules of DSP and a small event recurrence.

Each stage executes the actions of its `StageProgram`, one after another. An action takes its duration; a
receive ends when the message is there; a send's message is there after the link's delay. Nothing else decides
the times.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from stalewise.protocol.actions import Action, Kind
from stalewise.protocol.program import Slot, StageProgram
from stalewise.protocol.trace import Trace

MILLISECOND = 1_000_000
LINK_NS = 300_000

DURATIONS_MS: dict[Kind, float] = {
    Kind.LOAD: 0.4,
    Kind.FORWARD: 9.0,
    Kind.RECOMPUTE: 9.0,
    Kind.BACKWARD: 18.0,
    Kind.UPDATE: 1.5,
    Kind.SEND_ACTIVATION: 0.5,
    Kind.SEND_GRADIENT: 0.5,
    Kind.RECEIVE_ACTIVATION: 0.1,
    Kind.RECEIVE_GRADIENT: 0.1,
}


def dsp_stage(stage: int, staleness: Sequence[int]) -> StageProgram:
    """The local step of a DSP stage."""
    lag, last = staleness[stage], len(staleness) - 1
    slots = [Slot(Kind.LOAD if stage == 0 else Kind.RECEIVE_ACTIVATION), Slot(Kind.FORWARD)]
    if stage < last:
        slots.append(Slot(Kind.SEND_ACTIVATION))
        if lag:
            slots.append(Slot(Kind.RECOMPUTE, lag))
        slots.append(Slot(Kind.RECEIVE_GRADIENT, lag))
    slots.append(Slot(Kind.BACKWARD, lag))
    if stage > 0:
        slots.append(Slot(Kind.SEND_GRADIENT, lag))
    slots.append(Slot(Kind.UPDATE, lag))
    return StageProgram(tuple(slots))


def simulate(
    *,
    staleness: Sequence[int] = (4, 2, 0),
    epochs: int = 10,
    batches: int = 23,
    scale: Sequence[float] = (0.75, 1.0, 0.9),
    jitter: float = 0.04,
    pause_ms: float = 400.0,
    duration_ms: Callable[[int, Action], float] | None = None,
    seed: int = 0,
) -> list[Trace]:
    """The traces of a run that drains after each epoch and then evaluates, which no record shows."""
    stages = len(staleness)
    noise = np.random.default_rng(seed)
    traces = [Trace(stage) for stage in range(stages)]
    clock = [7_000 * MILLISECOND] * stages
    batch = -1
    programs = [dsp_stage(stage, staleness) for stage in range(stages)]

    def length(stage: int, action: Action) -> int:
        if duration_ms is not None:
            return round(duration_ms(stage, action) * MILLISECOND)
        spread = math.exp(noise.normal(0.0, jitter)) if jitter else 1.0
        return round(DURATIONS_MS[action.kind] * scale[stage] * spread * MILLISECOND)

    for epoch in range(epochs):
        arrived: dict[tuple[int, Action], int] = {}
        streams = [program.actions(batches) for program in programs]
        waiting: list[Action | None] = [next(stream, None) for stream in streams]
        while any(waiting):
            progress = False
            for stage in range(stages):
                while (action := waiting[stage]) is not None:
                    start = clock[stage]
                    end = start + length(stage, action)
                    if action.kind in (Kind.RECEIVE_ACTIVATION, Kind.RECEIVE_GRADIENT):
                        if (stage, action) not in arrived:
                            break
                        end = max(end, arrived[stage, action])
                    if action.kind is Kind.SEND_ACTIVATION:
                        arrived[stage + 1, Action(Kind.RECEIVE_ACTIVATION, action.batch)] = end + LINK_NS
                    if action.kind is Kind.SEND_GRADIENT:
                        arrived[stage - 1, Action(Kind.RECEIVE_GRADIENT, action.batch)] = end + LINK_NS
                    if action.batch is not None:
                        batch = epoch * batches + action.batch
                    traces[stage].add(action, batch, start, end)
                    clock[stage] = end + (0 if duration_ms else 60_000)
                    waiting[stage] = next(streams[stage], None)
                    progress = True
            assert progress, "the program deadlocks"
        clock = [max(clock) + round(pause_ms * MILLISECOND)] * stages
    return traces


def save_timeline(run_dir: Path, traces: Sequence[Trace]) -> None:
    """Write `timeline/stage{k}.npz`."""
    folder = run_dir / "timeline"
    folder.mkdir(parents=True, exist_ok=True)
    for trace in traces:
        columns = {name: np.array(column, np.int64) for name, column in trace.columns().items()}
        np.savez(folder / f"stage{trace.stage}.npz", allow_pickle=False, **columns)


LAYERS = (
    ("Stem", 464, 3.1),
    ("BasicBlock", 4_672, 6.4),
    ("BasicBlock", 4_672, 6.3),
    ("BasicBlock", 4_672, 6.5),
    ("BasicBlock", 13_952, 7.9),
    ("BasicBlock", 18_560, 7.1),
    ("BasicBlock", 18_560, 7.0),
    ("BasicBlock", 55_552, 9.8),
    ("BasicBlock", 73_984, 9.5),
    ("BasicBlock", 73_984, 9.4),
    ("Head", 650, 0.6),
)
CUTS = (4, 7)


def partition() -> dict[str, Any]:
    """partition.json of a ResNet-20 in three stages."""
    bounds = (0, *CUTS, len(LAYERS))
    owner = [sum(index >= cut for cut in CUTS) for index in range(len(LAYERS))]
    return {
        "cuts": list(CUTS),
        "method": "profile",
        "layers": [
            {
                "index": index,
                "name": str(index),
                "type": kind,
                "parameters": parameters,
                "stage": owner[index],
                "forward_s": cost / 3000,
                "backward_s": cost / 1500,
                "output_bytes": 262_144 >> owner[index],
            }
            for index, (kind, parameters, cost) in enumerate(LAYERS)
        ],
        "stages": [
            {
                "stage": stage,
                "layers": [bounds[stage], bounds[stage + 1]],
                "parameters": sum(layer[1] for layer in LAYERS[bounds[stage] : bounds[stage + 1]]),
                "predicted_s": sum(layer[2] for layer in LAYERS[bounds[stage] : bounds[stage + 1]]) / 750,
            }
            for stage in range(len(CUTS) + 1)
        ],
    }


def metrics(epochs: int, batches: int, *, seconds_per_epoch: float = 1.1) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl of a run that learns."""
    noise = np.random.default_rng(1)
    lines: list[dict[str, Any]] = []
    for epoch in range(1, epochs + 1):
        losses = []
        for index in range(batches):
            batch = (epoch - 1) * batches + index
            part = batch / (epochs * batches)
            loss = 0.05 + 2.25 * math.exp(-6 * part) * float(np.exp(noise.normal(0, 0.14)))
            losses.append(loss)
            lines.append(
                {
                    "event": "batch",
                    "epoch": epoch,
                    "batch": batch,
                    "loss": round(loss, 4),
                    "lr": 0.1,
                    "time_s": round(batch * seconds_per_epoch / batches, 3),
                }
            )
        lines.append(
            {
                "event": "epoch",
                "epoch": epoch,
                "train_loss": round(sum(losses) / len(losses), 4),
                "test_loss": round(losses[-1] * 1.1 + 0.03, 4),
                "test_accuracy": round(0.982 - 0.6 * math.exp(-0.55 * epoch), 4),
                "lr": 0.1,
                "samples_per_s": 1331.0 - 2 * epoch,
                "time_s": round(epoch * seconds_per_epoch, 2),
            }
        )
    return lines


def write_run(run_dir: Path, *, epochs: int = 10, batches: int = 23, **simulation: Any) -> Path:
    """Write a whole run folder and return it."""
    run_dir.mkdir(parents=True, exist_ok=True)
    lines = metrics(epochs, batches)
    last = lines[-1]
    staleness = list(simulation.get("staleness", (4, 2, 0)))
    documents: dict[str, dict[str, Any]] = {
        "config.json": {
            "model": "resnet20",
            "data": "digits",
            "method": "dsp",
            "stages": len(staleness),
            "queue": [1] * (len(staleness) - 1) + [0],
            "staleness": staleness,
            "gradient_queue": [0] + [max(a - b - 1, 0) for a, b in itertools.pairwise(staleness)],
            "epochs": epochs,
            "batch_size": 64,
            "lr": 0.1,
            "momentum": 0.9,
            "weight_decay": 0.0005,
            "schedule": "one-cycle",
            "seed": 0,
            "engine": "distributed",
        },
        "environment.json": {
            "stalewise": "0.1.0",
            "python": "3.11.9",
            "torch": "2.13.0+cpu",
            "platform": "Linux-6.1-x86_64",
            "host": "bench-1",
            "processor": "x86_64, 2.4 GHz",
            "cores": 4,
            "threads_per_stage": 1,
            "devices": ["cpu"] * len(staleness),
            "command": "stalewise train --model resnet20 --data digits --stages 3 --epochs 10 --seed 0",
            "started": "2025-03-02T10:15:00+00:00",
            "commit": "3f2a9c1d7be04a55",
        },
        "partition.json": partition(),
        "summary.json": {
            "test_accuracy": last["test_accuracy"],
            "train_loss": last["train_loss"],
            "wall_time_s": last["time_s"],
            "samples_per_s": 1320.4,
            "batches": epochs * batches,
            "epochs": epochs,
        },
    }
    for name, document in documents.items():
        (run_dir / name).write_text(json.dumps(document, indent=2), encoding="utf-8")
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    save_timeline(run_dir, simulate(epochs=epochs, batches=batches, **simulation))
    return run_dir
