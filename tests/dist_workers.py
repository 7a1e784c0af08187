"""What the processes of the tests of the distributed engine run; each writes what it saw into a folder."""

from __future__ import annotations

import gc
import os
import queue
import socket
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar

import dist_net
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import stalewise
from stalewise.protocol.actions import Kind
from stalewise.runtime import ahead, link
from stalewise.runtime.distributed import DistributedEngine


def rank() -> int:
    """Of this process."""
    return int(os.environ["RANK"])


def save(folder: str, name: str, value: Any) -> None:
    """Leave a result for the test: `name` of this rank."""
    torch.save(value, Path(folder) / f"{name}.{rank()}.pt")


def one_leaves() -> None:
    """Rank 1 ends its process amid the training; rank 0 loses its peer."""
    pipe = dist_net.pipeline(2)
    for _ in pipe.train(dist_net.batches(30, 1) if rank() == 0 else None):
        if rank() == 1:
            sys.exit(3)


def load(folder: Path | str, name: str, num_workers: int) -> list[Any]:
    """The results of all ranks."""
    return [torch.load(Path(folder) / f"{name}.{of}.pt") for of in range(num_workers)]


# -- delays ------------------------------------------------------------------------------------------------------


class _DelayedDist:
    """torch.distributed as `link` uses it, with a random delay before every message."""

    def __init__(self, seed: int) -> None:
        self._before_send = dist_net.RandomDelay(seed)
        self._before_receive = dist_net.RandomDelay(seed + 1)

    def send(self, *args: Any, **kwargs: Any) -> None:
        self._before_send()
        dist.send(*args, **kwargs)

    def recv(self, *args: Any, **kwargs: Any) -> int | None:
        self._before_receive()
        return dist.recv(*args, **kwargs)


@contextmanager
def random_delays() -> Iterator[None]:
    """Every forward and every message of this rank takes a random time longer."""
    dist_net.Jitter.delay = dist_net.RandomDelay(1000 + rank())
    original, link.dist = link.dist, _DelayedDist(2000 + 10 * rank())
    try:
        yield
    finally:
        dist_net.Jitter.delay, link.dist = None, original


# -- bounds ------------------------------------------------------------------------------------------------------


class PeakQueue(queue.Queue[Any]):
    """A queue that knows how full it ever was."""

    created: ClassVar[list[PeakQueue]] = []

    def __init__(self, maxsize: int = 0) -> None:
        super().__init__(maxsize)
        self.peak = 0
        PeakQueue.created.append(self)

    def _put(self, item: Any) -> None:
        super()._put(item)
        self.peak = max(self.peak, self._qsize())


class _PeakQueues:
    """The module `queue` as `link` uses it."""

    Queue, Empty, Full = PeakQueue, queue.Empty, queue.Full


class Slow(nn.Module):
    """Takes 8 ms a forward on one stage of the job, none on the others."""

    stage = -1

    def __init__(self, stage: int) -> None:
        super().__init__()
        self.own_stage = stage

    def forward(self, inputs: Tensor) -> Tensor:
        if self.own_stage == Slow.stage:
            time.sleep(0.008)
        return inputs


def _three_layers() -> list[nn.Module]:
    torch.manual_seed(3)
    return [nn.Sequential(nn.Linear(6, 6), Slow(stage)) for stage in range(3)]


def _vectors(count: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(4)
    return [(torch.randn(2, 6, generator=generator), torch.tensor([0, 1])) for _ in range(count)]


def watch_bounds(folder: str) -> None:
    """Three stages, each slow in turn; what was stored, and how full the queues were."""
    link.queue = _PeakQueues
    try:
        for slow in range(3):
            Slow.stage = slow
            PeakQueue.created.clear()
            pipe = stalewise.Pipeline(
                _three_layers(),
                method=stalewise.DSP(queue=(2, 2, 0), staleness=(5, 2, 0)),
                loss_fn=cross_entropy,
                optimizer=_sgd,
                partition=(1, 2),
            )
            losses = list(pipe.train(_vectors(30) if rank() == 0 else None))
            training = [created.peak for created in PeakQueue.created]
            pipe.evaluate(_vectors(40) if rank() == 0 else None, dist_net.accuracy)
            engine = pipe._engine
            assert isinstance(engine, DistributedEngine)
            seen = {
                "num_losses": len(losses),
                "stored": engine.stage.peak_stored_inputs,
                "queues": training,
                "queues with evaluation": [created.peak for created in PeakQueue.created],
                "spans": [tuple(span) for span in _plain_spans(pipe)],
            }
            save(folder, f"bounds {slow}", seen)
    finally:
        link.queue = queue


def _plain_spans(pipe: stalewise.Pipeline) -> Iterator[tuple[str, int, int, int]]:
    links = {Kind.SEND_ACTIVATION, Kind.RECEIVE_ACTIVATION, Kind.SEND_GRADIENT, Kind.RECEIVE_GRADIENT}
    for span in pipe.traces()[pipe.rank]:
        if span.kind in links:
            yield span.kind.name, span.batch, span.start_ns, span.end_ns


# -- arguments that differ ---------------------------------------------------------------------------------------


def _sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05)


