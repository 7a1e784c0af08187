"""Monitors, which spread failures and miss ranks that are silent, over a store in this process."""

from __future__ import annotations

import json
import queue
import re
import threading
from typing import Any

import pytest
from torch.distributed import TCPStore

from stalewise.errors import ConfigError, PeerLost, ReceiveTimeout, WorkerError
from stalewise.runtime import failure, patience
from stalewise.runtime import monitor as monitor_module
from stalewise.runtime.failure import failure_header, failure_key, rank_key
from stalewise.runtime.monitor import Monitor
from stalewise.runtime.patience import Patience

WAIT_S = 20.0
NAMES = ["stage 0", "stage 1", "stage 2"]


@pytest.fixture
def exits(monkeypatch: pytest.MonkeyPatch) -> queue.Queue[int]:
    """Codes that `os._exit` was called with; it returns."""
    codes: queue.Queue[int] = queue.Queue()
    monkeypatch.setattr(monitor_module.os, "_exit", codes.put)
    monkeypatch.setattr(monitor_module, "GRACE_S", WAIT_S)
    monkeypatch.setattr(monitor_module, "POLL_S", 0.01)
    monkeypatch.setattr(monitor_module, "STATUS_S", 0.02)
    monkeypatch.setattr(monitor_module, "CAUSE_WAIT_S", WAIT_S)
    return codes


def boom() -> ValueError:
    try:
        raise ValueError("no such luck")
    except ValueError as error:
        return error


