"""The two sides that benchmarks compare: a method of stalewise, and a schedule of torch.distributed.pipelining.

Both train the same model from the same weights on the same batches, in the same processes, and say when their updates
ended. Slow steps on purpose (`Task.stragglers`) meet both alike: a rank's step i is slow on either side or on none.
"""

from __future__ import annotations

import copy
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleZBVZeroBubble,
)
from torch.utils.checkpoint import checkpoint

import stalewise
from stalewise.engine.brake import Brake
from stalewise.engine.split import Chain
from stalewise.methods import Method, build_method
from stalewise.models import build_model
from stalewise.plan.partition import LayerCost, partition
from stalewise.planning import measure
from stalewise.protocol.actions import Kind
from stalewise.protocol.stragglers import NO_STRAGGLERS, Stragglers
from stalewise.runtime.job import Job

Batch = tuple[Tensor, Tensor]

DISTINCT_BATCHES = 8

TORCH_TIMEOUT = timedelta(seconds=180)
"""After an error on one rank of a torch schedule, the others wait so long for its messages."""


# -- rows ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class OwnRow:
    """A method of stalewise; left out as long as `METHOD_NAMES` has no such name.

    A name of `METHOD_NAMES` that has no row gets one with the method's own defaults.

    Args:
        label: for the table.
        name: as in `METHOD_NAMES`.
        build: (stages, micro-batches) -> the method.
        micro_batched: whether it is tried with each number of micro-batches.
        channels_last: whether images lie so in memory. Torch's schedules send contiguous tensors only, so no row of
            theirs can.
        autocast: see `Pipeline`.
        compile: see `Pipeline`.
    """

    label: str
    name: str
    build: Callable[[int, int], Method]
    micro_batched: bool = False
    channels_last: bool = False
    autocast: str | None = None
    compile: bool = False


@dataclass(frozen=True, kw_only=True)
class TorchRow:
    """A schedule of torch.distributed.pipelining.

    Args:
        label: for the table.
        schedule: its class.
        parts: stages per rank.
        v_shaped: whether rank k has parts k and 2K-1-k, and not k and K+k.
        recompute: "no", "all" stages, or all "but last", which backwards what it has just forwarded.
    """

    label: str
    schedule: Callable[..., Any]
    parts: int = 1
    v_shaped: bool = False
    recompute: str = "no"
    micro_batched: bool = True


def named(
    label: str,
    name: str,
    *,
    micro_batched: bool = False,
    channels_last: bool = False,
    autocast: str | None = None,
    compile: bool = False,
    **options: Any,
) -> OwnRow:
    def build(num_stages: int, micro_batches: int) -> Method:
        own = {key: value(num_stages) if callable(value) else value for key, value in options.items()}
        if micro_batched:
            own["micro_batches"] = micro_batches
        return build_method(name, num_stages=num_stages, **own)

    details = ["channels last"] * channels_last + [autocast] * bool(autocast) + ["compiled"] * compile
    return OwnRow(
        label=", ".join([f"stalewise {label}", *map(str, details)]),
        name=name,
        build=build,
        micro_batched=micro_batched,
        channels_last=channels_last,
        autocast=autocast,
        compile=compile,
    )


def shallow(num_stages: int) -> list[int]:
    return list(range(num_stages - 1, -1, -1))


TORCH_ROWS = (
    TorchRow(label="torch GPipe", schedule=ScheduleGPipe),
    TorchRow(label="torch 1F1B", schedule=Schedule1F1B),
    TorchRow(label="torch Interleaved1F1B", schedule=ScheduleInterleaved1F1B, parts=2),
    TorchRow(label="torch ZBVZeroBubble", schedule=ScheduleZBVZeroBubble, parts=2, v_shaped=True),
    TorchRow(label="torch InterleavedZeroBubble", schedule=ScheduleInterleavedZeroBubble, parts=2),
    TorchRow(label="torch GPipe + checkpoint", schedule=ScheduleGPipe, recompute="all"),
    TorchRow(label="torch 1F1B + checkpoint", schedule=Schedule1F1B, recompute="but last"),
)


