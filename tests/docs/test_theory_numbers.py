"""Every row of the table in docs/theory.md is a row of the file that its command wrote; the words fit the numbers."""

from __future__ import annotations

import csv
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_exponents_are_those_of_the_file() -> None:
    text = (ROOT / "docs" / "theory.md").read_text(encoding="utf-8")
    rows, slow = (_rows(name) for name in ("theory-rates.csv", "theory-rates-momentum-0.9.csv"))
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    printed = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert printed == rows + slow
    for values in (dict(zip(slow[0], row, strict=True)) for row in slow[1:]):
        reached = float(values["low"]) <= float(values["predicted"])
        assert reached
    for values in (dict(zip(rows[0], row, strict=True)) for row in rows[1:]):
        high, predicted = float(values["high"]), float(values["predicted"])
        if values["step sizes"] == "diminishing":
            assert high < predicted
        else:
            assert float(values["noiseless"]) <= 0.2
            assert float(values["low"]) <= predicted


def _rows(name: str) -> list[list[str]]:
    with (ROOT / "experiments" / "results" / name).open(encoding="utf-8") as file:
        return list(csv.reader(file))
