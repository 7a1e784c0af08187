"""What a rank makes of values and tensors that others announce."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from stalewise.errors import TransportError
from stalewise.runtime.exchange import MAX_JSON_BYTES, broadcast_json, broadcast_tensors

GROUP: Any = None
Comes = Callable[..., list[Tensor]]


def number(value: int) -> Tensor:
    return torch.tensor([value], dtype=torch.int64)


def text(data: bytes) -> list[Tensor]:
    return [number(len(data)), torch.frombuffer(bytearray(data), dtype=torch.uint8)]


@pytest.fixture
def comes(monkeypatch: pytest.MonkeyPatch) -> Comes:
    """Sets what rank 1 broadcasts; this is rank 0."""
    messages: list[Tensor] = []

    def broadcast(received: Tensor, source: int, group: Any) -> None:
        received.copy_(messages.pop(0))

    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    monkeypatch.setattr(dist, "broadcast", broadcast)
    return lambda *sent: (messages.extend(sent), messages)[1]


def test_a_value(comes: Comes) -> None:
    left = comes(*text(b'{"a": [1, null]}'))
    assert broadcast_json(None, 1, GROUP) == {"a": [1, None]}
    assert left == []


@pytest.mark.parametrize("size", [0, -1, MAX_JSON_BYTES + 1, 2**62])
def test_a_size_that_no_value_has(size: int, comes: Comes) -> None:
    comes(number(size))
    with pytest.raises(TransportError, match=rf"rank 1 announces a value of {size} bytes"):
        broadcast_json(None, 1, GROUP)


@pytest.mark.parametrize("data", [b"\x80\x04K\x01.", b"nonsense", b"[" * 100_000])
def test_bytes_that_are_no_value(data: bytes, comes: Comes) -> None:
    comes(*text(data))
    with pytest.raises(TransportError, match="rank 1 sent a value that is not JSON"):
        broadcast_json(None, 1, GROUP)


def test_tensors(comes: Comes) -> None:
    value = torch.arange(6, dtype=torch.float64).reshape(2, 3)
    left = comes(*text(json.dumps([["w", "float64", [2, 3]]]).encode()), value.view(-1).view(torch.uint8))
    assert torch.equal(broadcast_tensors(None, 1, GROUP)["w"], value)
    assert left == []


@pytest.mark.parametrize(
    "described",
    [
        ["w", "load", [1]],
        ["w", "nn", [1]],
        ["w", 3, [1]],
        ["w", "float32", [-1]],
        ["w", "float32", [1.5]],
        ["w", "float32", "all"],
        ["w", "float32", [2**40, 2**40]],
    ],
)
def test_tensors_that_none_can_be(described: list[Any], comes: Comes) -> None:
    comes(*text(json.dumps([described]).encode()))
    with pytest.raises(TransportError, match="rank 1 announces a tensor of"):
        broadcast_tensors(None, 1, GROUP)
