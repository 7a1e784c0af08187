"""All jobs that fail, run beside each other once; the tests look at how each of them ended."""

from __future__ import annotations

import pytest
from dist_cases import EXITS, IN_THE_PIPELINE, MISUSE, OUTSIDE, SIGNALS, STARTS
from dist_jobs import Ended, Job, run_jobs

AT_ONCE = 3


@pytest.fixture(scope="session")
def ended(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Ended]:
    """By name: how each job ended."""
    raised = {f"{place} {stage}": (place, stage) for place, stage in [*IN_THE_PIPELINE, *OUTSIDE]}
    arguments = {"nothing happens": ("nowhere", 0), **raised, **MISUSE, **EXITS, **SIGNALS, **STARTS}
    jobs: dict[str, Job] = {name: ("dist_faults:fail", 3, values) for name, values in arguments.items()}
    jobs["leave at once"] = ("dist_faults:leave_at_once", 3, ())
    jobs["leave early"] = ("dist_faults:leave_early", 3, ())
    return run_jobs(jobs, tmp_path_factory.mktemp("jobs"), at_once=AT_ONCE)
