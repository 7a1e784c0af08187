"""Streams of a device that does not exist: who waits for whom is recorded, and what would race is found.

Work is done at once, in the order of the program. What a device might do in another order shows in vector clocks: two
uses of the same memory, one of which writes, must be ordered by the marks that streams wait for.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from stalewise.engine.streams import Streams

MAIN = "main"
Clock = dict[str, int]


class RecordedStreams(Streams):
    """See above.

    Attributes:
        log: (stream, what it does, to what), in the order of the program.
    """

    def __init__(self) -> None:
        self.log: list[tuple[str, str, Any]] = []
        self.clocks: dict[str, Clock] = {}
        self.kept: list[tuple[str, int]] = []
        self._numbers = itertools.count()
        self._local = threading.local()

    @property
    def current(self) -> str:
        return getattr(self._local, "stream", MAIN)

    def tick(self) -> tuple[str, Clock]:
        """The next moment of the current stream."""
        clock = self.clocks.setdefault(self.current, {})
        clock[self.current] = clock.get(self.current, 0) + 1
        return self.current, dict(clock)

    def side(self) -> str:
        return f"side {next(self._numbers)}"

    @contextmanager
    def on(self, stream: str | None) -> Iterator[None]:
        before, self._local.stream = self.current, stream or self.current
        try:
            yield
        finally:
            self._local.stream = before

    def mark(self) -> Clock:
        stream, clock = self.tick()
        self.log.append((stream, "mark", clock))
        return clock

    def wait(self, mark: Clock | None) -> None:
        if mark is not None:
            self.log.append((self.current, "wait", mark))
            clock = self.clocks.setdefault(self.current, {})
            clock.update({stream: max(count, clock.get(stream, 0)) for stream, count in mark.items()})

    def settle(self, mark: Clock | None) -> None:
        if mark is not None:
            self.log.append((self.current, "settle", mark))

    def keep(self, tensors: Iterable[Tensor | None]) -> None:
        self.kept += [(self.current, storage_of(tensor)) for tensor in tensors if tensor is not None]

    def to_host(self, tensor: Tensor) -> Tensor:
        self.log.append((self.current, "to host", tensor))
        return tensor.clone()

    def to_device(self, tensor: Tensor) -> Tensor:
        self.log.append((self.current, "to device", tensor))
        return tensor.clone()


def storage_of(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


@dataclass(frozen=True)
class Use:
    """Of some memory, by an operation."""

    stream: str
    clock: Clock
    writes: bool
    operation: str
    phase: str

    def before(self, other: Use) -> bool:
        return other.clock.get(self.stream, 0) >= self.clock[self.stream]


class RaceDetector(TorchDispatchMode):
    """Watches every operation inside.

    Attributes:
        phase: what the program does now; the caller says it.
    """

    def __init__(self, streams: RecordedStreams) -> None:
        super().__init__()
        self.phase = ""
        self._streams = streams
        self.uses: dict[int, list[Use]] = {}
        self._made_on: dict[int, str] = {}
        self._alive: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        written = {
            id(given)
            for argument, given in zip(func._schema.arguments, args, strict=False)
            if argument.alias_info is not None and argument.alias_info.is_write
        }
        stream, clock = self._streams.tick()
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, Tensor):
                self._note(tensor, Use(stream, clock, id(tensor) in written, str(func), self.phase))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and storage_of(tensor) not in self.uses:
                self._made_on[storage_of(tensor)] = stream
                self._note(tensor, Use(stream, clock, True, str(func), self.phase))
        return result

    def _note(self, tensor: Tensor, use: Use) -> None:
        self._alive.append(tensor.untyped_storage())  # so that no other gets its address
        self.uses.setdefault(storage_of(tensor), []).append(use)

    def races(self) -> list[str]:
        """Pairs of uses that a device may do in either order, and memory that it may give away too early."""
        found = [
            f"{one.phase} ({one.operation}) and {other.phase} ({other.operation})"
            for uses in self.uses.values()
            for one, other in itertools.combinations(uses, 2)
            if (one.writes or other.writes) and one.stream != other.stream
            if not one.before(other) and not other.before(one)
        ]
        for storage, made_on in self._made_on.items():
            for use in self.uses[storage]:
                if use.stream != made_on and (use.stream, storage) not in self._streams.kept:
                    found.append(f"{use.phase} ({use.operation}) uses memory of {made_on} that is not kept")
        return found

    def beside(self, wanted: Callable[[Use], bool], others: Callable[[Use], bool]) -> bool:
        """Whether some operations of two kinds may be done at the same time."""
        everything = [use for uses in self.uses.values() for use in uses]
        return any(
            not one.before(other) and not other.before(one)
            for one in filter(wanted, everything)
            for other in filter(others, everything)
        )
