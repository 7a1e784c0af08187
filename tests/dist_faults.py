"""Workers that fail on purpose: at a batch, on a stage, in one of the places where code of the user runs."""

from __future__ import annotations

import itertools
import os
import signal
import sys
import time
from collections.abc import Iterator
from functools import partial
from multiprocessing import reduction
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from dist_jobs import mark_fault
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import SGD
from torch.utils.data import DataLoader, Dataset

import stalewise
from stalewise.runtime import meeting
from stalewise.runtime.link import Receiver

FAULT_BATCH = 7


def rank() -> int:
    """Of this process."""
    return int(os.environ["RANK"])


def num_stages() -> int:
    """Of the job."""
    return int(os.environ["WORLD_SIZE"])


class Boom(Exception):
    """An error of the user's."""


class Fault:
    """Happens once, at its place, on its stage, at batch `FAULT_BATCH`.

    Args:
        folder: where its time is noted.
        place: where it happens.
        stage: whose worker it happens in.
        action: "raise", or what is done to which process.
    """

    def __init__(self, folder: str, place: str, stage: int, action: str) -> None:
        self._folder = folder
        self.place = place
        self._stage = stage
        self._action = action
        self._passes: dict[str, int] = {}

    def reached(self, place: str) -> None:
        """Called everywhere, once per batch; explodes where it is time."""
        batch = self._passes[place] = self._passes.get(place, -1) + 1
        if (place, rank(), batch) == (self.place, self._stage, FAULT_BATCH):
            self.explode()

    def reached_now(self, place: str) -> None:
        """The same for a place that is reached once."""
        if (place, rank()) == (self.place, self._stage):
            self.explode()

    def explode(self) -> None:
        """Do it."""
        mark_fault(self._folder)
        match self._action:
            case "raise":
                raise Boom(f"on rank {rank()}")
            case "exit":
                sys.exit(3)
            case "exit with a text":
                sys.exit("enough")
            case "exit well":
                sys.exit(0)
            case "vanish":
                os._exit(0)
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "stop":
                os.kill(os.getpid(), signal.SIGSTOP)
            case "interrupt":  # as the terminal does it: the whole group in the foreground
                os.killpg(os.getpgid(os.getppid()), signal.SIGINT)
            case "kill parent":
                os.kill(os.getppid(), signal.SIGKILL)
            case "terminate":
                os.kill(os.getpid(), signal.SIGTERM)
            case "wait for ever":
                while True:
                    signal.pause()
            case "be another version":
                meeting.__version__ = "0.0.1"  # type: ignore[attr-defined]
            case "terminate parent":
                os.kill(os.getppid(), signal.SIGTERM)


class _InBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor, fault: Fault) -> Tensor:
        ctx.fault = fault
        return inputs.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        ctx.fault.reached("backward")
        return gradient, None


class Layer(nn.Module):
    """A layer whose passes are places for faults."""

    def __init__(self, fault: Fault) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self._fault = fault

    def forward(self, inputs: Tensor) -> Tensor:
        if not self.training:
            self._fault.reached("evaluation")
        elif torch.is_grad_enabled() and rank() < num_stages() - 1:
            self._fault.reached("recompute")
        else:
            self._fault.reached("forward")
        return _InBackward.apply(self.linear(inputs), self._fault)


class Optimizer(SGD):
    """Its step is a place for faults."""

    fault: Fault

    def step(self, closure: Any = None) -> None:
        self.fault.reached("optimizer")
        super().step(closure)


class Samples(Dataset[tuple[Tensor, int]]):
    """Read by processes of the data loader, each of which leaves its number."""

    def __init__(self, folder: str, fault: Fault) -> None:
        self._folder = folder
        self._fault = fault

    def __len__(self) -> int:
        return 200

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        Path(self._folder, f"loader.{os.getpid()}").touch()
        if index == FAULT_BATCH * 2:
            self._fault.reached_now("loader process")
        return torch.full((6,), float(index)), index % 6


