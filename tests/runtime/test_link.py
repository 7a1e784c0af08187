"""Senders and receivers over a network of queues in this process."""

from __future__ import annotations

import itertools
import queue
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from dist_equal import assert_equal
from stand_in_streams import RecordedStreams, storage_of
from torch import Tensor

from stalewise.errors import PeerLost, ReceiveTimeout, TransportError, WorkerError
from stalewise.runtime import link
from stalewise.runtime.link import Endpoint, Receiver, Sender
from stalewise.runtime.patience import Patience
from stalewise.runtime.wire import PAGE_BYTES, Frame, MessageKind

LONG_S = 30.0
SHORT_S = 0.05


class Network:
    """`torch.distributed` for two ranks: a queue for each group and tag. `None` in a queue: the peer is gone."""

    def __init__(self) -> None:
        self.channels: dict[tuple[Any, int], queue.Queue[Tensor | None]] = {}
        self.sent: list[tuple[Any, int]] = []
        self.received: list[tuple[Any, int]] = []
        self.open = threading.Event()
        self.open.set()
        self._lock = threading.Lock()
        self._ends: list[tuple[Sender, Receiver]] = []

    def ends(self, *, timeout_s: float = LONG_S, limit: int = 0, **changes: Any) -> tuple[Sender, Receiver]:
        """Both ends of one direction, of which this process is either."""
        values: dict[str, Any] = {
            "rank": 1,
            "name": "stage 1 (rank 1, host b, pid 7)",
            "what": "activation",
            "tag": 1,
            "plan": 5,
            "device": torch.device("cpu"),
            "group": "gloo",
        }
        end = Endpoint(**{**values, **changes})
        patience = Patience(timeout_s)
        self._ends.append((Sender(end, patience=patience), Receiver(end, patience=patience, limit=limit)))
        return self._ends[-1]

    def channel(self, group: Any, tag: int) -> queue.Queue[Tensor | None]:
        with self._lock:
            return self.channels.setdefault((group, tag), queue.Queue())

    def send(self, data: Tensor, rank: int, *, group: Any, tag: int = 0) -> None:
        self.open.wait(LONG_S)
        if data.device.type == "cpu" and data.numel() == 13:
            raise RuntimeError("Connection closed by peer")
        self.sent.append((group, data.numel()))
        self.channel(group, tag).put(data.clone())

    def recv(self, data: Tensor, rank: int, *, group: Any, tag: int = 0) -> None:
        arrived = self.channel(group, tag).get(timeout=LONG_S)
        if arrived is None:
            raise RuntimeError("Connection closed by peer")
        self.received.append((group, data.numel()))
        assert arrived.numel() == data.numel()
        assert arrived.device == data.device
        data.copy_(arrived)

    def end(self) -> None:
        """End all threads: each would find the network of the next test."""
        self.open.set()
        for sender, _ in self._ends:
            sender.close()
        for _, receiver in self._ends:
            receiver._queue.maxsize = 1 << 30
            with receiver._queue.not_full:
                receiver._queue.not_full.notify_all()
        for group, tag in itertools.product(("gloo", "nccl"), (0, 1, 2, 3)):
            self.channel(group, tag).put(None)
        for thread in threading.enumerate():
            if thread.name.startswith(("send ", "receive ")):
                thread.join(LONG_S)
                assert not thread.is_alive(), thread


@pytest.fixture
def network(monkeypatch: pytest.MonkeyPatch) -> Iterator[Network]:
    fake = Network()
    monkeypatch.setattr(link, "dist", fake)
    yield fake
    fake.end()


def activation(batch: int, *leaves: Tensor | None) -> Frame:
    return Frame(MessageKind.ACTIVATION, batch, list(leaves) or [torch.full((2,), float(batch))])


END = Frame(MessageKind.END, 3, [], flags=1)