class TestMonitor:
    def test_one_failure_wakes_the_others(self, store: TCPStore, exits: queue.Queue[int]) -> None:
        monitors = [Monitor(rank, NAMES) for rank in range(3)]
        woken: list[queue.Queue[WorkerError]] = [queue.Queue() for _ in monitors]
        for monitor, own in zip(monitors, woken, strict=True):
            monitor.on_failure(own.put)
        monitors[1].report(boom(), batch=5, action="backward")
        for rank in (0, 2):
            cause = woken[rank].get(timeout=WAIT_S)
            expected = f"stage {rank} stops because stage 1 failed, batch 5, backward: ValueError: no such luck"
            assert str(cause) == expected
            assert monitors[rank].cause() is cause
            for late in (boom(), PeerLost("stage 1 is gone")):
                assert monitors[rank].report(late, batch=5, action=None) is cause
        for monitor in monitors:
            monitor.stop()
        assert woken[1].empty()
        assert monitors[1].cause() is None
        assert exits.empty()

    def test_who_asks_to_be_woken_after_a_failure_is_woken(self, store: TCPStore, exits: queue.Queue[int]) -> None:
        monitors = [Monitor(rank, NAMES[:2]) for rank in range(2)]
        monitors[1].report(boom(), batch=5, action="backward")
        while monitors[0].cause() is None:
            pass
        woken: queue.Queue[WorkerError] = queue.Queue()
        monitors[0].on_failure(woken.put)
        assert woken.get(timeout=WAIT_S) is monitors[0].cause()
        for monitor in monitors:
            monitor.stop()

    def test_who_does_not_stop_is_ended(
        self, store: TCPStore, exits: queue.Queue[int], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(monitor_module, "GRACE_S", 0.2)
        monitors = [Monitor(rank, NAMES[:2]) for rank in range(2)]
        monitors[0].report(boom(), batch=None, action=None)
        assert exits.get(timeout=WAIT_S) == 1
        assert exits.empty()
        monitors[0].stop()

    def test_who_lost_a_peer_leaves_the_word_to_the_peer(self, store: TCPStore, exits: queue.Queue[int]) -> None:
        """The peer's record comes a moment after its connection closed."""
        monitors = [Monitor(rank, NAMES[:2]) for rank in range(2)]
        causes: queue.Queue[WorkerError | None] = queue.Queue()
        lost = threading.Thread(
            target=lambda: causes.put(monitors[0].report(PeerLost("stage 1 is gone"), batch=1, action=None))
        )
        lost.start()
        monitors[1].report(ConfigError("that was me"), batch=1, action="forward")
        lost.join(WAIT_S)
        assert json.loads(store.get(failure_key()))["type"] == "ConfigError"
        assert str(causes.get(timeout=WAIT_S)).endswith(
            "stage 1 failed, batch 1, forward: stalewise.errors.ConfigError: that was me"
        )
        for monitor in monitors:
            monitor.stop()

    @pytest.mark.parametrize("error", [PeerLost("stage 1 is gone"), RuntimeError("Connection closed by peer")])
    def test_what_was_recorded_is_not_waited_for_again(
        self, error: Exception, store: TCPStore, exits: queue.Queue[int], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """An error passes through as many reports as there are things going on around it."""
        monitor = Monitor(0, NAMES[:2])
        monkeypatch.setattr(monitor_module, "CAUSE_WAIT_S", 0.01)
        assert monitor.report(error, batch=1, action="receive gradient") is None
        monkeypatch.setattr(monitor_module, "CAUSE_WAIT_S", 1e6)
        assert monitor.report(error, batch=1, action=None) is None
        assert json.loads(store.get(failure_key()))["action"] == "receive gradient"
        monitor.stop()

    def test_who_is_second_is_told_of_the_first(self, store: TCPStore, exits: queue.Queue[int]) -> None:
        """Two time out at the same moment: one is the cause, the other stops because of it."""
        monitors = [Monitor(rank, NAMES[:2]) for rank in range(2)]
        for monitor in monitors:
            monitor._stopped.set()  # its own look at the store comes too late
        first, second = ReceiveTimeout("got no gradient"), ReceiveTimeout("got none either")
        monitors[1].report(first, batch=6, action="receive gradient")
        monitors[0].report(second, batch=6, action="receive gradient")
        assert json.loads(store.get(failure_key()))["message"] == "got no gradient"
        assert failure_header(first) == "stage 1 failed, batch 6, receive gradient:"
        assert monitors[1].cause() is None
        assert failure_header(second) is None
        assert str(monitors[0].cause()) == (
            "stage 0 stops because stage 1 failed, batch 6, receive gradient: ReceiveTimeout: got no gradient"
        )
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
        monitor = Monitor(2, NAMES)
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
        monkeypatch.setattr(monitor_module, "GRACE_S", 0.2)
        woken: queue.Queue[WorkerError] = queue.Queue()
        monitor = Monitor(0, NAMES[:1])
        monkeypatch.setattr(monitor, "_store", _Gone())
        monitor.on_failure(woken.put)
        assert "stage 0 stops because the launcher failed: its store does not answer" in str(woken.get(timeout=WAIT_S))
        assert exits.get(timeout=WAIT_S) == 1

    def test_a_store_of_rank_0_may_end_before_the_other_ranks(
        self, store: TCPStore, exits: queue.Queue[int], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Without a launcher rank 0 hosts the store; who still has to do after it must not be ended."""
        monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE")
        monitor = Monitor(1, NAMES[:2])
        monkeypatch.setattr(monitor, "_store", _Gone())
        thread = monitor._thread
        assert thread is not None
        thread.join(WAIT_S)
        assert not thread.is_alive()
        assert monitor.cause() is None
        assert exits.empty()

    def test_statuses(self, store: TCPStore, exits: queue.Queue[int]) -> None:
        monitors = [Monitor(rank, NAMES) for rank in range(3)]
        for rank, monitor in enumerate(monitors):
            monitor.publish(lambda rank=rank: {"stage": rank}, Patience())  # type: ignore[misc]
        for monitor in monitors:
            while monitor.statuses() != {rank: {"stage": rank} for rank in range(3)}:
                assert exits.empty()
        for monitor in monitors:
            monitor.stop()


def doing(action: str | None, batch: int | None) -> Any:
    """A status."""
    return lambda: {"doing": None if action is None else [action, batch]}


class TestSilence:
    def test_a_rank_without_a_sign_of_life_is_missed(
        self, store: TCPStore, exits: queue.Queue[int], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(patience, "LEAST_SILENCE_S", 0.1)
        silent, watching = Monitor(1, NAMES[:2]), Monitor(0, NAMES[:2])
        silent.publish(doing("forward", 8), Patience())
        while watching._sights[1].batch != 8:
            pass
        silent.stop()
        woken: queue.Queue[WorkerError] = queue.Queue()
        watching.on_failure(woken.put)
        watching.publish(doing("receive gradient", 7), Patience(0.1))
        cause = woken.get(timeout=WAIT_S)
        assert str(cause).startswith(
            "stage 0 stops because stage 1 failed, batch 8, forward: ReceiveTimeout: stage 1 has shown no sign"
        )
        assert str(cause).endswith("gone. stage 0 is in receive gradient of batch 7. Look at the log of rank 1 first.")
        record = json.loads(store.get(failure_key()))
        assert (record["rank"], record["who"], record["batch"], record["action"]) == (1, "stage 1", 8, "forward")
        watching.stop()

    def test_who_has_failed_itself_misses_nobody(self, store: TCPStore, exits: queue.Queue[int]) -> None:
        """Its own account of the same silence, a message that did not come, was quicker."""
        watching = Monitor(0, NAMES[:2])
        error = ReceiveTimeout("got no gradient of batch 3 from stage 1")
        watching.report(error, batch=3, action="receive gradient")
        watching._miss(1, watching._sights[1])
        assert watching.cause() is None
        assert failure_header(error) == "stage 0 failed, batch 3, receive gradient:"
        watching.stop()

    def test_one_that_has_nothing_to_do_is_not(self, store: TCPStore, exits: queue.Queue[int]) -> None:
        monitors = [Monitor(rank, NAMES[:2]) for rank in range(2)]
        for monitor in monitors:
            monitor.publish(doing(None, None), Patience())
        for monitor in monitors:
            beat = monitor._sights[1].beat
            while monitor._sights[1].beat < beat + 20:
                pass
        assert all(monitor.cause() is None for monitor in monitors)
        for monitor in monitors:
            monitor.stop()

    @pytest.mark.parametrize(
        "text",
        [
            "",
            "nonsense",
            "[1]",
            '{"beat": "x", "status": {}}',
            '{"beat": 7, "status": 3}',
            '{"beat": 7, "status": {"doing": [1]}}',
            '{"beat": 7, "status": {"doing": 4}}',
        ],
    )
    def test_what_no_monitor_wrote_is_passed_over(self, text: str, store: TCPStore, exits: queue.Queue[int]) -> None:
        """The watching one keeps its thread, and sees the next sign that is one."""
        store.set(rank_key(1), text)
        watching = Monitor(0, NAMES[:2])
        while watching._looked_s < 0:
            pass
        assert watching._sights[1].beat == -1
        store.set(rank_key(1), json.dumps({"beat": 9, "status": {"doing": ["forward", 3]}}))
        while watching._sights[1].beat != 9:
            pass
        assert watching._sights[1].batch == 3
        watching.stop()

    def test_a_failure_that_no_rank_wrote_ends_the_job_clearly(self, store: TCPStore, exits: queue.Queue[int]) -> None:
        monitor = Monitor(0, NAMES[:2])
        woken: queue.Queue[WorkerError] = queue.Queue()
        monitor.on_failure(woken.put)
        store.set(failure_key(), "garbage")
        assert str(woken.get(timeout=WAIT_S)).startswith(
            "stage 0 stops because the store of the job failed: it holds b'garbage' where ranks leave why they fail."
        )
        monitor.stop()

    @pytest.mark.parametrize(
        ("statuses", "asked", "expected"),
        [
            ([("load", 9), ("forward", 8)], 1, r" It is alive, in forward of batch 8 for \d\.\d s\."),
            ([("load", 9), (None, None)], 1, r" It is alive, in code that no pipeline calls for \d\.\d s\."),
            ([("load", 9), ("end of a session", None)], 1, r" It is alive, in end of a session for \d\.\d s\."),
            (
                [("receive gradient", 1), ("receive gradient", 2), ("backward", 3)],
                1,
                r" It waits for others itself, in the end for stage 2, which is alive, in backward of batch 3 .*",
            ),
            (
                [("load", 5), ("receive activation", 5), ("receive activation", 4)],
                2,
                r" It waits for others itself, in the end for stage 0, which is alive, in load of batch 5 for .* s\.",
            ),
            (
                [("receive gradient", 1), ("receive activation", 2)],
                1,
                r" It waits for others itself, in the end for .*",
            ),
            (
                [("load", 9), ("wait for a message", 5), ("wait for a message", 5)],
                1,
                r" It waits for others itself, in the end for stage 0, which is alive, in load of batch 9 .*",
            ),
            (
                [("wait for a message", 5), ("wait for a message", 5), ("backward", 3)],
                0,
                r" It waits for others itself, in the end for stage 2, which is alive, in backward of batch 3 .*",
            ),
        ],
    )
    def test_who_keeps_others_waiting(
        self,
        statuses: list[tuple[str | None, int | None]],
        asked: int,
        expected: str,
        store: TCPStore,
        exits: queue.Queue[int],
    ) -> None:
        """The neighbour that sends nothing may wait itself."""
        monitors = [Monitor(rank, NAMES[: len(statuses)]) for rank in range(len(statuses))]
        for monitor, status in zip(monitors, statuses, strict=True):
            monitor.publish(doing(*status), Patience())
        for sight, (_, batch) in zip(monitors[0]._sights, statuses, strict=True):
            while sight.batch != batch or not sight.status:
                pass
        assert re.fullmatch(expected, monitors[0].explain(asked))
        for monitor in monitors:
            monitor.stop()

    def test_nothing_is_known_without_a_store(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("MASTER_ADDR", raising=False)
        assert Monitor(0, NAMES).explain(1) == ""


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
