"""Straight-line references of the methods that DSP is compared with.

A method is called with the fields of ``Task``, by position or keyword, and keywords of its own; it trains the
layers in place, one pass over the batches. It is a choice of passes (how a stage forwards a batch and, later,
backwards it) and of a staleness. ``_delayed`` is the one loop over local steps: in step n every stage forwards
batch n, first to last; then every stage k backwards batch n - m_k and updates, last to first, for stage k may
want in this step the gradient that stage k+1 makes in it. After the last batch, or at a drain, the steps go
on until every batch has been backwarded. Legend: K stages, n and j batches, h activation, g its gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import pairwise

import torch
from reference import buffers_kept
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.grad import conv2d_input, conv2d_weight
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

MakeOptimizer = Callable[[list[nn.Parameter]], Optimizer]
PassContext = Callable[[int, Hashable], AbstractContextManager[object]]  # (stage, batch) or (stage, (batch, micro))
Weight = Callable[[nn.Parameter], Tensor]  # what a backward formula takes for a parameter


@dataclass(frozen=True)
class Trained:
    """Losses in batch order; one optimizer per stage, None where nothing is trained; the synthesizers of DNI."""

    losses: list[float]
    optimizers: list[Optimizer | None]
    synthesizers: tuple[nn.Module, ...] = ()
    synthesizer_optimizers: tuple[Optimizer, ...] = ()


@dataclass(frozen=True)
class Stage:
    """Consecutive layers; ``params`` are those that are trained."""

    index: int
    module: nn.Sequential
    params: list[nn.Parameter]
    optimizer: Optimizer | None
    scheduler: LRScheduler | None

    def update(self, count: int = 1, divisor: float = 1.0) -> None:
        """One optimizer step with the sum in ``grad`` / ``count`` and the rate / ``divisor``; then the scheduler's."""
        if self.optimizer is None:
            return
        for p in self.params:
            if p.grad is not None:
                p.grad /= count
        groups = self.optimizer.param_groups
        rates = [group["lr"] for group in groups]
        for group in groups:
            group["lr"] = group["lr"] / divisor
        self.optimizer.step()
        self.optimizer.zero_grad()
        for group, rate in zip(groups, rates, strict=True):
            group["lr"] = rate
        if self.scheduler is not None:
            self.scheduler.step()


@dataclass(frozen=True)
class Task:
    """What every method gets."""

    layers: list[nn.Module]
    cuts: tuple[int, ...]  # the first layer of stages 1, 2, ...
    batches: list[tuple[Tensor, Tensor]]
    loss_fn: Callable[[Tensor, Tensor], Tensor]  # (output, target) -> mean over the batch
    make_optimizer: MakeOptimizer  # called once per stage that has something to train
    make_scheduler: Callable[[Optimizer], LRScheduler] | None = None  # stepped after each update
    drains: tuple[int, ...] = ()  # batch counts after which the pipeline is drained; at the end it always is
    pass_context: PassContext = lambda _stage, _batch: nullcontext()  # around forward and recompute, without the loss

    def make_stages(self) -> list[Stage]:
        edges, stages = [0, *self.cuts, len(self.layers)], []
        if any(low >= high for low, high in pairwise(edges)):
            raise ValueError(f"cuts {self.cuts}: {len(self.layers)} layers")
        for k, (low, high) in enumerate(pairwise(edges)):
            module = nn.Sequential(*self.layers[low:high])
            module.zero_grad()
            params = [p for p in module.parameters() if p.requires_grad]
            optimizer = self.make_optimizer(params) if params else None
            scheduler = self.make_scheduler(optimizer) if optimizer and self.make_scheduler else None
            stages.append(Stage(k, module, params, optimizer, scheduler))
        return stages

    def loss_gradient(self, output: Tensor, target: Tensor, seed: float = 1.0) -> tuple[float, Tensor]:
        """The loss, and ``seed`` times its gradient w.r.t. the output (taken apart from the last stage)."""
        output = output.detach().requires_grad_()
        loss = self.loss_fn(output, target)
        loss.backward(torch.full_like(loss, seed))
        return loss.item(), output.grad


# --- the methods --------------------------------------------------------------------------------------------------