class TestSession:
    def test_frames_arrive_in_order_and_the_thread_ends(self, network: Network) -> None:
        sender, receiver = network.ends()
        for start in (0, 4):
            receiver.open()
            for batch in range(start, start + 3):
                sender.put(activation(batch))
            sender.put(Frame(MessageKind.END, start + 3, []))
            sender.flush()
            for batch in range(start, start + 3):
                assert receiver.peek(batch).batch == batch
                assert_equal(receiver.get(batch).leaves, [torch.full((2,), float(batch))])
            assert receiver.get(start + 3).kind is MessageKind.END
            receiver.join(LONG_S)
            assert len(receiver) == 0

    def test_directions_and_pipelines_do_not_mix(self, network: Network) -> None:
        pairs = [network.ends(tag=tag) for tag in (1, 2, 3)]
        for number, (sender, receiver) in enumerate(pairs):
            receiver.open()
            sender.put(activation(0, torch.tensor(number)))
        for number, (_, receiver) in reversed(list(enumerate(pairs))):
            assert_equal(receiver.get(0).leaves, [torch.tensor(number)])

    def test_a_sender_ends_when_it_is_closed(self, network: Network) -> None:
        before = set(threading.enumerate())
        sender, receiver = network.ends()
        (thread,) = set(threading.enumerate()) - before
        receiver.open()
        sender.put(activation(0))
        sender.close()
        thread.join(LONG_S)
        assert not thread.is_alive()
        assert receiver.get(0).batch == 0


