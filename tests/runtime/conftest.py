"""Jobs that several tests look at, and the store of a launcher."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import dist_workers
import pytest
from dist_jobs import run_job
from torch.distributed import TCPStore

import stalewise


@pytest.fixture(scope="session")
def job_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """The folder with the results of the long job of K workers, which is run when first asked for."""
    folders: dict[int, Path] = {}

    def of(num_workers: int) -> Path:
        if num_workers not in folders:
            folder = folders[num_workers] = tmp_path_factory.mktemp(f"job-{num_workers}")
            if num_workers == 2:
                stalewise.launch(dist_workers.in_a_group_of_the_users, num_workers=2, args=[str(folder)])
            else:
                job = run_job("dist_workers:long_run", num_workers, [num_workers], folder)
                assert (job.error, job.exit_code) == (None, 0), job.message
        return folders[num_workers]

    return of


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[TCPStore]:
    """A launcher's store, named by the environment."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=20))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(store.port))
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.delenv("TORCHELASTIC_RESTART_COUNT", raising=False)
    return store
