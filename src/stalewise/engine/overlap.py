"""The forward of one batch beside the recompute and backward of another.

Within a local step they need nothing of each other (docs/methods.md, DSP): both read the same weights, and where the
graph-less forward ran on copies of the buffers, only the recompute changes them. On a device with room for both:

    main   .. U ─┬─ copies of buffers ─┬─ R j ── B j ────────────┬─ U ..      marks, not the program, wait
    lane         └───────────────────► └─ F n ─ to the link ───► ┘

F n begins after the update before it and after the copies; the update waits for F n. So every pass sees the very
values that it sees without the lane.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from torch import Tensor

from stalewise.engine.streams import Streams
from stalewise.errors import ConfigError

__all__ = ["ForwardLane", "check_overlap"]


def check_overlap(overlap: Any, *, device_type: str, distributed: bool) -> bool:
    """Whether forwards are to have a lane of their own; None: where the stage has a GPU and a process to itself.

    Raises:
        ConfigError: where it is asked for and cannot be.
    """
    if overlap is not None and not isinstance(overlap, bool):
        raise ConfigError(f"overlap is {overlap!r}; it must be True, False, or None for wherever it can be.")
    possible = device_type == "cuda" and distributed
    if overlap and not possible:
        where = f"stages are on {device_type}" if device_type != "cuda" else "one process runs all stages"
        raise ConfigError(
            f"overlap is on and {where}; the forward of one batch can only be beside the backward of another on a GPU, "
            "with a process per stage. Leave it out."
        )
    return possible if overlap is None else overlap


class ForwardLane:
    """A stream for the graph-less forwards of a stage.

    Args:
        streams: of the stage's device.
        enabled: False: forwards stay on the stream of everything else.
    """

    def __init__(self, streams: Streams, *, enabled: bool) -> None:
        self._streams = streams
        self._enabled = enabled
        self._stream = streams.side() if enabled else None
        self._pending: Any = None

    @contextmanager
    def forward(self, used: Iterable[Tensor]) -> Iterator[None]:
        """Inside, the work of a forward is queued, after all that is queued outside so far.

        Args:
            used: tensors made outside that it uses.
        """
        if not self._enabled:
            yield
            return
        begin = self._streams.mark()
        with self._streams.on(self._stream):
            self._streams.wait(begin)
            self._streams.keep(used)
            yield
            self._pending = self._streams.mark()

    def sending(self) -> AbstractContextManager[Any]:
        """Inside, outputs of forwards are handed on: a mark is one after them."""
        return self._streams.on(self._stream) if self._enabled else nullcontext()

    def join(self) -> None:
        """What is queued outside from now on comes after every forward: weights may change."""
        pending, self._pending = self._pending, None
        self._streams.wait(pending)
