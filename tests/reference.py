"""A straight-line reference of DSP: what docs/methods.md says of its steps, with nothing else of the project.

One loop over local steps n, the same n for all stages: lines 1 and 2 of every stage, first to last, so that
each finds its activation; then lines 3 and 4 of every stage, last to first, so that each finds its gradient.
(Stage k wants the gradient of batch j in step j + m_k; stage k+1 makes it in step j + m_{k+1}, which is not
later: with slack 0 it is the same step, and the order last to first serves it.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


@dataclass(frozen=True)
class ReferenceResult:
    """Losses in batch order, and one optimizer per stage (None for a stage with nothing to train)."""

    losses: list[float]
    optimizers: list[Optimizer | None]


def train_reference(
    layers: list[nn.Module],
    cuts: tuple[int, ...],
    staleness: tuple[int, ...],
    batches: list[tuple[Tensor, Tensor]],
    loss_fn: Callable[[Tensor, Tensor], Tensor],
    make_optimizer: Callable[[list[nn.Parameter]], Optimizer],
    make_scheduler: Callable[[Optimizer], torch.optim.lr_scheduler.LRScheduler] | None = None,
    *,
    drains: tuple[int, ...] = (),
    clip_grad_norm: float | None = None,
    pass_context: Callable[[int, int], AbstractContextManager[object]] | None = None,
) -> ReferenceResult:
    """Train ``layers`` in place by DSP, one pass over ``batches``.

    Args:
        layers: All layers in order, in the mode (train or eval) in which they shall run.
        cuts: Index of the first layer of stages 1, 2, ...: (2, 4) makes stage 0 of ``layers[:2]``.
        staleness: m_k of every stage; does not grow, the last one is 0.
        batches: (input, target) of every batch; the index in this list is the global batch index.
        loss_fn: Maps (output, target) to a scalar.
        make_optimizer: Called once per stage with its parameters that require a gradient, if there are any.
        make_scheduler: Called once per optimizer; stepped after each update of its stage.
        drains: Batch counts after which the pipeline is drained; at the end it always is.
        clip_grad_norm: Largest gradient norm, of each stage by itself.
        pass_context: Maps (stage, batch) to a context around each forward and each recompute (not the loss).
    """
    num_batches, last, edges = len(batches), len(cuts), [0, *cuts, len(layers)]
    if any(low >= high for low, high in pairwise(edges)) or not set(drains) <= set(range(num_batches + 1)):
        raise ValueError(f"cuts {cuts}, drains {drains}: {len(layers)} layers, {num_batches} batches")
    if len(staleness) != last + 1 or staleness[-1] != 0 or any(a < b for a, b in pairwise(staleness)):
        raise ValueError(f"staleness {staleness} must have {last + 1} entries, never grow and end with 0")
    stages = [nn.Sequential(*layers[low:high]) for low, high in pairwise(edges)]
    params = [[p for p in stage.parameters() if p.requires_grad] for stage in stages]
    optimizers = [make_optimizer(p) if p else None for p in params]
    schedulers = [make_scheduler(o) if o and make_scheduler else None for o in optimizers]
    context = pass_context or (lambda stage, batch: nullcontext())
    losses: list[float] = []
    # What waits, by [stage][batch]: stored inputs, outputs with graph (where m_k = 0), gradients of outputs.
    inputs: list[list[Tensor | None]] = [[None] * num_batches for _ in stages]
    graphs: list[list[Tensor | None]] = [[None] * num_batches for _ in stages]
    gradients: list[list[Tensor | None]] = [[None] * num_batches for _ in stages]

    def run_with_graph(k: int, batch: int) -> Tensor:
        inputs[k][batch].requires_grad_(k > 0)
        with context(k, batch):
            return stages[k](inputs[k][batch].clone())  # a clone, for the first layer may work in place

    for start, end in pairwise(sorted({0, *drains, num_batches})):  # n counts anew after each drain
        for n in range(end - start + staleness[0]):
            if start + n < end:
                batch, h = start + n, batches[start + n][0]
                for k, stage in enumerate(stages):
                    inputs[k][batch] = h.detach()  # line 1
                    if staleness[k] == 0:  # lines 2 and 3 in one pass
                        graphs[k][batch] = run_with_graph(k, batch)
                        h = graphs[k][batch].detach()
                    else:  # line 2
                        with context(k, batch), torch.no_grad(), buffers_kept(stage):
                            h = stage(inputs[k][batch].clone())
            for k in reversed(range(last + 1)):
                batch = start + n - staleness[k]
                if not start <= batch < end:
                    continue
                z = graphs[k][batch] if staleness[k] == 0 else run_with_graph(k, batch)  # line 3
                if k == last:
                    z = loss_fn(z, batches[batch][1])
                    losses.append(z.item())
                assert k == last or gradients[k][batch] is not None, f"stage {k} batch {batch}: no gradient"
                if optimizers[k] is not None:
                    optimizers[k].zero_grad()
                if z.requires_grad:  # all but a stage 0 with nothing to train
                    z.backward(gradients[k][batch])  # None at the last stage: the loss starts with 1
                if k > 0:
                    gradients[k - 1][batch] = inputs[k][batch].grad
                inputs[k][batch] = graphs[k][batch] = gradients[k][batch] = None
                if optimizers[k] is not None:  # line 4
                    if clip_grad_norm is not None:
                        torch.nn.utils.clip_grad_norm_(params[k], clip_grad_norm)
                    optimizers[k].step()
                if schedulers[k] is not None:
                    schedulers[k].step()
    return ReferenceResult(losses, optimizers)


@contextmanager
def buffers_kept(stage: nn.Module) -> Iterator[None]:
    """Leave the stage's buffers as they were (BatchNorm statistics, after a forward without a graph)."""
    saved = [(buffer, buffer.clone()) for buffer in stage.buffers()]
    yield
    for buffer, value in saved:
        buffer.copy_(value)
