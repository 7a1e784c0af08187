"""What orders the work of a device that computes while the program goes on.

A GPU has streams: what is queued on one is done in order, and streams wait for each other by events ("marks" here).
Nothing in a training step waits for the device itself:

    current stream   R j ─ B j ─ U ───────────────────►     copies from and to pinned host memory are queued like
    side stream        └ mark ─► copy to the host ─ mark    anything else; a thread waits for their mark only

On a CPU a call returns with its work done, so `Streams` itself has nothing to order.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

__all__ = ["NO_STREAMS", "CudaStreams", "Streams", "streams_of"]


class Streams:
    """Of a CPU: everything is in order already."""

    pins = False
    """Whether host memory that is copied from or to the device is to be pinned."""

    def side(self) -> Any:
        """A stream beside the others."""
        return None

    def on(self, stream: Any) -> AbstractContextManager[Any]:
        """Inside, work is queued on `stream`: it is the current one. None: as before."""
        return nullcontext()

    def mark(self) -> Any:
        """A mark at the end of what is queued on the current stream."""
        return None

    def wait(self, mark: Any) -> None:
        """Let the current stream go on only after a mark; this thread does not wait. None: at once."""

    def settle(self, mark: Any) -> None:
        """Let this thread wait for a mark."""

    def keep(self, tensors: Iterable[Tensor | None]) -> None:
        """Give the memory of tensors of other streams to nobody before what is now queued on this one is done."""

    def to_host(self, tensor: Tensor) -> Tensor:
        """A copy in pinned host memory, there after the next mark; a tensor of the host itself."""
        return tensor

    def to_device(self, tensor: Tensor) -> Tensor:
        """A copy on the device, there for what is queued next; a tensor of the device itself."""
        return tensor

    def pinned(self, tensor: Tensor) -> Tensor:
        """The same values in host memory from which copies need not wait."""
        return tensor


NO_STREAMS = Streams()


class CudaStreams(Streams):
    """Of a GPU.

    Args:
        device: with its index.
    """

    pins = True

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def side(self) -> torch.cuda.Stream:
        return torch.cuda.Stream(device=self._device)  # type: ignore[no-untyped-call]

    def on(self, stream: torch.cuda.Stream | None) -> AbstractContextManager[Any]:
        return torch.cuda.stream(stream)

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        event.record(self._current())
        return event

    def wait(self, mark: torch.cuda.Event | None) -> None:
        if mark is not None:
            self._current().wait_event(mark)

    def settle(self, mark: torch.cuda.Event | None) -> None:
        if mark is not None:
            mark.synchronize()

    def keep(self, tensors: Iterable[Tensor | None]) -> None:
        for tensor in tensors:
            if tensor is not None and tensor.device.type == "cuda":
                tensor.record_stream(self._current())

    def to_host(self, tensor: Tensor) -> Tensor:
        # Torch pins the copy of what it copies without waiting, and keeps its memory until the stream is done with it.
        return tensor.to("cpu", non_blocking=True)

    def to_device(self, tensor: Tensor) -> Tensor:
        return tensor.to(self._device, non_blocking=True)

    def pinned(self, tensor: Tensor) -> Tensor:
        return tensor.pin_memory() if tensor.device.type == "cpu" and not tensor.is_pinned() else tensor

    def _current(self) -> torch.cuda.Stream:
        return torch.cuda.current_stream(self._device)


def streams_of(device: torch.device) -> Streams:
    """Those of a device."""
    return CudaStreams(device) if device.type == "cuda" else NO_STREAMS
