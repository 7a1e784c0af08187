"""What a run folder says of slow stages."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from stalewise.errors import ConfigError
from stalewise.protocol.bottleneck import Bottleneck
from stalewise.report import RunFolder
from stalewise.report.findings import findings
from stalewise.report.stragglers import longest_spell


def bottleneck(stage: int, factor: float, **other: Any) -> dict[str, Any]:
    told = Bottleneck(
        kind=other.pop("kind", "compute"),
        stage=stage,
        factor=factor,
        step_s=0.1,
        since_update=3,
        since_ns=7,
        update=20,
        waits=(0.5, 0.0, 0.25),
    )
    return {"event": "bottleneck", **told.as_dict(), **other}


def write(folder: Path, events: dict[int, dict[str, Any]], *, batches: int = 100) -> RunFolder:
    """A run of so many batches, with bottlenecks told at some."""
    lines = []
    for batch in range(batches):
        lines.append({"event": "batch", "epoch": 1, "batch": batch, "loss": 1.0, "lr": 0.1, "time_s": 0.1 * batch})
        if batch in events:
            lines.append({"batch": batch, **events[batch]})
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")
    return RunFolder.read(folder)


def titles(run: RunFolder) -> list[str]:
    assert run.timeline is not None
    return [found.title for found in findings(run, run.timeline.usage(run.timeline.window()))]


def test_the_longest_spell_is_told_with_its_worst_moment(run_dir: Path) -> None:
    run = write(
        run_dir,
        {
            10: bottleneck(0, 1.6),
            20: bottleneck(1, 1.5),
            40: bottleneck(1, 2.1),
            70: {"event": "bottleneck", "kind": None},
            80: bottleneck(2, 3.0),
        },
    )
    spell = longest_spell(run, factor=1.25)
    assert spell is not None
    assert (spell.worst.stage, spell.worst.factor, spell.first_batch, spell.end_batch) == (1, 2.1, 20, 70)
    assert run.timeline is not None
    (found,) = [
        found
        for found in findings(run, run.timeline.usage(run.timeline.window()))
        if found.title == "stage 1 held the others up"
    ]
    assert found.detail == (
        "from batch 20 to 70 it computed 2.1 times as long as the next slowest stage; meanwhile stage 0 waited 50% and "
        "stage 2 waited 25%"
    )
    assert "stalewise plan --from" in found.advice


def test_short_or_mild_ones_are_no_finding(run_dir: Path) -> None:
    run = write(run_dir, {10: bottleneck(0, 1.2), 60: bottleneck(1, 3.0), 65: {"event": "bottleneck", "kind": None}})
    assert not [title for title in titles(run) if "held the others up" in title]
    assert "link 0 -> 1 held the others up" in titles(write(run_dir, {10: bottleneck(0, 2, kind="link")}))


def test_a_malformed_event_is_told(run_dir: Path) -> None:
    with pytest.raises(ConfigError, match="line 6"):
        write(run_dir, {4: {"event": "bottleneck", "kind": "compute", "stage": 1}})
