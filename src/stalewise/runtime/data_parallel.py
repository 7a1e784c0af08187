"""Data parallelism, a baseline for pipelines: every rank holds the whole model and works on a part of each batch.

    rank 0   samples  0 .. 21 of batch n   forward, backward ─┐
    rank 1   samples 22 .. 42              forward, backward ─┼─ all-reduce of the gradients ─► the same update
    rank 2   samples 43 .. 63              forward, backward ─┘

torch's DistributedDataParallel averages gradients over ranks with equal weight. Parts differ in size by up to one
sample, so the loss of a part is weighted: the update is that of the batch's mean loss, whatever the sizes. BatchNorm
alone differs from one process: each rank normalises with the statistics of its own part, and the running ones are
those of rank 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from stalewise.engine.compiled import call_of, check_backend
from stalewise.engine.precision import FULL_PRECISION, Precision
from stalewise.runtime.exchange import all_gather_json
from stalewise.runtime.job import current_job
from stalewise.runtime.payload import nccl_fits

__all__ = ["DataParallel"]

_Batch = tuple[Tensor, Tensor]


class DataParallel:
    """Trains a model on all ranks of a launched job; every method is collective.

    Args:
        model: the whole model; the weights of rank 0 count.
        loss_fn: (output, target) -> the mean loss over the samples.
        optimizer: parameters -> optimizer, the same on every rank.
        lr_scheduler: optimizer -> scheduler, stepped once per batch.
        device: of this rank.
        seed: of random layers; each rank draws its own numbers.
        clip_grad_norm: largest 2-norm of the model's gradient.
        precision: of forward and loss.
        compile: backend of `torch.compile` for the model; None: not compiled.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        loss_fn: Callable[[Tensor, Tensor], Tensor],
        optimizer: Callable[[Any], Optimizer],
        lr_scheduler: Callable[[Optimizer], LRScheduler] | None = None,
        device: torch.device,
        seed: int = 0,
        clip_grad_norm: float | None = None,
        precision: Precision = FULL_PRECISION,
        compile: str | None = None,
    ) -> None:
        self._job = current_job()
        self._device = device
        self._module = model.to(self._device)
        self._parallel = DistributedDataParallel(
            self._module, process_group=self._gradient_group(), gradient_as_bucket_view=True
        )
        check_backend(compile, self._device)
        self._call = call_of(self._parallel, compile)
        self._loss_fn = loss_fn
        self._precision = precision
        self._optimizer = optimizer(self._module.parameters())
        self._scheduler = None if lr_scheduler is None else lr_scheduler(self._optimizer)
        self._clip_grad_norm = clip_grad_norm
        torch.manual_seed(seed + self._job.rank)

    @property
    def rank(self) -> int:
        """Of this process."""
        return self._job.rank

    def gather(self, value: Any) -> list[Any]:
        """The JSON values of all ranks, in order, on every rank."""
        return all_gather_json(value, self._job.group)

    @property
    def device(self) -> str:
        """Of this rank."""
        return str(self._device)

    @property
    def learning_rate(self) -> float:
        """Of the next update."""
        return float(self._optimizer.param_groups[0]["lr"])

    def train(self, batches: Iterable[_Batch]) -> Iterator[float]:
        """Train on batches and yield their mean losses, the same on every rank.

        Args:
            batches: of (input, target), the same whole batches on every rank; each rank takes its part.
        """
        for inputs, targets in batches:
            samples = len(targets)
            part = self._part(inputs), self._part(targets)
            held = len(part[1])
            self._optimizer.zero_grad(set_to_none=True)
            loss = self._loss(*part) if held else self._nothing(inputs)
            weight = held / samples
            (loss * (weight * self._job.world_size)).backward()  # type: ignore[no-untyped-call]
            if self._clip_grad_norm is not None:
                nn.utils.clip_grad_norm_(self._module.parameters(), self._clip_grad_norm)
            self._optimizer.step()
            if self._scheduler is not None:
                self._scheduler.step()
            yield self._sum(loss.item() * weight if held else 0.0)

    def evaluate(self, batches: Iterable[_Batch], metric: Callable[[Tensor, Tensor], Tensor]) -> float:
        """The mean of a metric over all samples, in eval mode, on every rank.

        Args:
            batches: as for `train`.
            metric: (output, target) -> the mean over the samples.
        """
        for buffer in self._module.buffers():
            # Rank 0's running statistics are the model's; the others' are of their own parts.
            dist.broadcast(buffer, 0, group=self._job.group)
        self._module.eval()
        total = samples = 0.0
        with torch.inference_mode():
            for inputs, targets in batches:
                part = self._part(inputs), self._part(targets)
                if held := len(part[1]):
                    with self._precision.region(self._device):
                        total += float(metric(self._module(part[0]), part[1])) * held
                samples += len(targets)
        self._module.train()
        return self._sum(total) / samples

    def state_dict(self) -> dict[str, Tensor]:
        """CPU copies of this rank's parameters and buffers, by the names of the model; rank 0's are the result."""
        return {name: value.detach().cpu().clone() for name, value in self._module.state_dict().items()}

    def _part(self, values: Tensor) -> Tensor:
        """This rank's samples: the first ranks get one more where the division leaves a rest."""
        return values.tensor_split(self._job.world_size)[self._job.rank].to(self._device)

    def _loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        with self._precision.region(self._device):
            return self._loss_fn(self._call(inputs), targets)

    def _nothing(self, inputs: Tensor) -> Tensor:
        """A zero that depends on every weight: a rank without samples still takes part in the all-reduce.

        In eval mode, because a normalisation over batches would refuse a made-up sample, or count it.
        """
        self._module.eval()
        with self._precision.region(self._device):
            zero: Tensor = 0.0 * self._parallel(torch.zeros_like(inputs[:1]).to(self._device)).sum()
        self._module.train()
        return zero

    def _gradient_group(self) -> dist.ProcessGroup:
        """NCCL where every rank has a GPU to itself; else the job's own group, through host memory."""
        if not nccl_fits(self._job, self._device):
            return self._job.group
        group: dist.ProcessGroup = dist.new_group(backend="nccl")
        return group

    def _sum(self, value: float) -> float:
        """The sum over ranks."""
        total = torch.tensor([value], dtype=torch.float64)
        dist.all_reduce(total, group=self._job.group)
        return total.item()
