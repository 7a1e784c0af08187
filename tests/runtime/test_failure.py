"""Records of failures, and the monitors that spread them, over a store in this process."""

from __future__ import annotations

import json
import queue
import threading
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
from torch.distributed import TCPStore

from stalewise.errors import ConfigError, PeerLost, ReceiveTimeout, WorkerError
from stalewise.runtime import failure
from stalewise.runtime.failure import (
    Monitor,
    connect_to_store,
    describe_failure,
    failure_header,
    failure_key,
    record_failure,
)

WAIT_S = 20.0


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[TCPStore]:
    """A launcher's store, named by the environment."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=20))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(store.port))
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.delenv("TORCHELASTIC_RESTART_COUNT", raising=False)
    return store


@pytest.fixture
def exits(monkeypatch: pytest.MonkeyPatch) -> queue.Queue[int]:
    """Codes that `os._exit` was called with; it returns."""
    codes: queue.Queue[int] = queue.Queue()
    monkeypatch.setattr(failure.os, "_exit", codes.put)
    monkeypatch.setattr(failure, "GRACE_S", 0.2)
    monkeypatch.setattr(failure, "POLL_S", 0.01)
    monkeypatch.setattr(failure, "STATUS_S", 0.02)
    monkeypatch.setattr(failure, "CAUSE_WAIT_S", WAIT_S)
    return codes


def boom() -> ValueError:
    try:
        raise ValueError("no such luck")
    except ValueError as error:
        return error


class TestRecord:
    def test_it_reads_as_header_and_traceback(self, store: TCPStore) -> None:
        record_failure(boom(), rank=1, who="stage 1 (rank 1)", batch=7, action="forward", store=connect_to_store())
        text = describe_failure(json.loads(store.get(failure_key())))
        assert text.startswith("stage 1 (rank 1) failed, batch 7, forward:\nTraceback (most recent call last):\n")
        assert text.endswith("\nValueError: no such luck")

    def test_the_first_one_stays(self, store: TCPStore) -> None:
        for rank in (2, 0, 1):
            record_failure(boom(), rank=rank, who=f"rank {rank}", store=connect_to_store())
        assert json.loads(store.get(failure_key()))["rank"] == 2

    def test_an_error_is_recorded_once(self, store: TCPStore) -> None:
        error = boom()
        record_failure(error, rank=0, who="the place where it happened", batch=3, store=connect_to_store())
        store.delete_key(failure_key())
        record_failure(error, rank=0, who="an outer place", store=connect_to_store())
        assert not store.check([failure_key()])

    def test_what_another_rank_caused_is_not_recorded(self, store: TCPStore) -> None:
        record_failure(WorkerError("stage 1 failed"), rank=0, who="rank 0", store=connect_to_store())
        assert not store.check([failure_key()])

    @pytest.mark.parametrize("error", [PeerLost("stage 1 is gone"), ReceiveTimeout("got nothing")])
    def test_errors_of_links_need_no_traceback(self, error: Exception, store: TCPStore) -> None:
        record_failure(error, rank=0, who="rank 0", batch=4, store=connect_to_store())
        text = describe_failure(json.loads(store.get(failure_key())))
        assert text == f"rank 0 failed, batch 4:\n{type(error).__name__}: {error}"

    def test_restarts_of_torchrun_have_a_record_each(self, store: TCPStore, monkeypatch: pytest.MonkeyPatch) -> None:
        record_failure(boom(), rank=0, who="rank 0", store=connect_to_store())
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
        assert not store.check([failure_key()])

    def test_without_a_store_it_only_marks_the_error(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("MASTER_ADDR", raising=False)
        assert connect_to_store() is None
        error = boom()
        record_failure(error, rank=1, who="stage 1", batch=2, store=None)
        assert failure.failure_header(error) == "stage 1 failed, batch 2:"

    def test_a_store_that_is_not_there(self, monkeypatch: pytest.MonkeyPatch, store: TCPStore) -> None:
        monkeypatch.setenv("MASTER_PORT", "not a port")
        assert connect_to_store() is None


class TestMonitor:
    def test_one_failure_wakes_the_others(self, store: TCPStore, exits: queue.Queue[int]) -> None:
        monitors = [Monitor(rank, f"stage {rank}") for rank in range(3)]
        woken: list[queue.Queue[WorkerError]] = [queue.Queue() for _ in monitors]
        for monitor, own in zip(monitors, woken, strict=True):
            monitor.on_failure(own.put)
        monitors[1].report(boom(), batch=5, action="backward")
        for rank in (0, 2):
            cause = woken[rank].get(timeout=WAIT_S)
            assert str(cause) == f"stage {rank} stops because stage 1 failed: ValueError: no such luck"
            assert monitors[rank].cause() is cause
            assert monitors[rank].wait_for_cause() is cause
        for monitor in monitors:
            monitor.stop()
        assert woken[1].empty()
        assert monitors[1].cause() is None
        assert exits.empty()

    def test_who_does_not_stop_is_ended(self, store: TCPStore, exits: queue.Queue[int]) -> None:
        monitors = [Monitor(rank, f"stage {rank}") for rank in range(2)]
        monitors[0].report(boom(), batch=None, action=None)
        assert exits.get(timeout=WAIT_S) == 1
        assert exits.empty()
        monitors[0].stop()

    def test_who_lost_a_peer_leaves_the_word_to_the_peer(self, store: TCPStore, exits: queue.Queue[int]) -> None:
        """The peer's record comes a moment after its connection closed."""
        monitors = [Monitor(rank, f"stage {rank}") for rank in range(2)]
        lost = threading.Thread(
            target=monitors[0].report, args=[PeerLost("stage 1 is gone")], kwargs={"batch": 1, "action": None}
        )
        lost.start()
        monitors[1].report(ConfigError("that was me"), batch=1, action="forward")
        lost.join(WAIT_S)
        assert json.loads(store.get(failure_key()))["type"] == "ConfigError"
        for monitor in monitors:
            monitor.stop()

    def test_who_is_second_is_told_of_the_first(self, store: TCPStore, exits: queue.Queue[int]) -> None:
        """Two time out at the same moment: one is the cause, the other stops because of it."""
        monitors = [Monitor(rank, f"stage {rank}") for rank in range(2)]
        for monitor in monitors:
            monitor._stopped.set()  # its own look at the store comes too late
        first, second = ReceiveTimeout("got no gradient"), ReceiveTimeout("got none either")
        monitors[1].report(first, batch=6, action="receive gradient")
        monitors[0].report(second, batch=6, action="receive gradient")
        assert json.loads(store.get(failure_key()))["message"] == "got no gradient"
        assert failure_header(first) == "stage 1 failed, batch 6, receive gradient:"
        assert monitors[1].cause() is None
        assert failure_header(second) is None
        assert str(monitors[0].cause()) == ("stage 0 stops because stage 1 failed: ReceiveTimeout: got no gradient")
        assert exits.empty()

    def test_a_store_that_does_not_answer(
        self,
        store: TCPStore,
        exits: queue.Queue[int],
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        """Behind a link that is down: the failure is this worker's own, and it does not wait for ever."""
        answers = threading.Event()
        monkeypatch.setattr(failure, "STORE_WAIT_S", 0.05)
        monitor = Monitor(2, "stage 2")
        monitor.stop()
        monkeypatch.setattr(monitor, "_store", _Silent(answers))
        error = ReceiveTimeout("got no activation")
        monitor.report(error, batch=6, action="receive activation")
        answers.set()
        assert failure_header(error) == "stage 2 failed, batch 6, receive activation:"
        assert monitor.cause() is None
        assert "could not tell the other ranks of a failure: the job's store does not answer" in capsys.readouterr().err

    def test_a_launcher_that_is_gone_ends_the_job(
        self, store: TCPStore, exits: queue.Queue[int], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        woken: queue.Queue[WorkerError] = queue.Queue()
        monitor = Monitor(0, "stage 0")
        monkeypatch.setattr(monitor, "_store", _Gone())
        monitor.on_failure(woken.put)
        assert "stage 0 stops because the launcher failed: its store does not answer" in str(woken.get(timeout=WAIT_S))
        assert exits.get(timeout=WAIT_S) == 1

    def test_a_store_of_rank_0_may_end_before_the_other_ranks(
        self, store: TCPStore, exits: queue.Queue[int], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Without a launcher rank 0 hosts the store; who still has to do after it must not be ended."""
        monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE")
        monitor = Monitor(1, "stage 1")
        monkeypatch.setattr(monitor, "_store", _Gone())
        thread = monitor._thread
        assert thread is not None
        thread.join(WAIT_S)
        assert not thread.is_alive()
        assert monitor.cause() is None
        assert exits.empty()

    def test_statuses(self, store: TCPStore, exits: queue.Queue[int]) -> None:
        monitors = [Monitor(rank, f"stage {rank}") for rank in range(3)]
        assert monitors[0].statuses() == {}
        counts = [0, 0, 0]

        def status_of(rank: int) -> Any:
            def status() -> dict[str, int]:
                counts[rank] += 1
                return {"stage": rank}

            return status

        for rank, monitor in enumerate(monitors):
            monitor.publish(status_of(rank), watch=range(3 if rank == 0 else 0))
        while monitors[0].statuses() != {rank: {"stage": rank} for rank in range(3)}:
            assert exits.empty()
        assert monitors[1].statuses() == {}
        for monitor in monitors:
            monitor.stop()


class _Gone:
    """A store whose server has ended."""

    def check(self, keys: list[str]) -> bool:
        raise RuntimeError("Connection reset by peer")


class _Silent:
    """A store whose answers do not come."""

    def __init__(self, answers: threading.Event) -> None:
        self._answers = answers

    def compare_set(self, key: str, expected: str, desired: str) -> bytes:
        self._answers.wait()
        return desired.encode()
