"""Bytes between hosts: receives are posted ahead of what is sent, so that no message waits for a round trip.

gloo holds bytes back until the receiver has said that it takes them, and it can say so only for as many as it knows of:

    sender   ──I have a page──►                   ──page──►   ──I have 2 MB──►                  ──2 MB──► ..
    receiver                   ──I take a page──►                              ──I take 2 MB──►

Within a host that costs microseconds. Over a link of 20 ms every part of a message costs 40 ms, whatever its size. So
both ends agree on parts of at most CHUNK_BYTES, and the receiver always has WINDOW of them posted:

    sender   ──page──► ──chunk──► ──chunk──► ..                   the next message need not wait for anything either
    receiver ◄──I take a chunk── (one for each that was used)

A session ends with as many fillers of a byte as receives are posted, so none is left between sessions.
"""

from __future__ import annotations

from collections import deque

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["CHUNK_BYTES", "WINDOW", "Inbox", "Outbox"]

CHUNK_BYTES = 1 << 19
WINDOW = 16
"""8 MiB on their way: what 1 Gbit/s carries in a round trip of 64 ms."""


class Outbox:
    """The sending end.

    Args:
        rank: of the peer.
        group: gloo.
        tag: of this direction of this link.
    """

    def __init__(self, rank: int, group: dist.ProcessGroup, tag: int) -> None:
        self._rank, self._group, self._tag = rank, group, tag

    def send(self, data: Tensor) -> None:
        """Send bytes that lie in host memory; blocks until the system has them all."""
        for chunk in torch.split(data, CHUNK_BYTES):
            dist.send(chunk, self._rank, group=self._group, tag=self._tag)

    def end(self) -> None:
        """Let the peer's posted receives end."""
        for _ in range(WINDOW):
            dist.send(torch.zeros(1, dtype=torch.uint8), self._rank, group=self._group, tag=self._tag)


class Inbox:
    """The receiving end, for a session.

    Args:
        rank: of the peer.
        group: gloo.
        tag: of this direction of this link.
    """

    def __init__(self, rank: int, group: dist.ProcessGroup, tag: int) -> None:
        self._rank, self._group, self._tag = rank, group, tag
        self._posted: deque[tuple[Tensor, dist.Work | None]] = deque()

    def open(self) -> None:
        """Begin a session."""
        self._posted.clear()
        for _ in range(WINDOW):
            self._post(torch.empty(CHUNK_BYTES, dtype=torch.uint8))

    def fill(self, data: Tensor) -> None:
        """Fill with the next bytes that the peer sent; waits for them.

        Raises:
            RuntimeError: where the connection is gone.
        """
        for chunk in torch.split(data, CHUNK_BYTES):
            buffer = self._arrived()
            chunk.copy_(buffer[: chunk.numel()])
            self._post(buffer)

    def end(self) -> None:
        """Wait for the peer's fillers, and give the memory back."""
        while self._posted:
            self._arrived()

    def _post(self, buffer: Tensor) -> None:
        # gloo lets a message be shorter than the receive that takes it.
        self._posted.append((buffer, dist.irecv(buffer, self._rank, group=self._group, tag=self._tag)))

    def _arrived(self) -> Tensor:
        buffer, work = self._posted.popleft()
        assert work is not None, "this rank is part of the group"
        work.wait()
        return buffer
