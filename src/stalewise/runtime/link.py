"""One direction of a link between two ranks: a thread that sends, or a thread that receives.

Receives are always posted ahead: while a session is open, the receiving thread takes whatever the peer sends into
its queue (bounded by the program, see V8), and the stage finds it there. Sends are handed to the sending thread and
never hold the stage up. No gradients bound an evaluation: there the stage flushes before it sends, and the
receiver's queue has a limit. Host memory crosses gloo; where each stage has a GPU of its own, payloads may cross a
second group (NCCL), and only the pages gloo. A page says where each leaf was, and so which group it crosses. Between
hosts what crosses gloo is received ahead in parts (`runtime/ahead.py`).

A session ends with an END message, so no thread is left waiting on the network between sessions.
"""

from __future__ import annotations

import itertools
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from stalewise.engine.streams import NO_STREAMS, Streams
from stalewise.errors import PeerLost, ReceiveTimeout, StalewiseError, WorkerError
from stalewise.runtime.ahead import Inbox, Outbox
from stalewise.runtime.patience import Patience
from stalewise.runtime.wire import Decoder, Encoder, Frame, MessageKind

__all__ = ["Endpoint", "Receiver", "Sender"]


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """The other end of one direction of a link.

    Args:
        rank: of the peer.
        name: of the peer in errors, such as "stage 1 (rank 1, host b, pid 7)".
        what: travels here: "activation", "gradient" or "token".
        tag: tells this direction of this pipeline from all others.
        plan: hash of the job's plan.
        device: of this rank's stage.
        group: gloo, of all ranks.
        payload_group: of the two ranks, for payloads between devices; None: through host memory.
        distant: whether the peer is on another host; both ends must say the same.
        streams: of the device.
        explain: what is known of a rank that keeps this one waiting, as a sentence that follows others.
    """

    rank: int
    name: str
    what: str
    tag: int
    plan: int
    device: torch.device
    group: dist.ProcessGroup
    payload_group: dist.ProcessGroup | None = None
    distant: bool = False
    streams: Streams = NO_STREAMS
    explain: Callable[[int], str] = lambda rank: ""

    def late(self, what: str) -> ReceiveTimeout:
        """The error for a peer that keeps this rank waiting.

        Args:
            what: it did not do, and for how long.
        """
        return ReceiveTimeout(
            f"{what}{self.explain(self.rank)} Look at the log of rank {self.rank} first; raise recv_timeout_s only if "
            "a step really takes that long."
        )


class Sender:
    """Sends frames in order from a thread of its own.

    Args:
        endpoint: the peer.
        patience: how long `flush` waits.
    """

    def __init__(self, endpoint: Endpoint, *, patience: Patience) -> None:
        self._endpoint = endpoint
        self._patience = patience
        self._encoder = Encoder(endpoint.plan)
        self._outbox = Outbox(endpoint.rank, endpoint.group, endpoint.tag) if endpoint.distant else None
        self._queue: queue.Queue[tuple[list[Tensor], Any, bool] | None] = queue.Queue()
        self._sending: list[Tensor] = []
        self._error: BaseException | None = None
        self._stream = endpoint.streams.side()
        threading.Thread(target=self._run, name=f"send {endpoint.what}", daemon=True).start()

    def put(self, frame: Frame) -> None:
        """Hand over a frame; its tensors must not change any more. Does not block.

        Raises:
            TransportError: where a message cannot carry the frame.
            PeerLost: where an earlier frame could not be sent.
        """
        self._raise_error()
        ends = frame.kind is MessageKind.END
        self._queue.put((list(self._encoder.encode(frame)), self._endpoint.streams.mark(), ends))

    def flush(self) -> None:
        """Wait until everything handed over is sent.

        Raises:
            ReceiveTimeout: where the peer did not take it in time.
            PeerLost: where the peer is gone.
            WorkerError: where another worker failed.
        """
        allowed_s = self._patience.message_s
        with self._queue.all_tasks_done:
            ended = any(
                self._queue.all_tasks_done.wait_for(
                    lambda: not self._queue.unfinished_tasks or self._error is not None, slice_s
                )
                for slice_s in self._patience.waits()
            )
        self._raise_error()
        if not ended:
            raise self._endpoint.late(
                f"{self._endpoint.name} did not take an {self._endpoint.what} in {allowed_s:.4g} s."
            )

    def wake(self, error: WorkerError) -> None:
        """Make a waiting `flush`, and every later `put`, raise."""
        with self._queue.all_tasks_done:
            self._error = self._error or error
            self._queue.all_tasks_done.notify_all()

    def held(self) -> list[Tensor]:
        """What was handed over and is not sent yet, as it is now; any thread may send meanwhile."""
        with self._queue.mutex:
            waiting = [item[0] for item in self._queue.queue if item is not None]
        return [data for message in (self._sending, *waiting) for data in message]

    def close(self) -> None:
        """End the thread after what was handed over."""
        self._queue.put(None)

    def _raise_error(self) -> None:
        if isinstance(self._error, StalewiseError):
            raise self._error
        if self._error is not None:
            raise PeerLost(
                f"could not send to {self._endpoint.name}: {self._error}. Look at the log of rank "
                f"{self._endpoint.rank} first."
            ) from self._error

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            self._sending = item[0]
            try:
                if self._error is None:
                    self._send(*item)
            except BaseException as error:
                self._error = error
            finally:
                self._sending = []
                del item
                self._queue.task_done()

    def _send(self, message: list[Tensor], ready: Any, ends: bool) -> None:
        end, streams = self._endpoint, self._endpoint.streams
        with streams.on(self._stream):
            streams.wait(ready)
            through_host = end.payload_group is None
            message = [streams.to_host(data) if through_host else data for data in message]
            # What goes through host memory, a loss on its way down included, is there only after this.
            streams.settle(streams.mark())
            for data in message:
                if data.device.type != "cpu" and end.payload_group is not None:
                    dist.send(data, end.rank, group=end.payload_group)
                elif self._outbox is not None:
                    self._outbox.send(data)
                else:
                    dist.send(data, end.rank, group=end.group, tag=end.tag)
            streams.settle(streams.mark())
        if ends and self._outbox is not None:
            self._outbox.end()