class TestErrors:
    def test_wrong_batch(self, network: Network) -> None:
        sender, receiver = network.ends()
        receiver.open()
        sender.put(activation(5))
        with pytest.raises(TransportError, match=r"activations from stage 1 \(rank 1.*is of batch 5; batch 4 is due"):
            receiver.get(4)

    def test_wrong_plan(self, network: Network) -> None:
        sender, _ = network.ends(plan=6)
        _, receiver = network.ends()
        receiver.open()
        sender.put(activation(0))
        with pytest.raises(TransportError, match="belongs to another plan"):
            receiver.get(0)

    def test_nothing_comes(self, network: Network) -> None:
        sender, receiver = network.ends(timeout_s=SHORT_S)
        receiver.open()
        with pytest.raises(ReceiveTimeout) as raised:
            receiver.get(0)
        assert str(raised.value) == (
            "got no activation of batch 0 from stage 1 (rank 1, host b, pid 7) in 0.05 s; nothing came before. Look at "
            "the log of rank 1 first; raise recv_timeout_s only if a step really takes that long."
        )
        sender.put(activation(0))
        while not len(receiver):
            pass
        receiver.get(0)
        with pytest.raises(ReceiveTimeout, match=r"batch 1 from stage 1 .* the last was 0"):
            receiver.get(1)

    def test_a_session_that_does_not_end(self, network: Network) -> None:
        _, receiver = network.ends(timeout_s=SHORT_S)
        receiver.open()
        with pytest.raises(ReceiveTimeout, match=r"stage 1 \(rank 1, host b, pid 7\) did not end its session"):
            receiver.open()

    def test_the_peer_is_gone(self, network: Network) -> None:
        sender, receiver = network.ends()
        receiver.open()
        sender.put(activation(0))
        sender.flush()
        network.channel("gloo", 1).put(None)
        receiver.get(0)
        with pytest.raises(PeerLost) as raised:
            receiver.get(1)
        assert str(raised.value).startswith(
            "stage 1 (rank 1, host b, pid 7) is gone: its connection closed while an activation of batch 1 was due"
        )

    def test_a_send_that_fails(self, network: Network) -> None:
        sender, _ = network.ends()
        sender.put(activation(0, torch.zeros(13, dtype=torch.uint8)))
        with pytest.raises(PeerLost, match=r"could not send to stage 1 \(rank 1.*Connection closed by peer"):
            sender.flush()
        with pytest.raises(PeerLost):
            sender.put(activation(1))

    def test_what_a_message_cannot_carry_is_refused_at_once(self, network: Network) -> None:
        """In `put`, where the batch and the action are known; not in the thread, where nobody would notice."""
        sender, _ = network.ends()
        with pytest.raises(TransportError, match="9 dimensions cannot cross a cut"):
            sender.put(activation(0, torch.zeros([1] * 9)))

    def test_other_errors_than_those_of_the_network_stay_what_they_are(
        self, network: Network, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        sender, receiver = network.ends()
        monkeypatch.setattr(receiver._decoder, "_leaf", _out_of_memory)
        receiver.open()
        sender.put(activation(0))
        with pytest.raises(MemoryError, match="no room"):
            receiver.get(0)


def _out_of_memory(record: Any) -> Tensor:
    raise MemoryError("no room")


class TestFlush:
    def test_it_does_not_wait_for_ever(self, network: Network) -> None:
        sender, _ = network.ends(timeout_s=SHORT_S)
        network.open.clear()
        sender.put(activation(0))
        with pytest.raises(ReceiveTimeout, match=r"stage 1 \(rank 1.*did not take an activation in 0.05 s"):
            sender.flush()

    def test_a_failure_elsewhere_wakes_it(self, network: Network) -> None:
        sender, _ = network.ends()
        network.open.clear()
        sender.put(activation(0))
        threading.Timer(SHORT_S, sender.wake, [WorkerError("rank 2 failed")]).start()
        with pytest.raises(WorkerError, match="rank 2 failed"):
            sender.flush()
        with pytest.raises(WorkerError, match="rank 2 failed"):
            sender.put(activation(1))


class TestWake:
    def test_a_waiting_get(self, network: Network) -> None:
        _, receiver = network.ends()
        receiver.open()
        threading.Timer(SHORT_S, receiver.wake, [WorkerError("rank 2 failed")]).start()
        with pytest.raises(WorkerError, match="rank 2 failed"):
            receiver.get(0)

    @pytest.mark.parametrize("limit", [0, 2])
    def test_it_passes_frames_that_wait(self, limit: int, network: Network) -> None:
        """A queue that is full does not hold up the thread that tells of the failure."""
        sender, receiver = network.ends(limit=limit)
        receiver.open()
        for batch in range(3):
            sender.put(activation(batch))
        sender.flush()
        while len(receiver) < 2:
            pass
        receiver.wake(WorkerError("rank 2 failed"))
        for _ in range(2):
            with pytest.raises(WorkerError, match="rank 2 failed"):
                receiver.get(0)


def test_a_limit_keeps_later_frames_with_the_peer(network: Network) -> None:
    sender, receiver = network.ends(limit=2)
    receiver.open()
    for batch in range(50):
        sender.put(activation(batch))
    sender.put(Frame(MessageKind.END, 50, []))
    sender.flush()
    for batch in range(50):
        assert len(receiver) <= 2
        pages = sum(size == PAGE_BYTES for _, size in network.received)
        assert pages <= batch + 2 + 1
        assert_equal(receiver.get(batch).leaves, [torch.full((2,), float(batch))])
    assert receiver.get(50).kind is MessageKind.END


class TestPayloadGroup:
    """Payloads of a device cross a group of their own; the device here is `meta`, which has shapes but no values."""

    @pytest.mark.parametrize("own_group", [True, False])
    def test_both_ends_agree_on_the_group_of_every_leaf(self, own_group: bool, network: Network) -> None:
        """Whatever a leaf's dtype: floats that stay on the host (targets), integers that are on the device (masks)."""
        if own_group:
            sender, receiver = network.ends(device=torch.device("meta"), payload_group="nccl")
        else:
            sender, receiver = network.ends()
        device = "meta" if own_group else "cpu"
        leaves = [
            torch.ones(3, 4, device=device),
            torch.ones(5, device=device, dtype=torch.int64),
            torch.ones(2, device=device, dtype=torch.complex64),
            None,
            torch.arange(6.0),
            torch.arange(7),
            torch.ones(3, 0, device=device),
        ]
        receiver.open()
        for batch in range(2):
            sender.put(activation(batch, *leaves))
        sender.put(Frame(MessageKind.END, 2, []))
        for batch in range(2):
            arrived = receiver.get(batch).leaves
            for leaf, original in zip(arrived, leaves, strict=True):
                if original is None:
                    assert leaf is None
                    continue
                assert leaf is not None
                assert (leaf.dtype, leaf.shape, leaf.device) == (original.dtype, original.shape, original.device)
                if original.device.type == "cpu":
                    assert_equal(leaf, original)
        assert receiver.get(2).kind is MessageKind.END
        by_group = {group: [size for used, size in network.sent if used == group] for group in ("gloo", "nccl")}
        assert network.received == network.sent
        if own_group:
            assert by_group == {
                "nccl": [48, 40, 16] * 2,
                "gloo": [*[PAGE_BYTES, 24, 56] * 2, PAGE_BYTES],
            }
        else:
            assert by_group["nccl"] == []

    def test_the_schema_stays_on_the_host(self, network: Network) -> None:
        sender, receiver = network.ends(device=torch.device("meta"), payload_group="nccl")
        receiver.open()
        frame = Frame(MessageKind.ACTIVATION, 0, [torch.ones(2, device="meta")], ["list", "tensor"])
        sender.put(frame)
        assert receiver.get(0).structure == ["list", "tensor"]
        assert [size for group, size in network.sent if group == "nccl"] == [8]


class TestStreams:
    """What a link asks of a device; the stand-in records it, and the program does not wait for it anywhere else."""

    def test_what_is_sent_is_in_host_memory_before_it_goes(self, network: Network) -> None:
        streams = RecordedStreams()
        sender, _ = network.ends(streams=streams)
        sender.put(activation(0, torch.ones(2, 3), torch.ones(5)))
        ready = streams.log[0]
        sender.flush()
        side, *others = {stream for stream, _, _ in streams.log[1:]}
        assert (ready[:2], others) == (("main", "mark"), [])
        assert side != "main"
        assert [(kind, what) for _, kind, what in streams.log[1:2]] == [("wait", ready[2])]
        steps = [kind for _, kind, _ in streams.log[2:]]
        assert steps == ["to host"] * 3 + ["mark", "settle", "mark", "settle"]
        assert [size for _, size in network.sent] == [PAGE_BYTES, 24, 20]

    @pytest.mark.parametrize(
        ("frame", "computed"),
        [
            (Frame(MessageKind.ACTIVATION, 0, [torch.ones(2), torch.ones(3)], [1, "tensor", "tensor"]), 1),
            (Frame(MessageKind.GRADIENT, 0, [torch.ones(2), None, torch.ones(())]), 1),
            (Frame(MessageKind.LOSS, 0, [torch.ones(())]), 0),
            (Frame(MessageKind.PROBE, 0, [torch.ones(2), torch.ones(3)]), 2),
        ],
        ids=["activation", "gradient", "loss", "probe"],
    )
    def test_what_comes_goes_to_the_device_but_for_targets_and_losses(
        self, frame: Frame, computed: int, network: Network
    ) -> None:
        streams = RecordedStreams()
        sender, receiver = network.ends(streams=streams)
        receiver.open()
        sender.put(frame)
        arrived = receiver.get(0)
        copies = [(position, entry) for position, entry in enumerate(streams.log) if entry[1] == "to device"]
        assert len(copies) == computed
        position, (stream, _, mark) = max(
            (position, entry) for position, entry in enumerate(streams.log) if entry[:2] == ("main", "wait")
        )
        made = next(index for index, entry in enumerate(streams.log) if entry[1] == "mark" and entry[2] == mark)
        assert stream == "main"
        assert all(at < made < position and own == streams.log[made][0] != "main" for at, (own, _, _) in copies)
        assert [storage for own, storage in streams.kept if own == "main"] == [
            storage_of(leaf) for leaf in arrived.leaves if leaf is not None
        ]
