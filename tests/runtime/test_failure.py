"""Records of failures, over a store in this process."""

from __future__ import annotations

import json

import pytest
from torch.distributed import TCPStore

from stalewise.errors import PeerLost, ReceiveTimeout, WorkerError
from stalewise.runtime import failure
from stalewise.runtime.failure import connect_to_store, describe_failure, failure_key, read_record, record_failure


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


class TestReading:
    def test_a_record_comes_back(self, store: TCPStore) -> None:
        record_failure(boom(), rank=1, who="stage 1", batch=7, store=connect_to_store())
        record = read_record(store.get(failure_key()))
        assert (record["rank"], record["who"], record["batch"], record["type"]) == (1, "stage 1", 7, "ValueError")

    @pytest.mark.parametrize(
        "text",
        [
            b"",
            b"\xff\xfe",
            b"nonsense",
            b"[]",
            b"null",
            b"7",
            b"{}",
            b'{"rank": "1"}',
            b'{"rank": 1, "who": 3, "type": "", "message": "", "traceback": ""}',
            b"[" * 100_000,
        ],
    )
    def test_what_no_rank_wrote_is_a_failure_that_says_so(self, text: bytes) -> None:
        record = read_record(text)
        assert (record["rank"], record["who"], record["type"]) == (-1, "the store of the job", "Unreadable")
        assert record["message"] == record["traceback"]
        assert record["message"].endswith(" where ranks leave why they fail. Let nothing else use MASTER_PORT.")
        assert len(record["message"]) < 400
        assert describe_failure(record).startswith("the store of the job failed:\nit holds ")
