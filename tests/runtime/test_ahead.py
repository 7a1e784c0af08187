"""Receives that are posted ahead, over a network that carries a message only to a receive that is posted."""

from __future__ import annotations

from collections import deque
from typing import Any

import pytest
import torch
from dist_equal import assert_equal
from torch import Tensor

from stalewise.runtime import ahead
from stalewise.runtime.ahead import CHUNK_BYTES, WINDOW, Inbox, Outbox


class Work:
    """A posted receive."""

    def __init__(self, buffer: Tensor) -> None:
        self.buffer = buffer
        self.done = False

    def wait(self) -> bool:
        assert self.done, "nothing was sent into this receive, so a real one would block"
        return True


class Network:
    """Carries at once what finds a posted receive; a send that would have to wait for one is an error."""

    def __init__(self) -> None:
        self.posted: deque[Work] = deque()
        self.sizes: list[int] = []

    def irecv(self, buffer: Tensor, rank: int, *, group: Any, tag: int) -> Work:
        assert (rank, group, tag) == (1, "gloo", 4)
        self.posted.append(Work(buffer))
        return self.posted[-1]

    def send(self, data: Tensor, rank: int, *, group: Any, tag: int) -> None:
        assert (rank, group, tag) == (1, "gloo", 4)
        assert self.posted, "a sender would wait for a round trip here"
        work = self.posted.popleft()
        assert data.numel() <= work.buffer.numel()
        work.buffer[: data.numel()] = data
        work.done = True
        self.sizes.append(data.numel())


@pytest.fixture
def network(monkeypatch: pytest.MonkeyPatch) -> Network:
    fake = Network()
    monkeypatch.setattr(ahead, "dist", fake)
    return fake


def numbered(size: int) -> Tensor:
    return torch.arange(size).remainder(251).to(torch.uint8)


def test_a_window_of_parts_leaves_before_the_receiver_takes_any(network: Network) -> None:
    outbox, inbox = Outbox(1, "gloo", 4), Inbox(1, "gloo", 4)  # type: ignore[arg-type]
    inbox.open()
    sizes = [1024, 3 * CHUNK_BYTES + 5, 1024, CHUNK_BYTES, 2 * CHUNK_BYTES]
    for size in sizes:
        outbox.send(numbered(size))
    assert network.sizes == [1024, *[CHUNK_BYTES] * 3, 5, 1024, *[CHUNK_BYTES] * 3]
    for size in sizes:
        data = torch.zeros(size, dtype=torch.uint8)
        inbox.fill(data)
        assert_equal(data, numbered(size))


def test_as_many_receives_are_posted_after_every_message_and_none_after_a_session(network: Network) -> None:
    outbox, inbox = Outbox(1, "gloo", 4), Inbox(1, "gloo", 4)  # type: ignore[arg-type]
    for _ in range(2):
        inbox.open()
        for size in (7, 2 * CHUNK_BYTES + 1, 64):
            outbox.send(numbered(size))
            inbox.fill(torch.empty(size, dtype=torch.uint8))
            assert len(network.posted) == WINDOW
        outbox.end()
        assert not network.posted
        inbox.end()
