"""Threads that fit the cores, and the warning where they do not."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from stalewise.runtime import cores
from stalewise.runtime.cores import threads_per_process, too_many_threads, usable_cores

SCRIPT = """
import os
import torch
import stalewise


def main() -> None:
    if os.environ["THREADS"]:
        torch.set_num_threads(int(os.environ["THREADS"]))
    stalewise.Pipeline(
        [torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)],
        method=stalewise.DSP.minimal(2),
        loss_fn=torch.nn.functional.mse_loss,
        optimizer=lambda params: torch.optim.SGD(params, lr=0.1),
        partition=(1,),
        device="cpu",
    )
    print(f"threads {torch.get_num_threads()}")


if __name__ == "__main__":
    stalewise.launch(main, num_workers=2)
"""


def test_a_share_of_the_cores_that_may_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cores.os, "sched_getaffinity", lambda pid: {1, 2, 5, 6, 7}, raising=False)
    assert usable_cores() == 5
    assert [threads_per_process(count) for count in (1, 2, 3, 5, 9)] == [5, 2, 1, 1, 1]


@pytest.mark.parametrize(
    ("threads", "available", "words"),
    [
        ([1, 1, 1], 3, None),
        ([2, 2], 4, None),
        ([0, 0, 0], 1, None),
        ([4, 4], 4, "2 ranks on this host run 8 threads on 4 cores, which can be ten times slower"),
        ([4, 4], 4, r"torch.set_num_threads\(2\) in each rank, set OMP_NUM_THREADS=2, or give --threads 2"),
        ([4, 4, 4, 4, 4], 4, r"torch.set_num_threads\(1\)"),
        ([1, 1, 1], 2, "3 ranks on this host run 3 threads on 2 cores, so stages wait for each other. Use 2 stages"),
    ],
)
def test_what_is_said(threads: list[int], available: int, words: str | None) -> None:
    said = too_many_threads(threads, available)
    if words is None:
        assert said is None
    else:
        assert said is not None
        assert re.search(words, said)


@pytest.mark.dist
@pytest.mark.skipif(usable_cores() < 2, reason="needs two cores")
@pytest.mark.parametrize("threads", ["", "64"], ids=["as launched", "too many"])
def test_a_job_warns_once(threads: str, tmp_path: Path) -> None:
    """As launched, threads fit; where each rank takes 64, one of them says so."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    done = subprocess.run(
        [sys.executable, script],
        env={**environment, "THREADS": threads},
        capture_output=True,
        text=True,
        timeout=400,
        check=True,
    )
    assert done.stderr.count("2 ranks on this host run 128 threads") == (1 if threads else 0)
    assert done.stdout.count(f"threads {threads or threads_per_process(2)}\n") == 2
