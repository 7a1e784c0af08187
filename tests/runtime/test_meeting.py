"""Ranks that meet: threads here, over a store in this process."""

from __future__ import annotations

import json
import socket
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from torch.distributed import TCPStore

from stalewise.errors import ConfigError, ReceiveTimeout, WorkerError
from stalewise.runtime import meeting
from stalewise.runtime.failure import connect_to_store, record_failure, start_key
from stalewise.runtime.meeting import Member, is_member, meet

WAIT_S = 20.0
SHORT_S = 2.0


def start(store: TCPStore, rank: int, **changes: Any) -> None:
    """Another rank's part."""
    member = {"rank": rank, "host": "b", "pid": 7}
    own = {"member": member, "releases": meeting._releases(), "world_size": 3, **changes}
    store.set(start_key(rank), json.dumps(own))


@pytest.fixture(autouse=True)
def _environment(store: TCPStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "3")


def test_all_are_here(store: TCPStore) -> None:
    start(store, 1)
    with ThreadPoolExecutor(1) as pool:
        met = pool.submit(meet, WAIT_S)
        start(store, 2)
        _, members = met.result(WAIT_S)
    assert members == (Member.own(0), *(Member(rank=rank, host="b", pid=7) for rank in (1, 2)))


def test_a_rank_that_does_not_start_is_named(store: TCPStore) -> None:
    start(store, 1)
    with pytest.raises(ReceiveTimeout) as raised:
        meet(SHORT_S)
    assert str(raised.value) == (
        "rank 2 did not start in 2 s; ranks 0, 1 of 3 did. Look at the log of rank 2 first: it was not started, "
        "cannot reach 127.0.0.1, or waits before it builds its Pipeline; raise start_timeout_s only if the start "
        "really takes that long."
    )


def test_one_that_fails_before_ends_the_wait(store: TCPStore) -> None:
    record_failure(ValueError("no data"), rank=2, who="stage 2", store=connect_to_store())
    with pytest.raises(WorkerError, match=r"stage 0 .* stops because stage 2 failed: no data"):
        meet(WAIT_S)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"releases": "stalewise 0.0.1"},
            r"stage 2 \(rank 2, .*\) runs with releases stalewise 0\.0\.1, stage 0",
        ),
        ({"world_size": 4}, r"stage 2 \(rank 2, host b, pid 7\) runs with world_size 4, stage 0 .* with 3\."),
    ],
)
def test_other_releases_and_sizes(changes: dict[str, Any], expected: str, store: TCPStore) -> None:
    start(store, 1)
    start(store, 2, **changes)
    with pytest.raises(ConfigError, match=expected):
        meet(WAIT_S)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("RANK", "3", "RANK is 3 and WORLD_SIZE 3"),
        ("RANK", "one", "RANK is 'one' in the environment"),
        ("MASTER_PORT", "", "MASTER_PORT is '' in the environment"),
    ],
)
def test_an_environment_that_describes_no_job(
    name: str, value: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=expected):
        meet(SHORT_S)


def test_rank_0_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a launcher rank 0 hosts the store."""
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE")
    monkeypatch.setenv("RANK", "1")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("MASTER_PORT", str(free.getsockname()[1]))
        with pytest.raises(
            ReceiveTimeout, match=r"rank 1 did not reach the store of the job at 127\.0\.0\.1:\d+ in 2 s"
        ):
            meet(SHORT_S)


def test_a_port_that_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        monkeypatch.setenv("MASTER_PORT", str(taken.getsockname()[1]))
        with pytest.raises(ConfigError, match=r"rank 0 cannot host the store of the job at 127\.0\.0\.1:\d+: "):
            meet(SHORT_S)


def test_another_process_of_the_same_rank_is_refused_and_the_first_one_stays(store: TCPStore) -> None:
    start(store, 0)
    start(store, 1)
    start(store, 2)
    before = store.get(start_key(0))
    with pytest.raises(
        ConfigError, match=r"stage 0 \(rank 0, .*\) finds stage 0 \(rank 0, host b, pid 7\) in its place, .*two ports"
    ):
        meet(WAIT_S)
    assert store.get(start_key(0)) == before
    assert not is_member(store, 0)


def test_who_meets_again_is_no_other(store: TCPStore) -> None:
    start(store, 1)
    start(store, 2)
    assert is_member(store, 0)
    assert meet(WAIT_S)[1] == meet(WAIT_S)[1]
    assert is_member(store, 0)


def test_a_rank_of_a_larger_job_is_told_at_once(store: TCPStore, monkeypatch: pytest.MonkeyPatch) -> None:
    start(store, 0)
    monkeypatch.setenv("RANK", "5")
    monkeypatch.setenv("WORLD_SIZE", "8")
    with pytest.raises(ConfigError, match=r"stage 5 .* runs with world_size 8, stage 0 .* with 3"):
        meet(WAIT_S)


@pytest.mark.parametrize("text", ["", "garbage", "[]", "{}", '{"member": 3}', '{"member": {"rank": 1}, "more": 2}'])
def test_a_start_that_no_rank_wrote(text: str, store: TCPStore) -> None:
    start(store, 2)
    store.set(start_key(1), text)
    with pytest.raises(ConfigError, match=r"the store of the job holds .* as stalewise/0/start/1, which no rank of"):
        meet(WAIT_S)


def test_rank_0_is_who_others_are_compared_with(store: TCPStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever came first: a difference between two others says not which of them is wrong."""
    monkeypatch.setenv("RANK", "2")
    start(store, 1, releases="stalewise 0.0.1")
    with pytest.raises(ReceiveTimeout, match="rank 0 did not start"):
        meet(SHORT_S)
    start(store, 0)
    with pytest.raises(ConfigError, match=r"stage 1 .* runs with releases stalewise 0\.0\.1, stage 0 "):
        meet(WAIT_S)
