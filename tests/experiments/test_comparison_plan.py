"""partition.json of a comparison, as it is and as it may not be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from stalewise.errors import ConfigError
from stalewise.experiments.comparison_plan import ComparisonPlan

GOOD: dict[str, Any] = {
    "method": "profile",
    "cuts": [2, 3],
    "predicted": {"dsp": {"step_s": 0.1, "memory": [{"total": 3}, {"total": 4}]}, "bp": {"step_s": 0.2}},
}


def test_what_all_rows_share(tmp_path: Path) -> None:
    file = tmp_path / "partition.json"
    file.write_text(json.dumps(GOOD))
    plan = ComparisonPlan.read(file)
    assert (plan.method, plan.cuts) == ("profile", (2, 3))
    assert plan.memory == {"dsp": ({"total": 3.0}, {"total": 4.0}), "bp": ()}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe{}",
        b"[]",
        b"null",
        *(
            json.dumps({**GOOD, **damage}).encode()
            for damage in (
                {"cuts": None},
                {"cuts": [True, 3]},
                {"cuts": ["2", 3]},
                {"predicted": []},
                {"predicted": {"dsp": 3}},
                {"predicted": {"dsp": {"memory": 3}}},
                {"predicted": {"dsp": {"memory": [3]}}},
                {"predicted": {"dsp": {"memory": [{"total": "many"}]}}},
            )
        ),
    ],
)
def test_damage_is_one_clear_sentence(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "partition.json"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=r"partition\.json is not what compare wrote there .* give --overwrite"):
        ComparisonPlan.read(file)
