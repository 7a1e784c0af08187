"""How long each layer takes and what it keeps, measured with one batch on the device that will run it.

    inputs -> layer 0 -> x_1 -> layer 1 -> x_2 -> .. -> layer L-1 -> output -> loss_fn(output, targets)
                          |                 |
                          detached: a graph never spans more than one layer

A layer is timed in its place, with the value that reaches it, but alone: the gradient of its output is made
outside of the timed part, and only the last layer is timed with the loss. Every layer but the first also
gives the gradient of its input, as in a pipeline. What a layer is given is a copy, so it may work in place.
What it keeps for its backward is seen in the pass that warms it up, which is not timed.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from stalewise.errors import PlanError
from stalewise.plan.layer_graph import LayerGraph, ends_of_chain, graph_of
from stalewise.plan.partition import LayerCost
from stalewise.plan.saved_tensors import SavedTensorLog
from stalewise.plan.scratch import preserved_random_state, scratch_copy
from stalewise.plan.storage import storages
from stalewise.plan.tree import describe, map_tensors, tensors

__all__ = ["profile_layers"]

_T = TypeVar("_T")


def profile_layers(
    layers: Sequence[nn.Module | Callable[[], nn.Module]],
    inputs: Any,
    targets: Any,
    loss_fn: Callable[[Any, Any], Tensor],
    *,
    device: torch.device | str,
    names: Sequence[str],
    repeats: int = 3,
    budget_s: float = 20.0,
    region: Callable[[torch.device], AbstractContextManager[Any]] = nullcontext,
) -> list[LayerCost]:
    """Time forward and backward of each layer, on `device`, with one batch.

    Each layer is passed forward (with a graph) and backward once to warm up, then `repeats` times; the median
    counts. Nothing is changed: weights, buffers, gradients, attributes, training flags, devices, random
    states and the batch are as before. Layers are timed in the mode (training or evaluation) that they are
    in. Needs memory for a copy of one layer, two of its input, and its graph. Blocks until all are timed.
    Reentrant checkpoints inside a layer cannot be timed; make them with `use_reentrant=False`.

    Args:
        layers: modules that take the output of the one before as their only argument, or functions without
            arguments that build one. A built layer is dropped before the next one is built.
        inputs: the argument of layer 0: a tensor, or nested tuples, lists and dicts of them, on any device.
        targets: the second argument of `loss_fn`, likewise.
        loss_fn: takes the output of the last layer and `targets`, returns a tensor with one element.
        device: where to time, a CPU or CUDA device.
        names: one name per layer, for `LayerCost` and messages.
        repeats: timed passes per layer, at least 1.
        budget_s: seconds for all layers, shared evenly; a layer that needs more gets fewer timed passes, but
            at least one.
        region: what the forwards run in, such as autocast.

    Returns:
        One cost per layer: times in seconds, sizes in bytes. The backward of a layer that needs no gradient (neither
        weights to train nor an input that has one) takes 0 s. What is kept for the backward is unknown (None) for a
        layer inside which torch forbids saved-tensor hooks, such as one that uses `torch.func.grad`.

    Raises:
        PlanError: where an argument is not valid, and where a layer fails: it then names the layer, and its
            cause is the layer's own error.
    """
    device = torch.device(device)
    _check_arguments(layers, names, device, repeats, budget_s)
    deadline = time.perf_counter() + budget_s
    costs: list[LayerCost] = []
    graphs: list[LayerGraph | None] = []
    loss_copy = scratch_copy(loss_fn, device) if isinstance(loss_fn, nn.Module) else nullcontext()
    with _quiet(device), loss_copy:
        value = map_tensors(lambda tensor: tensor.detach().to(device), inputs)
        targets = map_tensors(lambda tensor: tensor.detach().to(device), targets)
        for index, (layer, name) in enumerate(zip(layers, names, strict=True)):
            left = len(layers) - index
            bench = _Bench(
                place=f"layer {index} ({name}, {_type_name(layer)})",
                argument=value,
                first=index == 0,
                loss_fn=loss_fn if left == 1 else None,
                targets=targets,
                device=device,
                region=region,
            )
            budget = max(0.0, deadline - time.perf_counter()) / left
            cost, graph, value = _profile_layer(layer, name, bench, repeats, budget)
            costs.append(cost)
            graphs.append(graph)
    ends = ends_of_chain(graphs)
    return [cost if end is None else replace(cost, **vars(end)) for cost, end in zip(costs, ends, strict=True)]


@dataclass(frozen=True)
class _Bench:
    """What a layer is timed with.

    Args:
        place: the layer in words, for messages.
        argument: what reaches it, detached; never handed out itself.
        first: whether its input needs no gradient.
        loss_fn: what is timed with it; None for all layers but the last.
        targets: the second argument of `loss_fn`; never handed out itself.
        device: where.
        region: what the forward runs in.
    """

    place: str
    argument: Any
    first: bool
    loss_fn: Callable[[Any, Any], Tensor] | None
    targets: Any
    device: torch.device
    region: Callable[[torch.device], AbstractContextManager[Any]]

    def run(self, layer: nn.Module, log: SavedTensorLog | None = None) -> tuple[float, float, LayerGraph | None, Any]:
        """One pass: seconds of the forward and of the backward, what was kept in between, and the detached output.

        Args:
            layer: to pass.
            log: to see what is kept, which slows the pass down; None for nothing.
        """
        wanted: list[Tensor] = []

        def fresh(tensor: Tensor) -> Tensor:
            if self.first or not (tensor.is_floating_point() or tensor.is_complex()):
                return tensor.clone()
            wanted.append(tensor.detach().requires_grad_())
            return wanted[-1].clone()

        def forward() -> tuple[Any, Any]:
            with nullcontext() if log is None else log.recording(), self.region(self.device):
                output = layer(argument)
                return output, output if self.loss_fn is None else self.loss_fn(output, targets)

        argument = map_tensors(fresh, self.argument)
        targets = None if self.loss_fn is None else map_tensors(torch.clone, self.targets)
        buffers = list(layer.buffers())
        versions = [tensor._version for tensor in tensors(argument)]
        with self.blame("forward"):
            (output, end), forward_s = _timed(forward, self.device)
        if self.loss_fn is not None and not (isinstance(end, Tensor) and end.numel() == 1):
            raise PlanError(
                f"loss_fn returned {describe(end)} for the output {describe(output)} of {self.place}; a loss "
                "is a tensor with one element. Return the mean over the batch."
            )
        graph = None
        if log is not None:
            graph = graph_of(
                layer,
                saved=log.alive(),
                inputs=list(tensors(argument)),
                outputs=list(tensors(output)) if self.loss_fn is None else (),
                loss=() if self.loss_fn is None else [end],
                elsewhere=[*buffers, *tensors(targets)],
                changes_input=versions != [tensor._version for tensor in tensors(argument)],
            )
        roots = [tensor for tensor in tensors(end) if tensor.requires_grad]
        wanted.extend(weight for weight in layer.parameters() if weight.requires_grad)
        backward_s = 0.0
        if roots and wanted:
            # random, because ones make the backward of some layers (softmax) vanish into denormal numbers
            with self.blame("backward"):
                gradients = [torch.randn_like(root) for root in roots]
                _, backward_s = _timed(
                    lambda: torch.autograd.grad(roots, wanted, gradients, allow_unused=True), self.device
                )
        return forward_s, backward_s, graph, map_tensors(Tensor.detach, output)

    @contextmanager
    def blame(self, phase: str) -> Iterator[None]:
        """Turn what fails inside into a `PlanError` that names the layer."""
        try:
            yield
        except Exception as error:
            giver = "the batch" if self.first else "the output of the layer before"
            rule = f"Each layer takes one argument; this one was given {giver}, {describe(self.argument)}."
            repair = "Check the order of the layers, and run this one alone."
            if isinstance(error, torch.OutOfMemoryError):
                repair = "Profile with a smaller batch."
            elif phase == "construction":
                rule, repair = "A layer is built by a call without arguments.", "Make this call alone."
            elif self.loss_fn is not None:
                repair = "The loss is part of this pass: check loss_fn and the targets too."
            raise PlanError(
                f"{self.place} failed in its {phase} on {self.device}: {type(error).__name__}: {error}\n{rule} {repair}"
            ) from error


def _profile_layer(
    source: nn.Module | Callable[[], nn.Module], name: str, bench: _Bench, repeats: int, budget_s: float
) -> tuple[LayerCost, LayerGraph | None, Any]:
    """The cost of one layer, its graph and its output; a layer that is built here is dropped when it returns."""
    if isinstance(source, nn.Module):
        layer = source
    else:
        with bench.blame("construction"):
            layer = source()
        if not isinstance(layer, nn.Module):
            raise PlanError(
                f"{bench.place} returned a value of type {type(layer).__name__}; a layer is a "
                "torch.nn.Module, or a function without arguments that returns one. Return a module."
            )
    if any(nn.parameter.is_lazy(tensor) for tensor in (*layer.parameters(), *layer.buffers())):
        raise PlanError(
            f"{bench.place} has weights without a shape; timing it would give them one, and nothing may "
            "change. Run the model once on a batch, then profile it."
        )
    with ExitStack() as scratch:
        with bench.blame("copy"):
            scratch.enter_context(scratch_copy(layer, bench.device))
        start = time.perf_counter()
        try:
            *_, graph, output = bench.run(layer, SavedTensorLog())
        except PlanError:
            # Torch forbids hooks inside some functions (torch.func.grad); whatever else failed fails again.
            *_, graph, output = bench.run(layer)
        passes: list[tuple[float, float]] = []
        while len(passes) < repeats:
            used_s = time.perf_counter() - start
            if passes and used_s + used_s / (1 + len(passes)) > budget_s:
                break
            del output
            *times, _, output = bench.run(layer)
            passes.append((times[0], times[1]))
    forward_s, backward_s = (statistics.median(column) for column in zip(*passes, strict=True))
    cost = LayerCost(
        forward_s=forward_s,
        backward_s=backward_s,
        passes_s=tuple(map(sum, passes)),
        output_bytes=sum(tensor.numel() * tensor.element_size() for tensor in tensors(output)),
        graph_bytes=None if graph is None else graph.graph_bytes,
        weight_bytes=sum(storages([*layer.parameters(), *layer.buffers()]).values()),
        gradient_bytes=sum(w.numel() * w.element_size() for w in layer.parameters() if w.requires_grad),
        saved_weight_bytes=None if graph is None else graph.saved_weight_bytes,
        parameters=sum(weight.numel() for weight in layer.parameters()),
        name=name,
        type=type(layer).__name__,
    )
    return cost, graph, output


def _timed(work: Callable[[], _T], device: torch.device) -> tuple[_T, float]:
    """What `work` returns, and how many seconds the device took for it."""
    if device.type == "cpu":
        start = time.perf_counter()
        result = work()
        return result, time.perf_counter() - start
    # events, because a clock on the host would count the synchronisation, which a pipeline does not do
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    torch.cuda.synchronize(device)
    begin.record()
    result = work()
    end.record()
    end.synchronize()
    return result, begin.elapsed_time(end) / 1e3


@contextmanager
def _quiet(device: torch.device) -> Iterator[None]:
    """Random states kept, gradients on whatever the caller's mode, and `device` the current one."""
    current = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
    with preserved_random_state(device), torch.inference_mode(False), torch.enable_grad(), current:
        yield