# -- sides -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """What all rows share.

    Args:
        job: whose ranks are the stages.
        model: unsplit; every side trains a copy.
        batches: that are trained on again and again.
        costs: of the layers.
        split: "stored" or "recompute": the same cuts for all rows, which suit stages that store their graphs or that
            recompute except the last; "own": for each row those that suit it.
        stragglers: steps that are slow on purpose, for all rows.
        device: of the stages of stalewise.
    """

    job: Job
    model: nn.Sequential | list[nn.Module]
    batches: list[Batch]
    costs: list[LayerCost]
    split: str
    stragglers: Stragglers = NO_STRAGGLERS
    device: str = "cpu"

    @property
    def num_stages(self) -> int:
        return self.job.world_size

    def cuts(self, recompute: Sequence[bool]) -> tuple[int, ...]:
        """Of as many stages as flags.

        Args:
            recompute: whether each stage of the row recomputes.
        """
        last = len(recompute) - 1
        if self.split == "stored" or len(recompute) > self.num_stages:
            recompute = [False] * len(recompute)
        elif self.split == "recompute":
            recompute = [stage < last for stage in range(len(recompute))]
        return partition(self.costs, recompute=recompute).cuts


def optimizer(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.01, momentum=0.9)


def loss_fn(output: Tensor, target: Tensor) -> Tensor:
    return nn.functional.cross_entropy(output, target)


def make_batches(batch_size: int) -> list[Batch]:
    """Random images and labels, the same everywhere."""
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(batch_size, 3, 32, 32, generator=generator),
            torch.randint(0, 10, (batch_size,), generator=generator),
        )
        for _ in range(DISTINCT_BATCHES)
    ]


def make_task(
    job: Job,
    model_name: str,
    batch_size: int,
    split: str,
    stragglers: Stragglers = NO_STRAGGLERS,
    device: str = "cpu",
) -> Task:
    """The same on all ranks, which time the layers all at once."""
    torch.manual_seed(0)
    model = build_model(model_name, num_classes=10)
    batches = make_batches(batch_size)
    measured = measure(
        Chain(model), batches[0], loss_fn, device=torch.device(device), job=job, num_stages=job.world_size
    )
    timed = list(measured.layers)
    return Task(job, model, batches, timed, split, stragglers, device)


class Side(ABC):
    """A row with a number of micro-batches, ready to train.

    Attributes:
        micro_batches: of a batch; 1 where it is not split.
        depth: batches in flight between two runs at most; 0 for what is synchronous.
        exact: whether its losses are those of the plain loop.
        losses: of all steps so far, on the rank that has the last stage.
    """

    cuts: tuple[int, ...]
    recomputes: str
    kept: str
    micro_batches: int
    depth: int
    exact: bool

    def __init__(self, task: Task) -> None:
        self.task = task
        self.steps = 0
        self.losses: list[float] = []

    def run(self, count: int) -> list[int]:
        """Train on the next batches; returns the ends of this rank's updates in ns."""
        batches = [self.task.batches[step % len(self.task.batches)] for step in range(self.steps, self.steps + count)]
        self.steps += count
        return self.train(batches)

    @abstractmethod
    def train(self, batches: Sequence[Batch]) -> list[int]: ...

    @abstractmethod
    def close(self) -> None: ...


class PipelineSide(Side):
    """A pipeline of stalewise, which pauses between runs with its batches in flight."""

    pipeline: stalewise.Pipeline

    def train(self, batches: Sequence[Batch]) -> list[int]:
        begin = self.task.job.clock()
        self.losses.extend(self.pipeline.train(batches, drain=False))
        own = self.pipeline.traces()[self.task.job.rank]
        return [span.end_ns for span in own if span.kind is Kind.UPDATE and span.start_ns >= begin]

    def close(self) -> None:
        self.losses.extend(self.pipeline.drain())


