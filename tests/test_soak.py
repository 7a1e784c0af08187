"""benchmarks/soak.py: its short form, and that its verdict can be both."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
STEADY = {"resident": 300 << 20, "descriptors": 20, "threads": 10, "times": [0.01]}


@pytest.fixture
def soak(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    spec = importlib.util.spec_from_file_location("soak", BENCHMARKS / "soak.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.dist
@pytest.mark.slow
def test_the_short_form(tmp_path: Path) -> None:
    """Interrupted after 40 steps and taken up again, in all 400; whatever the verdict, it is that of the table."""
    command = [sys.executable, str(BENCHMARKS / "soak.py"), "--stages", "2", "--epoch", "40", "--save-every", "20"]
    keep = ["--note-every", "4", "--folder", str(tmp_path / "run"), "--out", str(tmp_path / "result.json")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, "--steps", "40", *keep], env=environment, capture_output=True, timeout=400)
    done = subprocess.run([*command, "--steps", "400", *keep], env=environment, capture_output=True, timeout=400)
    result = json.loads((tmp_path / "result.json").read_text())
    assert done.returncode == (1 if result["failures"] else 0), done.stderr.decode()
    rows = {row[0]: row[1] for row in result["rows"]}
    assert rows["stage 0, start 1"].endswith(".. 400")
    assert {"launcher, start 1", "stage 1, start 1", "stage 0"} <= set(rows)
    assert result["step_ms"]["p99"] >= result["step_ms"]["median"] > 0
    assert [failure for failure in result["failures"] if "start 1:" in failure] == []


@pytest.mark.parametrize(
    ("grown", "told"),
    [
        ({}, None),
        ({"resident": 302 << 20}, None),
        ({"resident": 304 << 20}, "stage 0: resident memory grows by 1.33%"),
        ({"descriptors": 21}, "stage 0: 20 descriptors after warm-up, 21 at the end"),
        ({"threads": 12}, "stage 0: 10 threads after warm-up, 12 at the end"),
    ],
)
def test_the_verdict(grown: dict[str, Any], told: str | None, soak: ModuleType, tmp_path: Path) -> None:
    """Growth within the warm-up does not count, and neither does what is over before the end."""
    notes = [{"step": step, **STEADY} for step in range(100)]
    notes[0] |= {"resident": 100 << 20, "threads": 1}
    notes[50] |= {"resident": 400 << 20, "descriptors": 40}
    for note in notes[90:]:
        note |= grown
    (tmp_path / "held.0.0.jsonl").write_text("".join(json.dumps(note) + "\n" for note in notes))
    rows, failures, times = soak.judge(tmp_path, 0.1)
    assert failures == ([] if told is None else [told])
    assert (rows[0][0], len(times)) == ("stage 0", 90)


def test_too_few_notes(soak: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "held.launcher.0.jsonl").write_text(json.dumps({"step": 1, **STEADY}) + "\n")
    assert soak.judge(tmp_path, 0.1)[1] == ["launcher: 1 notes are too few to judge"]