def _hand_over_late(folder: str, worker: int) -> None:
    """From the fault on, this process of a loader waits in a handshake, for its job's end or that of the other side."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    send_handle = reduction.send_handle

    def late(connection: Connection, *args: int) -> None:
        if any(Path(folder).glob("fault.*")):
            connection.poll(60.0)
        send_handle(connection, *args)

    reduction.send_handle = late


def _batches(fault: Fault) -> Iterator[tuple[Tensor, Tensor]]:
    for index in range(40) if fault.place != "endless loop" else itertools.count():
        fault.reached("data")
        yield torch.full((2, 6), float(index)), torch.tensor([0, index % 6])


def leave_early(folder: str) -> None:
    """Rank 0 leaves its loop and then the job; the others see that their loops end."""
    pipe = _plain_pipeline()
    for count, _ in enumerate(pipe.train(_plain_batches(100) if rank() == 0 else None)):
        if rank() == 0 and count == 3:
            sys.exit(0)


def leave_at_once(folder: str) -> None:
    """Training is all there is; each rank ends its part in the group as soon as its loop is over.

    Rank 0 turns to the next message late, so its group could be gone when another rank ends its session.
    """
    pipe = _plain_pipeline()
    fill = Receiver._fill

    def slow(self: Receiver, data: Tensor) -> None:
        time.sleep(0.3)
        fill(self, data)

    batches = _plain_batches(2) if rank() == 0 else None
    list(pipe.train(batches))
    if rank() == 0:
        Receiver._fill = slow
    list(pipe.train(batches))
    dist.destroy_process_group()
    sys.exit(0)


def _plain_pipeline() -> stalewise.Pipeline:
    return stalewise.Pipeline(
        [nn.Linear(6, 6) for _ in range(num_stages())],
        method=stalewise.DSP.minimal(num_stages=num_stages()),
        loss_fn=cross_entropy,
        optimizer=lambda parameters: SGD(parameters, lr=0.01),
        partition=tuple(range(1, num_stages())),
    )


def _plain_batches(count: int) -> list[tuple[Tensor, Tensor]]:
    return [(torch.ones(2, 6), torch.tensor([0, 1]))] * count


def fail(
    folder: str,
    place: str,
    stage: int,
    action: str = "raise",
    timeout_s: float = 60.0,
    start_timeout_s: float = 60.0,
) -> None:
    """Train, evaluate and look at the state; fail on the way."""
    Path(folder, f"rank.{rank()}").write_text(str(os.getpid()))
    while len(list(Path(folder).glob("rank.*"))) < num_stages():  # nobody waits long for who is well
        time.sleep(0.01)
    fault = Fault(folder, place, stage, action)
    fault.reached_now("before the pipeline")
    torch.manual_seed(0)
    Optimizer.fault = fault

    def loss_fn(output: Tensor, target: Tensor) -> Tensor:
        fault.reached("loss")
        return cross_entropy(output, target)

    def metric(output: Tensor, target: Tensor) -> float:
        fault.reached("metric")
        return 0.0

    pipe = stalewise.Pipeline(
        [Layer(fault) for _ in range(num_stages())],
        method=stalewise.DSP.minimal(num_stages=num_stages()),
        loss_fn=loss_fn,
        optimizer=lambda parameters: Optimizer(parameters, lr=0.01),
        partition=tuple(range(1, num_stages())),
        recv_timeout_s=timeout_s,
        start_timeout_s=start_timeout_s,
    )
    if "loader" in place:
        batches: Any = DataLoader(
            Samples(folder, fault),
            batch_size=2,
            num_workers=2,
            multiprocessing_context="fork",
            worker_init_fn=partial(_hand_over_late, folder) if "late" in place else None,
        )
    else:
        batches = _batches(fault)
    drain = (place, stage) != ("another drain", rank())
    for _ in pipe.train(batches if rank() == 0 else None, drain=drain):
        fault.reached("loop")
        fault.reached("loop over a loader")
        fault.reached("loop over a late loader")
        fault.reached("endless loop")
    fault.reached_now("while the others wait for all")
    pipe.state_dict()
    pipe.evaluate(_batches(fault) if rank() == 0 else None, metric)
    fault.reached_now("at the end")