class OwnSide(PipelineSide):
    """A method of stalewise."""

    def __init__(
        self,
        task: Task,
        row: OwnRow,
        micro_batches: int,
        *,
        measure_memory: bool = False,
        overlap: bool | None = None,
        nonfinite_loss: Any = "stop",
    ) -> None:
        super().__init__(task)
        method = row.build(task.num_stages, micro_batches)
        program = method.program()
        stages = program.stages
        flags = [stage.recomputes for stage in stages]
        self.cuts = task.cuts(flags)
        self.recomputes = _recomputes(flags)
        self.kept = _kept_by_stalewise(method)
        self.micro_batches = stages[0].policy.micro_batches
        self.depth = program.max_lag
        self.exact = not any(method.staleness) and all(
            stage.policy.synthesizer is None and stage.policy.accumulate == 1 for stage in stages
        )
        model = copy.deepcopy(task.model)
        if row.channels_last:
            for layer in model:
                layer.to(memory_format=torch.channels_last)
        self.pipeline = stalewise.Pipeline(
            model,
            method=method,
            loss_fn=loss_fn,
            optimizer=optimizer,
            partition=self.cuts,
            device=task.device,
            overlap=overlap,
            nonfinite_loss=nonfinite_loss,
            verbose=False,
            stragglers=task.stragglers,
            autocast=row.autocast,
            compile=row.compile,
            measure_memory=measure_memory,
        )


class TorchSide(Side):
    """A schedule of torch.distributed.pipelining, in a process group of its own."""

    def __init__(self, task: Task, row: TorchRow, micro_batches: int) -> None:
        super().__init__(task)
        size = len(task.batches[0][0])
        if size % micro_batches:
            raise ValueError(f"a batch of {size} does not split into {micro_batches} equal micro-batches")
        rank, num_ranks = task.job.rank, task.num_stages
        num_parts = row.parts * num_ranks
        flags = [row.recompute != "no"] * num_parts
        if row.recompute == "but last":
            flags[-1] = False
        self.cuts = task.cuts(flags)
        self.recomputes = _recomputes(flags)
        self.micro_batches, self.depth, self.exact = micro_batches, 0, True
        places = [rank] if row.parts == 1 else [rank, num_parts - 1 - rank if row.v_shaped else rank + num_ranks]
        chain = Chain(copy.deepcopy(task.model))
        modules = [chain.build(self.cuts, place) for place in places]
        self.group = dist.new_group(backend="gloo", timeout=TORCH_TIMEOUT)
        self.slow = SlowSteps(task.stragglers, rank)
        stages = [
            SlowedStage(
                self.slow,
                Checkpointed(module) if flags[place] else module,
                place,
                num_parts,
                torch.device("cpu"),
                group=self.group,
            )
            for place, module in zip(places, modules, strict=True)
        ]
        self.schedule = row.schedule(
            stages[0] if row.parts == 1 else stages, n_microbatches=micro_batches, loss_fn=loss_fn
        )
        self.kept = _kept_by_torch(self.schedule.pipeline_order, micro_batches, row)
        self.optimizer = optimizer([parameter for module in modules for parameter in module.parameters()])
        self.is_first, self.is_last = 0 in places, num_parts - 1 in places

    def train(self, batches: Sequence[Batch]) -> list[int]:
        ends = []
        losses = []
        for inputs, targets in batches:
            parts: list[Tensor] | None = [] if self.is_last else None
            self.schedule.step(
                *([inputs] if self.is_first else []),
                target=targets if self.is_last else None,
                losses=parts,
                return_outputs=False,
            )
            with self.slow.action():
                self.optimizer.step()
                self.optimizer.zero_grad(set_to_none=True)
            self.slow.update += 1
            ends.append(time.perf_counter_ns())
            if parts:
                losses.append(torch.stack([part.detach() for part in parts]).mean())
        self.losses.extend(loss.item() for loss in losses)
        return ends

    def close(self) -> None:
        dist.destroy_process_group(self.group)