def _two(**options: Any) -> stalewise.Pipeline:
    settings = {
        "method": stalewise.DSP.minimal(num_stages=2),
        "loss_fn": cross_entropy,
        "optimizer": _sgd,
        "partition": (2,),
        **options,
    }
    return stalewise.Pipeline(settings.pop("model", _three_layers()), **settings)


def _differing() -> dict[str, Callable[[], stalewise.Pipeline]]:
    """Ways in which rank 1 can be at odds with rank 0, or all ranks with the job."""
    odd = rank() == 1
    return {
        "cuts": lambda: _two(partition=(1,) if odd else (2,)),
        "cuts and profile": lambda: _two(partition="profile" if odd else (2,)),
        "seed": lambda: _two(seed=2 if odd else 1),
        "clip_grad_norm": lambda: _two(clip_grad_norm=2.0 if odd else None),
        "method": lambda: _two(method=stalewise.BP(stages=2) if odd else stalewise.DSP.minimal(num_stages=2)),
        "staleness": lambda: _two(method=stalewise.DSP(staleness=(3 if odd else 2, 0))),
        "shape of a layer": lambda: _two(model=[nn.Linear(6, 6), nn.Linear(6, 7 if odd else 8), nn.Linear(8, 6)]),
        "number of layers": lambda: _two(model=_three_layers()[: 2 if odd else 3]),
        "stages and ranks": lambda: _two(method=stalewise.DSP.minimal(num_stages=3), partition=(1, 2)),
        "bad cuts on all": lambda: _two(partition=(7,)),
    }


def refuse_differences(folder: str) -> None:
    """Each difference is an error on this rank too, and the job goes on after it."""
    errors = {}
    for name, build in _differing().items():
        try:
            build()
        except stalewise.StalewiseError as error:
            errors[name] = [type(error).__name__, str(error)]
        else:
            errors[name] = ["no error", ""]
    save(folder, "differences", errors)


# -- memory ------------------------------------------------------------------------------------------------------


def drop_a_pipeline() -> dict[str, Any]:
    """Build, use and drop one pipeline of two; what is left of it."""
    others = set(threading.enumerate())
    dropped = _two()
    list(dropped.train(_vectors(4) if rank() == 0 else None))
    engine = dropped._engine
    assert isinstance(engine, DistributedEngine)
    module = weakref.ref(engine.stage.module)
    senders = [thread for thread in set(threading.enumerate()) - others if thread.name.startswith("send")]
    assert len(senders) == 1
    del dropped, engine
    _two()
    gc.collect()
    for thread in senders:
        thread.join(20)
    return {
        "module is freed": module() is None,
        "threads that still send": sum(thread.is_alive() for thread in senders),
    }


def long_run_between_hosts(folder: str, num_stages: int) -> None:
    """The long training run by ranks that take each other for ranks of other hosts, in many small parts."""
    torch.set_num_threads(1)
    socket.gethostname = lambda: f"host-{rank()}"
    ahead.CHUNK_BYTES, ahead.WINDOW = 1500, 3
    save(folder, "outcome", asdict(dist_net.train_long(dist_net.pipeline(num_stages))))


# -- jobs --------------------------------------------------------------------------------------------------------


def long_run(folder: str, num_stages: int) -> None:
    """The long training run under random delays; with K = 3 the bounds too."""
    torch.set_num_threads(1)
    with random_delays():
        save(folder, "outcome", asdict(dist_net.train_long(dist_net.pipeline(num_stages))))
    if num_stages == 3:
        watch_bounds(folder)


def in_a_group_of_the_users(folder: str) -> None:
    """A job whose group the user made: the long run, differing arguments, pipelines beside each other, both engines."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    long_run(folder, 2)
    refuse_differences(folder)

    alone = dist_net.pipeline(2, engine="sequential")
    sequential = list(alone.train(dist_net.batches(12, 8)))
    state = alone.state_dict()
    first, second = dist_net.pipeline(2), dist_net.pipeline(2, engine="distributed")
    data = dist_net.batches(12, 8) if rank() == 0 else dist_net.Untouchable()
    interleaved = [list(pipe.train(data)) for pipe in (first, second)]
    one_by_one = [dist_net.pipeline(2) for _ in range(3)]
    for pipe in one_by_one:
        pipe.load_state_dict(dist_net.network().state_dict())
        interleaved.append(list(pipe.train(data)))
    save(
        folder,
        "pipelines",
        {"sequential": sequential, "state": state, "runs": interleaved, "states": [p.state_dict() for p in one_by_one]},
    )

    leaving = dist_net.pipeline(2)
    losses = []
    for loss in leaving.train(dist_net.batches(20, 9) if rank() == 0 else None):
        losses.append(loss)
        if rank() == 0 and len(losses) == 5:
            break
    losses += leaving.train(dist_net.batches(3, 10) if rank() == 0 else None)
    save(folder, "rank 0 leaves", {"losses": losses, "state": leaving.state_dict()})
    save(folder, "freed", drop_a_pipeline())

    measured = dist_net.pipeline(2, partition="profile", verbose=False)
    losses = list(measured.train(data))
    save(folder, "profile", {"cuts": measured.cuts, "losses": losses, "state": measured.state_dict()})
    dist.destroy_process_group()