def gpipe(*task: object, num_micro_batches: int, recompute: bool = True, **more: object) -> Trained:
    """Huang et al., arXiv:1811.06965: all micro-batches forwarded, then all backwarded in order, then one update."""
    task = Task(*task, **more)
    stages, losses = task.make_stages(), []
    passes = [(Recomputed if recompute else Stashed)(stage, task) for stage in stages]
    for n, (inputs, target) in enumerate(task.batches):
        if not 1 <= num_micro_batches <= len(inputs):
            raise ValueError(f"batch {n}: {len(inputs)} samples, {num_micro_batches} micro-batches")
        outputs, loss = [], 0.0
        for i, h in enumerate(inputs.tensor_split(num_micro_batches)):
            for stage_passes in passes:
                h = stage_passes.forward((n, i), h)
            outputs.append(h)
        for i, micro_target in enumerate(target.tensor_split(num_micro_batches)):
            share = len(micro_target) / len(target)  # of the samples: the gradient seed at the micro-batch's mean loss
            micro_loss, g = task.loss_gradient(outputs[i], micro_target, share)
            loss += share * micro_loss
            for stage_passes in reversed(passes):
                g = stage_passes.backward((n, i), g)
        losses.append(loss)
        for stage in stages:
            stage.update()
    return Trained(losses, [stage.optimizer for stage in stages])


def one_f_one_b(*task: object, num_micro_batches: int, **more: object) -> Trained:
    """PipeDream-Flush, arXiv:2006.09503: GPipe with stored graphs and another order of actions, no other numbers."""
    return gpipe(*task, num_micro_batches=num_micro_batches, recompute=False, **more)


def dsp(*task: object, staleness: tuple[int, ...], accumulate: int = 1, **more: object) -> Trained:
    """Xu et al., arXiv:1909.02625: forward without graph, later a recompute with the weights of that moment."""
    return _delayed(Task(*task, **more), staleness, Recomputed, accumulate=accumulate)


def features_replay(*task: object, **more: object) -> Trained:
    """Huo et al., arXiv:1807.04511: recompute with current weights, m_k = K-1-k."""
    return dsp(*task, staleness=tuple(reversed(range(len(Task(*task, **more).cuts) + 1))), **more)


def stored_stale(
    *task: object, staleness: tuple[int, ...], weights: str = "stashed", gradient_scale: float = 1.0, **more: object
) -> Trained:
    """The forward's activations are stored, and backwarded m_k steps later.

    Args:
        weights: "stashed": backward with the weights of the forward (DDG, PipeDream, FDG, stored DSP).
            "current": with the weights of the moment (PipeMare); ``manual_backward`` must know all layers of
            stages with m_k > 0.
        gradient_scale: FDG's beta: factor of the gradient that a stage sends to the stage below.
    """
    passes = {"stashed": Stashed, "current": Current}[weights]
    return _delayed(Task(*task, **more), staleness, passes, gradient_scale=gradient_scale)


def pipemare(
    *task: object,
    annealing_updates: int | None,
    decay: float | None = 0.135,
    staleness: tuple[int, ...] | None = None,
    **more: object,
) -> Trained:
    """Yang et al., arXiv:1910.05124: old activations, current weights, two corrections.

    Args:
        annealing_updates: T1: update i (from 0) of stage k divides the learning rate of that moment by
            (m_k + 1)^p, p = 1 - min(i / annealing_updates, 1); 0: p = 0 always; None: no T1.
        decay: T2: D of gamma = D^(1/m_k); the backward takes u = w - m_k * delta for w, and every update does
            delta <- gamma * delta + (1 - gamma) * (w_new - w_old); None: no T2.
        staleness: m_k = 2(K-1-k) if None.
    """
    task = Task(*task, **more)
    staleness = staleness or tuple(2 * k for k in reversed(range(len(task.cuts) + 1)))
    deltas: dict[nn.Parameter, Tensor] = {}  # 0 where missing
    num_updates = [0] * len(staleness)

    class Corrected(Current):
        def weight(self, p: nn.Parameter) -> Tensor:
            return p - staleness[self.index] * deltas[p] if p in deltas else p

    def update(stage: Stage, count: int) -> None:
        m, i, old = staleness[stage.index], num_updates[stage.index], [p.detach().clone() for p in stage.params]
        power = 1 - min(i / annealing_updates, 1) if annealing_updates else 0
        stage.update(count, (m + 1) ** power)
        num_updates[stage.index] += 1
        if m > 0 and decay is not None:
            gamma = decay ** (1 / m)
            for p, before in zip(stage.params, old, strict=True):
                deltas[p] = gamma * deltas.get(p, 0) + (1 - gamma) * (p.detach() - before)

    return _delayed(task, staleness, Corrected, update=update)