class SlowSteps:
    """Makes what torch's stages of a rank compute in a slow step take longer.

    Attributes:
        update: index of the step; counts from 0, as the local updates of stalewise do.
    """

    def __init__(self, stragglers: Stragglers, rank: int) -> None:
        self.update = 0
        self._brake = Brake(stragglers, rank, torch.device("cpu")) if stragglers else None

    @contextmanager
    def action(self) -> Iterator[None]:
        began = time.perf_counter_ns()
        yield
        if self._brake is not None:
            self._brake.hold(self.update, began)


class SlowedStage(PipelineStage):
    """torch's stage, each of whose passes is an action of the step."""

    def __init__(self, slow: SlowSteps, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._slow = slow

    def forward_one_chunk(self, *args: Any, **kwargs: Any) -> Any:
        with self._slow.action():
            return super().forward_one_chunk(*args, **kwargs)

    def backward_one_chunk(self, *args: Any, **kwargs: Any) -> Any:
        with self._slow.action():
            return super().backward_one_chunk(*args, **kwargs)

    def backward_weight_one_chunk(self, *args: Any, **kwargs: Any) -> Any:
        with self._slow.action():
            return super().backward_weight_one_chunk(*args, **kwargs)


class Checkpointed(nn.Module):
    """A stage that keeps its input alone and forwards again before its backward."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Tensor) -> Tensor:
        output: Tensor = checkpoint(self.module, *args, use_reentrant=False)
        return output


# -- what a row keeps, counted from its own order of actions ---------------------------------------------------------


def _recomputes(flags: Sequence[bool]) -> str:
    if not any(flags):
        return "-"
    return "all" if all(flags) else ",".join(str(stage) for stage, flag in enumerate(flags) if flag)


def _most_alive(begins: Iterable[bool]) -> int:
    """Things that exist at once at most, from what happens in order: one begins, or one ends."""
    alive = most = 0
    for begin in begins:
        alive += 1 if begin else -1
        most = max(most, alive)
    return most


def _joined(numbers: Iterable[float]) -> str:
    return " ".join(f"{number:.3g}" for number in numbers)


def _kept(recompute: bool, forwarded: list[float], graphs: list[float]) -> str:
    return f"inputs {_joined(forwarded)}, graph {_joined(graphs)}" if recompute else f"graphs {_joined(graphs)}"


def _kept_by_stalewise(method: Method) -> str:
    program = method.program()
    forwarded, graphs, versions = [], [], []
    for stage in program.stages:
        kinds = [action.kind for action in stage.actions(3 * program.max_lag + 3)]
        graph = Kind.RECOMPUTE if stage.recomputes else Kind.FORWARD
        for start, kept in ((Kind.FORWARD, forwarded), (graph, graphs)):
            alive = _most_alive(kind is start for kind in kinds if kind in (start, Kind.BACKWARD))
            kept.append(alive / stage.policy.micro_batches)
        stashes = stage.stores_graphs_over_updates and stage.policy.weights == "stashed"
        versions.append(1 + stage.backward_lag if stashes else 1)
    text = _kept(any(stage.recomputes for stage in program.stages), forwarded, graphs)
    return f"{text}, weights {_joined(versions)}" if max(versions) > 1 else text


def _kept_by_torch(order: dict[int, list[Any]], micro_batches: int, row: TorchRow) -> str:
    share = 1 / (micro_batches * row.parts)
    kinds = [[action.computation_type.value for action in order[rank] if action] for rank in sorted(order)]
    alive = [share * _most_alive(kind == "F" for kind in own if kind in ("F", "B", "W")) for own in kinds]
    recompute = row.recompute != "no"
    return _kept(recompute, alive, [share] * len(alive) if recompute else alive)
