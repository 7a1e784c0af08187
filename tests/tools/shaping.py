"""What a link does to packets, as a pure core: rate, delay, loss, a queue that overflows, down and up.

    offer ──► down? lost? queue full? ──► wait for the line ──► size / rate on the line ──► delay ──► due

Time is given, never read; whole nanoseconds.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass

__all__ = ["Counts", "Direction", "Shape"]


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Of both directions of a link.

    Args:
        delay_s: from the end of a packet on the line to its arrival.
        rate_bits_per_s: of the line; None: no limit.
        loss: share of the packets that are lost, chosen by seed, direction and index of the packet.
        seed: of the losses.
        queue_bytes: that may wait for the line; what comes on top is lost, as in a router.
        mtu_bytes: largest packet.
    """

    delay_s: float = 0.0
    rate_bits_per_s: float | None = None
    loss: float = 0.0
    seed: int = 0
    queue_bytes: int = 8 << 20
    mtu_bytes: int = 1500

    def __post_init__(self) -> None:
        if (
            self.delay_s < 0
            or not 0 <= self.loss <= 1
            or (self.rate_bits_per_s is not None and self.rate_bits_per_s <= 0)
        ):
            raise ValueError(f"{self} is no link: delays are 0 or more, rates above 0, loss within 0 .. 1.")


@dataclass
class Counts:
    """Packets of one direction.

    Args:
        delivered: to the other end.
        lost: by `Shape.loss`.
        overflowed: because the queue was full.
        cut: because the link was down when they came, or went down while they were on their way.
    """

    delivered: int = 0
    lost: int = 0
    overflowed: int = 0
    cut: int = 0

    def as_json(self) -> dict[str, int]:
        """By name."""
        return asdict(self)


class Direction:
    """One direction of a link.

    Args:
        shape: of the link.
        name: tells its losses from the other direction's.
    """

    def __init__(self, shape: Shape, name: str) -> None:
        self.counts = Counts()
        self.up = True
        self._shape = shape
        self._delay_ns = round(1e9 * shape.delay_s)
        self._random = random.Random(f"{shape.seed} {name}")
        self._on_the_way: deque[tuple[int, bytes]] = deque()
        self._line_free_ns = 0
        self._last_due_ns = 0

    def offer(self, packet: bytes, now_ns: int) -> None:
        """A packet comes."""
        # Drawn for every packet, so that being down moves no later loss to another packet.
        lost = self._random.random() < self._shape.loss
        if not self.up:
            self.counts.cut += 1
        elif lost:
            self.counts.lost += 1
        elif self._waiting_bytes(now_ns) + len(packet) > self._shape.queue_bytes:
            self.counts.overflowed += 1
        else:
            self._line_free_ns = max(now_ns, self._line_free_ns) + self._on_the_line_ns(len(packet))
            self._last_due_ns = max(self._line_free_ns + self._delay_ns, self._last_due_ns)
            self._on_the_way.append((self._last_due_ns, packet))

    def due(self, now_ns: int) -> Iterator[bytes]:
        """What has arrived, in order."""
        while self._on_the_way and self._on_the_way[0][0] <= now_ns:
            self.counts.delivered += 1
            yield self._on_the_way.popleft()[1]

    @property
    def next_ns(self) -> int | None:
        """When the next packet arrives; None where none is on its way."""
        return self._on_the_way[0][0] if self._on_the_way else None

    def switch(self, up: bool) -> None:
        """Down: what is on its way is lost, and so is what comes."""
        self.up = up
        if not up:
            self.counts.cut += len(self._on_the_way)
            self._on_the_way.clear()
            self._line_free_ns = 0
            self._last_due_ns = 0

    def reshape(self, shape: Shape) -> None:
        """Another delay, rate, loss and queue from now on; packets stay in order. The seed stays that of the first."""
        self._shape = shape
        self._delay_ns = round(1e9 * shape.delay_s)

    def _on_the_line_ns(self, size: int) -> int:
        rate = self._shape.rate_bits_per_s
        return 0 if rate is None else round(8e9 * size / rate)

    def _waiting_bytes(self, now_ns: int) -> float:
        rate = self._shape.rate_bits_per_s
        return 0.0 if rate is None else max(0, self._line_free_ns - now_ns) * rate / 8e9