def _type_name(source: nn.Module | Callable[[], nn.Module]) -> str:
    """The class of a module; a function that builds one is called by its own name."""
    return type(source).__name__ if isinstance(source, nn.Module) else getattr(source, "__name__", "built")


def _check_arguments(
    layers: Sequence[object], names: Sequence[str], device: torch.device, repeats: int, budget_s: float
) -> None:
    if not layers:
        raise PlanError("there are no layers to profile; a model has at least one. Give its layers in order.")
    if len(names) != len(layers):
        raise PlanError(
            f"{len(names)} names were given for {len(layers)} layers; each layer has one. Give {len(layers)} names."
        )
    if device.type not in ("cpu", "cuda"):
        raise PlanError(f"device is {device}; layers can be timed on cpu and cuda devices. Use one of them.")
    if device.type == "cuda" and torch.cuda.device_count() <= (device.index or 0):
        raise PlanError(
            f"device is {device}, and torch sees {torch.cuda.device_count()} CUDA devices; layers are timed "
            "on the device that will run them. Use one that torch sees, or cpu."
        )
    if repeats < 1 or not budget_s >= 0:
        raise PlanError(
            f"repeats is {repeats} and budget_s is {budget_s}; a median needs at least one pass, and a "
            "budget is 0 or more seconds. Leave them out for 3 passes in 20 s."
        )