def dni(
    *task: object,
    target_delay: int,
    make_synthesizer: Callable[[int], nn.Module],
    make_synthesizer_optimizer: MakeOptimizer,
    **more: object,
) -> Trained:
    """Jaderberg et al., arXiv:1608.05343: stage k < K-1 backwards at once a gradient predicted from its output.

    ``make_synthesizer(k)``, k = 0..K-2, maps the output h of a batch of N samples to N * g, so that it need not
    know N. Its target is what the stage above sent for the same batch (itself from a predicted gradient, but
    for the last stage); step n trains it on batch n - ``target_delay``, after the updates of all stages.
    """
    task = Task(*task, **more)
    stages, losses = task.make_stages(), []
    passes = [Stashed(stage, task) for stage in stages]
    synthesizers = tuple(make_synthesizer(k) for k in range(len(stages) - 1))
    optimizers = tuple(make_synthesizer_optimizer(list(s.parameters())) for s in synthesizers)
    outputs, targets = {}, {}  # by (stage, batch)
    for start, end in pairwise(sorted({0, *task.drains, len(task.batches)})):
        for n in range(start, end + target_delay):
            if n < end:
                h, target = task.batches[n]
                for k, stage in enumerate(stages):
                    outputs[k, n] = h = passes[k].forward(n, h)
                    if k < len(synthesizers):
                        with torch.no_grad(), buffers_kept(synthesizers[k]):
                            g = synthesizers[k](h.clone()) / len(h)
                    else:
                        loss, g = task.loss_gradient(h, target)
                        losses.append(loss)
                    targets[k - 1, n] = passes[k].backward(n, g)
                    stage.update()
            j = n - target_delay
            if start <= j < end:
                for k, synthesizer in enumerate(synthesizers):
                    h, g = outputs[k, j], targets[k, j]
                    optimizers[k].zero_grad()
                    nn.functional.mse_loss(synthesizer(h.clone()), len(h) * g).backward()
                    optimizers[k].step()
    return Trained(losses, [stage.optimizer for stage in stages], synthesizers, optimizers)


def _delayed(
    task: Task,
    staleness: tuple[int, ...],
    make_passes: Callable[[Stage, Task], Passes],
    gradient_scale: float = 1.0,
    accumulate: int = 1,
    update: Callable[[Stage, int], None] = Stage.update,
) -> Trained:
    """The loop of the methods with a staleness; a stage with m_k = 0 has one pass, with graph."""
    if staleness[-1] != 0 or any(a < b for a, b in pairwise(staleness)):
        raise ValueError(f"staleness {staleness} must never grow and end with 0")
    stages = task.make_stages()
    passes = [(make_passes if m else Stashed)(s, task) for s, m in zip(stages, staleness, strict=True)]
    losses, pending = [], [0] * len(stages)  # how many gradients are summed in ``grad``
    gradients = {}  # of outputs, by (stage, batch)
    for start, end in pairwise(sorted({0, *task.drains, len(task.batches)})):
        for n in range(start, end + staleness[0]):
            if n < end:
                h, target = task.batches[n]
                for stage_passes in passes:
                    h = stage_passes.forward(n, h)
                loss, gradients[len(stages) - 1, n] = task.loss_gradient(h, target)
                losses.append(loss)
            for k, stage in reversed(list(enumerate(stages))):
                j = n - staleness[k]
                if not start <= j < end:
                    continue
                g = passes[k].backward(j, gradients.pop((k, j)))
                gradients[k - 1, j] = gradient_scale * g if k > 0 else None
                pending[k] += 1
                if (j + 1) % accumulate == 0 or j + 1 == end:  # groups by batch index; a drain ends one early
                    update(stage, pending[k])
                    pending[k] = 0
    return Trained(losses, [stage.optimizer for stage in stages])


# --- passes: how one stage forwards a batch and, later, backwards it ----------------------------------------------
# ``forward`` returns the output, detached. ``backward`` takes its gradient, adds the weights' gradients to
# ``grad`` and returns the gradient of the input. A clone goes in, for a first layer that works in place.


class Passes:
    def __init__(self, stage: Stage, task: Task) -> None:
        self.index, self.module, self.context = stage.index, stage.module, task.pass_context
        self.kept: dict[Hashable, object] = {}


