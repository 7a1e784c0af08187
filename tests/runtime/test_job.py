"""Errors at the edge of a job, and the clocks of several hosts."""

from __future__ import annotations

import queue
import sys
import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest

from stalewise.errors import WorkerError
from stalewise.runtime import job
from stalewise.runtime.job import Member

WAIT_S = 20.0


class Exit(Exception):
    """Stands for the end of the process."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


@pytest.fixture
def _exits(monkeypatch: pytest.MonkeyPatch) -> None:
    def exit_now(code: int) -> None:
        raise Exit(code)

    monkeypatch.setattr(job.os, "_exit", exit_now)
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    monkeypatch.setenv("RANK", "3")


def hook(error: BaseException) -> None:
    """What Python calls for an error that nobody caught."""
    try:
        raise error
    except BaseException:
        job._report_and_exit(*sys.exc_info())  # type: ignore[arg-type]


@pytest.mark.usefixtures("_exits")
class TestExceptHook:
    def test_header_and_traceback(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(Exit, match="1"):
            hook(ValueError("no such luck"))
        lines = capsys.readouterr().err.splitlines()
        assert lines[0].startswith("stage 3 (rank 3, host ")
        assert lines[0].endswith(") failed:")
        assert lines[1] == "Traceback (most recent call last):"
        assert lines[-1] == "ValueError: no such luck"

    def test_the_failure_of_another_rank_is_one_line(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(Exit, match="1"):
            hook(WorkerError("stage 3 stops because stage 1 failed: Boom"))
        assert capsys.readouterr().err == "stalewise: stage 3 stops because stage 1 failed: Boom\n"

    def test_an_error_that_was_not_first_has_no_header(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(job, "report_failure", lambda error: None)
        with pytest.raises(Exit):
            hook(ValueError("after another rank's"))
        assert capsys.readouterr().err.startswith("Traceback")

    def test_threads_end_nothing(self, capsys: pytest.CaptureFixture[str]) -> None:
        """multiprocessing calls the hook from threads of its own, such as where a data loader is left early."""
        exits: list[BaseException] = []

        def in_thread() -> None:
            try:
                hook(ConnectionResetError("by a process of the data loader"))
            except Exit as error:
                exits.append(error)

        thread = threading.Thread(target=in_thread)
        thread.start()
        thread.join(WAIT_S)
        assert exits == []
        assert "ConnectionResetError: by a process of the data loader" in capsys.readouterr().err

    def test_an_error_at_the_very_end_is_no_success(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def leave() -> None:
            raise ValueError("too late")

        monkeypatch.setattr(job, "leave_job", leave)
        with pytest.raises(Exit, match="1"):
            job._leave_at_exit()
        assert "ValueError: too late" in capsys.readouterr().err


class Wires:
    """Numbers between two ranks that are threads here, the clock of rank 1 being off."""

    def __init__(self, skew_ns: int) -> None:
        self._to: dict[int, queue.Queue[int]] = {0: queue.Queue(), 1: queue.Queue()}
        self._skew_ns = skew_ns

    @staticmethod
    def rank() -> int:
        return int(threading.current_thread().name)

    def clock(self) -> int:
        return time.perf_counter_ns() + (self._skew_ns if self.rank() == 1 else 0)

    def send(self, value: int, rank: int, group: Any) -> None:
        self._to[rank].put(value)

    def receive(self, rank: int, group: Any) -> int:
        return self._to[self.rank()].get(timeout=WAIT_S)


@pytest.mark.parametrize("skew_ns", [0, 10**12, -(10**12)])
@pytest.mark.parametrize("hosts", [("a", "b"), ("a", "a")])
def test_clocks_are_aligned(skew_ns: int, hosts: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Hosts of their own have clocks of their own; processes of one host share theirs, and exchange nothing."""
    wires = Wires(skew_ns)
    monkeypatch.setattr(job, "_send_number", wires.send)
    monkeypatch.setattr(job, "_receive_number", wires.receive)
    monkeypatch.setattr(job, "time", SimpleNamespace(perf_counter_ns=wires.clock))
    members = tuple(Member(rank=rank, host=host, pid=rank) for rank, host in enumerate(hosts))
    offsets: dict[int, int] = {}

    def measure() -> None:
        offsets[wires.rank()] = job._clock_offset(wires.rank(), members, None)  # type: ignore[arg-type]

    threads = [threading.Thread(target=measure, name=str(rank)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
    assert offsets[0] == 0
    if hosts[0] == hosts[1]:
        assert offsets[1] == 0
    else:
        assert abs(offsets[1] + skew_ns) < 50_000_000