class Receiver:
    """Receives frames into a queue from a thread of its own, a session at a time.

    Args:
        endpoint: the peer.
        patience: how long `get` waits for a frame.
        limit: frames that may wait; the peer's later ones stay with the peer. 0: no limit.
        arrivals: set whenever something comes, a failure included, or None.
    """

    def __init__(
        self, endpoint: Endpoint, *, patience: Patience, limit: int = 0, arrivals: threading.Event | None = None
    ) -> None:
        self._endpoint = endpoint
        self._patience = patience
        host_or_device = endpoint.device if endpoint.payload_group is not None else torch.device("cpu")
        self._decoder = Decoder(
            endpoint.plan,
            self._fill,
            host_or_device,
            f"{endpoint.what}s from {endpoint.name}",
            pins=endpoint.streams.pins,
        )
        self._inbox = Inbox(endpoint.rank, endpoint.group, endpoint.tag) if endpoint.distant else None
        self._queue: queue.Queue[tuple[Frame, Any] | BaseException] = queue.Queue(limit)
        self._arrivals = threading.Event() if arrivals is None else arrivals
        self._cause: WorkerError | None = None
        self._stream = endpoint.streams.side()
        self._thread: threading.Thread | None = None
        self._heads: deque[Frame] = deque()
        self._last_batch: int | None = None

    def open(self) -> None:
        """Begin a session: receive until the peer's END."""
        self._wait_for_end()
        self._thread = threading.Thread(target=self._run, name=f"receive {self._endpoint.what}", daemon=True)
        self._thread.start()

    def join(self, timeout_s: float) -> None:
        """Wait for the END of the session."""
        if self._thread is not None:
            self._thread.join(timeout_s)

    def after_end(self) -> list[Frame]:
        """Between sessions, all that came and was not taken yet; it stays."""
        self._wait_for_end()
        with self._queue.mutex:
            waiting = [item[0] for item in self._queue.queue if not isinstance(item, BaseException)]
        return [*self._heads, *waiting]

    def wake(self, error: WorkerError) -> None:
        """Make a waiting `get`, and every later one, raise."""
        self._cause = error
        with suppress(queue.Full):
            self._queue.put_nowait(error)
        self._arrivals.set()

    def __len__(self) -> int:
        """Frames that wait in the queue."""
        return self._queue.qsize()

    def held(self) -> list[Tensor]:
        """What came and was not taken yet, as it is now."""
        with self._queue.mutex:
            waiting = [item[0] for item in self._queue.queue if not isinstance(item, BaseException)]
        return [leaf for frame in (*self._heads, *waiting) for leaf in frame.leaves if leaf is not None]

    def has_any(self) -> bool:
        """Whether `peek` would return, or raise, at once."""
        return bool(self._heads) or self._queue.qsize() > 0

    def count(self, kind: MessageKind) -> int:
        """Frames of a kind that wait."""
        with self._queue.mutex:
            waiting = [item[0] for item in self._queue.queue if not isinstance(item, BaseException)]
        return sum(frame.kind is kind for frame in (*self._heads, *waiting))

    def check(self, batch: int) -> None:
        """Raise what ended the link, where nothing that came before is left. See `get`."""
        if self._cause is not None:
            raise self._cause
        with self._queue.mutex:
            ended = bool(self._queue.queue) and isinstance(self._queue.queue[0], BaseException)
        if ended and not self._heads:
            self.peek(batch)

    def peek(self, batch: int) -> Frame:
        """The next frame, which stays; waits for it. See `get`."""
        if not self._heads:
            self._heads.append(self._take(batch))
        return self._heads[0]

    def get(self, batch: int) -> Frame:
        """The frame of a batch.

        Raises:
            TransportError: where the next frame is of another batch.
            ReceiveTimeout: where none came in time.
            PeerLost: where the peer is gone.
            WorkerError: where another worker failed.
        """
        frame = self.peek(batch)
        self._heads.popleft()
        if frame.batch != batch:
            raise self._decoder._error(f"is of batch {frame.batch}; batch {batch} is due")
        self._last_batch = frame.batch
        return frame

    def skip(self) -> None:
        """Drop the frame that `peek` showed."""
        self._heads.popleft()

    def ahead(self, batch: int) -> Iterator[Frame]:
        """The next frames, which all stay; waits for each. See `get`."""
        for position in itertools.count():
            if position == len(self._heads):
                self._heads.append(self._take(batch))
            yield self._heads[position]

    def preload(self, frames: Iterable[Frame]) -> None:
        """Put frames before all that will come."""
        self._heads.extend(frames)

    def get_of_kind(self, kind: MessageKind, batch: int) -> Frame:
        """The first frame of a kind; those before it stay, in their order. See `get`."""
        while (frame := self._take(batch)).kind is not kind:
            self._heads.append(frame)
        return frame

    def _wait_for_end(self) -> None:
        if self._thread is not None:
            allowed_s = self._patience.message_s
            for slice_s in self._patience.waits():
                self._thread.join(slice_s)
                if not self._thread.is_alive():
                    break
            else:
                raise self._endpoint.late(f"{self._endpoint.name} did not end its session in {allowed_s:.4g} s.")

    def _take(self, batch: int) -> Frame:
        end = self._endpoint
        if self._cause is not None:
            raise self._cause
        allowed_s = self._patience.message_s
        for slice_s in self._patience.waits():
            with suppress(queue.Empty):
                item = self._queue.get(timeout=slice_s)
                break
        else:
            last = "nothing came before" if self._last_batch is None else f"the last was {self._last_batch}"
            raise end.late(f"got no {end.what} of batch {batch} from {end.name} in {allowed_s:.4g} s; {last}.")
        if isinstance(item, ConnectionError):
            raise PeerLost(
                f"{end.name} is gone: its connection closed while an {end.what} of batch {batch} was due "
                f"({item}). It was killed or it crashed; look at the log of rank {end.rank} first."
            ) from item
        if isinstance(item, BaseException):
            raise item
        frame, ready = item
        end.streams.wait(ready)
        end.streams.keep(frame.leaves)
        return frame

    def _run(self) -> None:
        try:
            if self._inbox is not None:
                with _losing_the_peer():
                    self._inbox.open()
            streams = self._endpoint.streams
            with streams.on(self._stream):
                while True:
                    frame = self._decoder.next()
                    leaves = [*map(self._on_device, frame.leaves[: frame.computed]), *frame.leaves[frame.computed :]]
                    frame = replace(frame, leaves=leaves)
                    if frame.kind is MessageKind.END and self._inbox is not None:
                        with _losing_the_peer():
                            self._inbox.end()
                    self._queue.put((frame, streams.mark()))
                    self._arrivals.set()
                    if frame.kind is MessageKind.END:
                        return
        except BaseException as error:
            self._queue.put(error)
            self._arrivals.set()

    def _on_device(self, leaf: Tensor | None) -> Tensor | None:
        return None if leaf is None else self._endpoint.streams.to_device(leaf)

    def _fill(self, data: Tensor) -> None:
        end = self._endpoint
        with _losing_the_peer():
            if data.device.type != "cpu":
                dist.recv(data, end.rank, group=end.payload_group)
            elif self._inbox is not None:
                self._inbox.fill(data)
            else:
                dist.recv(data, end.rank, group=end.group, tag=end.tag)


@contextmanager
def _losing_the_peer() -> Iterator[None]:
    """Inside, torch's errors are those of a connection."""
    try:
        yield
    except RuntimeError as error:
        raise ConnectionError(str(error)) from error