class Stashed(Passes):
    """Graph and weights of the forward: the forward runs on clones of the weights, so no update reaches them."""

    def forward(self, batch: Hashable, h: Tensor) -> Tensor:
        params = {name: p for name, p in self.module.named_parameters() if p.requires_grad}
        clones = {name: p.detach().clone().requires_grad_() for name, p in params.items()}
        x = h.detach().requires_grad_(self.index > 0)
        with self.context(self.index, batch):
            z = functional_call(self.module, clones, (x.clone(),))
        self.kept[batch] = x, z, list(zip(params.values(), clones.values(), strict=True))
        return z.detach()

    def backward(self, batch: Hashable, g: Tensor) -> Tensor | None:
        x, z, pairs = self.kept.pop(batch)
        if z.requires_grad:  # all but a stage 0 with nothing to train
            z.backward(g)
        for p, clone in pairs:
            _add_gradient(p, clone.grad)
        return x.grad


class Recomputed(Passes):
    """The input of the forward; graph and weights of the backward. Only the recompute changes buffers."""

    def forward(self, batch: Hashable, h: Tensor) -> Tensor:
        self.kept[batch] = h.detach().requires_grad_(self.index > 0)
        with self.context(self.index, batch), torch.no_grad(), buffers_kept(self.module):
            return self.module(h.detach().clone())

    def backward(self, batch: Hashable, g: Tensor) -> Tensor | None:
        x = self.kept.pop(batch)
        with self.context(self.index, batch):
            z = self.module(x.clone())
        if z.requires_grad:
            z.backward(g)
        return x.grad


class Current(Passes):
    """All activations of the forward; weights of the backward."""

    def weight(self, p: nn.Parameter) -> Tensor:
        return p

    def forward(self, batch: Hashable, h: Tensor) -> Tensor:
        with self.context(self.index, batch):
            self.kept[batch] = tape_forward(self.module, h)
        return self.kept[batch][-1][2]

    @torch.no_grad()
    def backward(self, batch: Hashable, g: Tensor) -> Tensor:
        for layer, x, y in reversed(self.kept.pop(batch)):
            g, gradients = manual_backward(layer, x, y, g, self.weight)
            for p, gradient in gradients:
                _add_gradient(p, gradient)
        return g


def _add_gradient(p: nn.Parameter, gradient: Tensor | None) -> None:
    if gradient is not None:
        p.grad = gradient if p.grad is None else p.grad + gradient


# --- forward with a tape, and backward formulas that take any weight ----------------------------------------------


@torch.no_grad()
def tape_forward(module: nn.Module, h: Tensor) -> list[tuple[nn.Module, Tensor, Tensor]]:
    """(layer, input, output) of every layer, Sequentials opened; buffers change as in any forward."""
    if not isinstance(module, nn.Sequential):
        return [(module, h.detach(), module(h.detach().clone()))]
    tape = []
    for layer in module:
        tape += tape_forward(layer, h)
        h = tape[-1][2]
    return tape


def manual_backward(
    layer: nn.Module, x: Tensor, y: Tensor, g: Tensor, weight: Weight
) -> tuple[Tensor, list[tuple[nn.Parameter, Tensor]]]:
    """Gradients of the input and of the trained parameters, from stored x and y = layer(x), and the weight given."""
    match layer:
        case nn.Linear():
            rows, grad_rows = x.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1])
            gradients = [(layer.weight, grad_rows.T @ rows), (layer.bias, grad_rows.sum(0))]
            g = g @ weight(layer.weight)
        case nn.Conv2d(padding_mode="zeros", padding=tuple()):
            how = (layer.stride, layer.padding, layer.dilation, layer.groups)
            grad_weight = conv2d_weight(x, layer.weight.shape, g, *how)
            gradients = [(layer.weight, grad_weight), (layer.bias, g.sum((0, 2, 3)))]
            g = conv2d_input(x.shape, weight(layer.weight), g, *how)
        case nn.BatchNorm2d(training=True):
            dims = (0, 2, 3)
            deviation = (x.var(dims, unbiased=False, keepdim=True) + layer.eps).sqrt()
            normal = (x - x.mean(dims, keepdim=True)) / deviation
            gradients = [(layer.weight, (g * normal).sum(dims)), (layer.bias, g.sum(dims))]
            if layer.affine:
                g = g * weight(layer.weight).reshape(1, -1, 1, 1)
            g = (g - g.mean(dims, keepdim=True) - normal * (g * normal).mean(dims, keepdim=True)) / deviation
        case nn.ReLU():
            gradients, g = [], g * (y > 0)
        case nn.Tanh():
            gradients, g = [], g * (1 - y * y)
        case nn.Flatten():
            gradients, g = [], g.reshape(x.shape)
        case _:
            raise TypeError(f"no backward formula for {layer}")
    return g, [(p, gradient) for p, gradient in gradients if p is not None and p.requires_grad]
