"""Realised staleness, in numbers and in the report."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from report.synthetic import simulate

from stalewise.report import Timeline, write_report
from stalewise.report.elastic import realised_depths, staleness_figure


def test_a_fixed_staleness_is_realised_but_in_drains() -> None:
    timeline = Timeline.from_traces(simulate(staleness=(4, 2, 0), epochs=1, batches=20))
    batches, depths = realised_depths(timeline.stages[0])
    assert batches.tolist() == list(range(20))
    assert depths.tolist() == [*[4] * 16, 3, 2, 1, 0]
    svg = staleness_figure(timeline)
    assert "stage 0, mean 3.50" in svg
    assert "stage 2" not in svg, "the last stage is never stale"


@pytest.mark.parametrize("elastic", [True, False])
def test_only_elastic_runs_have_the_section(run_dir: Path, elastic: bool) -> None:
    config = json.loads((run_dir / "config.json").read_text())
    (run_dir / "config.json").write_text(json.dumps({**config, "options": {"elastic": elastic}}))
    assert ("Elastic staleness" in write_report(run_dir).read_text()) is elastic
