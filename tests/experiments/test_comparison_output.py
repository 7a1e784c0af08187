"""The terminal, Markdown, CSV and JSON show the same numbers."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest
from comparison_folders import config, no_training
from rich.console import Console

from stalewise.experiments.compare import compare
from stalewise.experiments.comparison_display import JsonLines, TextLines
from stalewise.experiments.comparison_output import as_csv, as_json, as_markdown, terminal_table
from stalewise.report.comparison_data import Comparison

__all__ = ["no_training"]


@pytest.fixture
def compared(no_training: list[str], tmp_path: Path) -> Comparison:
    return compare(config(("bp", "dni", "dsp"), baselines=("one-process",)), tmp_path / "out")


def printed(comparison: Comparison, width: int) -> list[str]:
    console = Console(file=io.StringIO(), width=width)
    console.print(terminal_table(comparison, width))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


def markdown_rows(comparison: Comparison) -> dict[str, dict[str, str]]:
    lines = [line for line in as_markdown(comparison).splitlines() if line.startswith("|")]
    head, _, *rows = ([cell.strip() for cell in line.strip("|").split(" | ")] for line in lines)
    return {row[0]: dict(zip(head, row, strict=True)) for row in rows}


def test_csv_and_json_hold_the_same_numbers(compared: Comparison) -> None:
    rows = {row["name"]: row for row in json.loads(as_json(compared))["rows"]}
    lines = {line["name"]: line for line in csv.DictReader(io.StringIO(as_csv(compared)))}
    assert lines.keys() == rows.keys()

    def check(values: dict[str, Any], line: dict[str, str], prefix: str) -> int:
        count = 0
        for name, value in values.items():
            if isinstance(value, dict):
                count += check(value, line, f"{prefix}{name}_")
            elif isinstance(value, int | float) and not isinstance(value, bool):
                assert float(line[f"{prefix}{name}"]) == value
                count += 1
        return count

    for name, row in rows.items():
        numbers = check(row, lines[name], "")
        for index, stage in enumerate(row["stages"]):
            numbers += check(stage, lines[name], f"stage{index}_")
        assert numbers > (100 if name in ("bp", "dsp") else 0)
    assert lines["dsp"]["stage0_memory_measured_weights_mean"] == "3000.0"
    assert lines["dni"]["test_accuracy_mean"] == ""
    assert lines["dni"]["remark"].startswith("failed with seed 0, 1: ValueError: <no> batch | left")


def test_markdown_shows_them_rounded(compared: Comparison) -> None:
    rows = {row["name"]: row for row in json.loads(as_json(compared))["rows"]}
    shown = markdown_rows(compared)
    assert shown["dsp"]["Test accuracy"] == "70.50% (70.00–71.00%)"
    assert shown["dsp"]["Samples/s"] == "205 (200–210)"
    assert shown["dsp"]["Speed-up over bp"] == f"{rows['dsp']['speed_up']['mean']:.2f}× (1.90–2.00×)"
    assert shown["dsp"]["Peak memory"] == "164 KiB"
    assert shown["dsp"]["per stage"] == "82 / 54.7 / 27.3 KiB"
    assert shown["dsp"]["predicted"] == "58.6 / 39.1 / 19.5 KiB"
    assert shown["dsp"]["Staleness of stage 0"] == "3 (at most 4)"
    assert shown["dsp"]["of all stages"] == "1.57 (at most 4)"
    assert shown["dsp"]["Gradient difference"] == "0.38 / 0.12 / 0"
    assert shown["dsp"]["Sent per batch"] == "2.93 KiB"
    assert shown["dni"]["Test accuracy"] == "–"
    assert "- **dni**: failed with seed 0, 1: ValueError: &lt;no> batch \\| left" in as_markdown(compared)


def test_a_wide_terminal_shows_all_columns_and_a_narrow_one_the_most_important(compared: Comparison) -> None:
    narrow, wide = printed(compared, 80), printed(compared, 400)
    assert narrow[0].split("  ")[0] == "Method"
    for head in ("Test accuracy", "Samples/s", "Speed-up over bp", "Peak memory"):
        assert head in narrow[0]
    assert "Utilisation" not in narrow[0]
    assert max(map(len, narrow)) <= 80
    heads = list(markdown_rows(compared)["bp"])
    assert all(head in wide[0] for head in heads)
    assert "205 (200–210)" in wide[3]
    assert "205" in narrow[3]


def test_json_lines_are_for_programs(
    no_training: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    compare(config(("bp", "dni"), seeds=1), tmp_path / "out", display=JsonLines())
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [record["event"] for record in records] == ["begin", "cuts", "run", "run", "results"]
    assert records[2]["test_accuracy"] == 0.8
    assert records[3]["error"] == "ValueError: <no> batch | left"
    assert records[4]["rows"][0]["test_accuracy"]["mean"] == 0.8


def test_runs_beside_each_other_are_counted(capsys: pytest.CaptureFixture[str]) -> None:
    for display in (JsonLines(), TextLines()):
        display.progress(1, 2)
    as_json, text = capsys.readouterr().out.splitlines()
    assert json.loads(as_json) == {"event": "progress", "done": 1, "total": 2}
    assert text == "1 of 2 runs ended, several at a time"


def test_text_is_a_line_per_run(no_training: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    display = TextLines()
    compare(config(("bp", "dni"), seeds=1), tmp_path / "out", display=display)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("resnet8 on digits, 3 stages, 2 epochs: 2 rows with 1 seed each, 2 runs")
    assert lines[1] == "cuts 2, 3, chosen from one profile for all methods"
    assert lines[2].split()[:5] == ["1/2", "bp", "80.00%", "100", "samples/s"]
    assert lines[3].split() == ["2/2", "dni", "failed", "ValueError:", "<no>", "batch", "|", "left"]
    compare(config(("bp", "dni"), seeds=1), tmp_path / "out", display=display)
    again = capsys.readouterr().out.splitlines()
    assert again[2].split()[:2] == ["1/2", "bp"]
    assert "found complete" in again[2]
