"""What a link does to packets, at exact times."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tools.shaping import Direction, Shape

MS = 1_000_000


def arrivals(direction: Direction, until_ns: int) -> list[tuple[int, bytes]]:
    """Time and packet of all that arrives."""
    found = []
    while direction.next_ns is not None and direction.next_ns <= until_ns:
        now = direction.next_ns
        found += [(now, packet) for packet in direction.due(now)]
    return found


def test_delay() -> None:
    direction = Direction(Shape(delay_s=0.02), "there")
    direction.offer(b"one", 5 * MS)
    direction.offer(b"two", 6 * MS)
    assert list(direction.due(25 * MS - 1)) == []
    assert arrivals(direction, 99 * MS) == [(25 * MS, b"one"), (26 * MS, b"two")]


def test_rate() -> None:
    """8 Mbit/s: 1000 bytes take a millisecond; an idle line saves nothing up."""
    direction = Direction(Shape(delay_s=0.01, rate_bits_per_s=8e6), "there")
    for _ in range(3):
        direction.offer(bytes(1000), 0)
    direction.offer(bytes(2000), 50 * MS)
    assert [time for time, _ in arrivals(direction, 99 * MS)] == [11 * MS, 12 * MS, 13 * MS, 62 * MS]


def test_a_full_queue_loses_what_comes() -> None:
    direction = Direction(Shape(rate_bits_per_s=8e6, queue_bytes=2500), "there")
    for index in range(4):
        direction.offer(bytes([index]) * 1000, 0)
    direction.offer(b"\4" * 1000, 1 * MS)
    assert [packet[0] for _, packet in arrivals(direction, 99 * MS)] == [0, 1, 4]
    assert direction.counts.as_json() == {"delivered": 3, "lost": 0, "overflowed": 2, "cut": 0}


def survivors(shape: Shape, name: str, count: int) -> list[int]:
    direction = Direction(shape, name)
    for index in range(count):
        direction.offer(index.to_bytes(4), 0)
    return [int.from_bytes(packet) for packet in direction.due(0)]


def test_loss_by_seed() -> None:
    shape = Shape(loss=0.05, seed=3)
    kept = survivors(shape, "there", 10_000)
    assert 9_400 < len(kept) < 9_600
    assert kept == survivors(shape, "there", 10_000)
    assert kept != survivors(shape, "back", 10_000)
    assert kept != survivors(Shape(loss=0.05, seed=4), "there", 10_000)
    assert survivors(Shape(), "there", 100) == list(range(100))
    assert survivors(Shape(loss=1.0), "there", 100) == []


def test_down_loses_what_is_on_its_way_and_what_comes() -> None:
    direction = Direction(Shape(delay_s=0.01, rate_bits_per_s=8e6), "there")
    direction.offer(bytes(1000), 0)
    direction.switch(up=False)
    direction.offer(bytes(1000), 1 * MS)
    assert direction.next_ns is None
    direction.switch(up=True)
    direction.offer(b"x" * 1000, 2 * MS)
    assert arrivals(direction, 99 * MS) == [(13 * MS, b"x" * 1000)]
    assert direction.counts.as_json() == {"delivered": 1, "lost": 0, "overflowed": 0, "cut": 2}


def test_another_shape_keeps_the_order() -> None:
    direction = Direction(Shape(delay_s=0.02), "there")
    direction.offer(b"slow", 0)
    direction.reshape(Shape())
    direction.offer(b"behind it", 1 * MS)
    assert arrivals(direction, 20 * MS - 1) == []
    assert arrivals(direction, 99 * MS) == [(20 * MS, b"slow"), (20 * MS, b"behind it")]
    direction.offer(b"quick", 30 * MS)
    assert arrivals(direction, 99 * MS) == [(30 * MS, b"quick")]


def test_being_down_moves_no_loss_to_another_packet() -> None:
    direction = Direction(Shape(loss=0.3), "there")
    kept = []
    for index in range(200):
        direction.switch(up=not 50 <= index < 60)
        direction.offer(index.to_bytes(4), 0)
        kept += [int.from_bytes(packet) for packet in direction.due(0)]
    assert kept == [index for index in survivors(Shape(loss=0.3), "there", 200) if not 50 <= index < 60]


@settings(max_examples=50)
@given(
    offers=st.lists(st.tuples(st.integers(0, 10 * MS), st.integers(1, 3000)), max_size=40),
    shape=st.builds(
        Shape,
        delay_s=st.floats(0, 0.1),
        rate_bits_per_s=st.none() | st.floats(1e5, 1e9),
        loss=st.floats(0, 1),
        queue_bytes=st.integers(0, 20_000),
    ),
)
def test_order_and_account(offers: list[tuple[int, int]], shape: Shape) -> None:
    """Packets arrive in order, none before its time on the line and its delay, and each is counted once."""
    direction = Direction(shape, "there")
    now = 0
    offered = []
    for index, (gap, size) in enumerate(offers):
        now += gap
        packet = index.to_bytes(2) + bytes(size)
        offered.append(now)
        direction.offer(packet, now)
    found = arrivals(direction, 1 << 62)
    indices = [int.from_bytes(packet[:2]) for _, packet in found]
    assert indices == sorted(set(indices))
    for (time, packet), index in zip(found, indices, strict=True):
        on_the_line = 8 * len(packet) / shape.rate_bits_per_s if shape.rate_bits_per_s else 0.0
        assert time >= offered[index] + 1e9 * (shape.delay_s + on_the_line) - 1
    assert sum(direction.counts.as_json().values()) == len(offers)


@pytest.mark.parametrize("wrong", [{"delay_s": -1.0}, {"loss": 1.5}, {"rate_bits_per_s": 0.0}])
def test_impossible_links(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="is no link"):
        Shape(**wrong)
