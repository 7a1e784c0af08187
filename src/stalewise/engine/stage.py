"""One stage: some consecutive layers, their weights, their optimizer, and the batches in between.

What a stage keeps per batch between its passes:

    forward    ->  stored input                      (m_k + 1 of them at most)
    recompute  ->  graph: input leaves and outputs   (forward itself where no recompute follows)
    backward   ->  nothing

A graph that is kept over an update names its weights (`saved_weights`), so that the backward can use those of its
forward or those of the moment, whatever the optimizer did in between.

Random layers, buffers and layers that work in place: see `randomness`, `buffers` and `isolation`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from stalewise.engine.blame import blamed, describe_values
from stalewise.engine.buffers import all_buffers, finite_buffers, unchanged_buffers
from stalewise.engine.compiled import call_of, check_compiled
from stalewise.engine.isolation import Isolation, has_gradient
from stalewise.engine.layout import check_sendable, dense
from stalewise.engine.messages import Activation
from stalewise.engine.overlap import ForwardLane
from stalewise.engine.precision import FULL_PRECISION, Precision
from stalewise.engine.randomness import random_stream, stream_seed
from stalewise.engine.saved_weights import DiscrepancyCorrection, SavedWeights
from stalewise.engine.streams import Streams, streams_of
from stalewise.engine.synthesizer import Synthesizer
from stalewise.engine.tree import Structure, Tree, flatten, to_device, unflatten
from stalewise.errors import ConfigError
from stalewise.plan.saved_tensors import SavedTensorLog
from stalewise.protocol.program import NO_PROGRAM, StageProgram

__all__ = ["LossFunction", "Metric", "Stage", "StoredInput"]

LossFunction = Callable[[Tree, Tree], Tensor]
"""(output, target) -> a scalar that requires grad: the batch's mean loss."""

Metric = Callable[[Tree, Tree], Tensor | float]
"""(output, target) -> a scalar: the batch's mean."""

Unit = tuple[int, int | None]
"""Global index of a batch, and index of the micro-batch in it."""


@dataclass(frozen=True, slots=True)
class StoredInput:
    """What a forward keeps of its activation."""

    values: list[Tensor]
    structure: Structure
    target: Tree
    share: float


@dataclass(frozen=True, slots=True)
class _Graph:
    inputs: list[Tensor]
    outputs: list[Tensor]
    share: float


class Stage:
    """The layers of one stage and everything that belongs to them; complete when built.

    Args:
        module: the layers, on `device`.
        index: k.
        num_stages: K.
        device: where passes run.
        seed: of the run; seeds the random streams of the passes.
        optimizer: of the trainable parameters; None where there are none.
        lr_scheduler: stepped once per update, or None.
        loss_fn: used on the last stage only.
        clip_grad_norm: largest norm of this stage's gradient (each stage for itself), or None.
        program: of the stage; says what becomes of graphs, weights and gradients.
        precision: of its passes.
        compile: backend of `torch.compile` for the layers; None: not compiled.
        protects_buffers: whether a pass that would make a buffer NaN or infinite leaves buffers as they were.
        overlap: queue graph-less forwards beside everything else; see `overlap`.
        streams: of the device; None: its own.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        index: int,
        num_stages: int,
        device: torch.device,
        seed: int,
        optimizer: Optimizer | None,
        lr_scheduler: LRScheduler | None,
        loss_fn: LossFunction,
        clip_grad_norm: float | None = None,
        program: StageProgram = NO_PROGRAM,
        precision: Precision = FULL_PRECISION,
        compile: str | None = None,
        protects_buffers: bool = False,
        overlap: bool = False,
        streams: Streams | None = None,
    ) -> None:
        precision.check(program)
        check_compiled(compile, program)
        self.module = module
        self._call = call_of(module, compile)
        self.index = index
        self.num_stages = num_stages
        self.device = device
        self.streams = streams_of(device) if streams is None else streams
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.precision = precision
        self.num_updates = 0
        self.peak_stored_inputs = 0
        self.is_first = index == 0
        self.is_last = index == num_stages - 1
        self.seed = seed
        self.lane = ForwardLane(self.streams, enabled=overlap and program.recomputes and not self.is_last)
        self._loss_fn = loss_fn
        self._first_input = ""
        self._protects_buffers = protects_buffers
        self._clip_grad_norm = clip_grad_norm
        self._trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
        self._isolation = Isolation(index)
        self._evaluation_isolation = Isolation(index)
        self._stored: dict[Unit, StoredInput] = {}
        self._graphs: dict[Unit, _Graph] = {}
        self._policy = program.policy
        self._staleness = program.backward_lag
        self._gradients_added = 0
        self._saved_weights = _saved_weights(list(module.parameters()), program)
        self._saved_tensors: SavedTensorLog | None = None
        self._keeps_buffers = False
        self._buffers_before: dict[Unit, dict[str, Tensor | None]] = {}
        self.synthesizer: Synthesizer | None = None
        if program.policy.synthesizer is not None:
            self.synthesizer = Synthesizer(program.policy.synthesizer, seed=stream_seed(seed, index, -1), device=device)

    def forward(
        self, activation: Activation, batch: int, micro_batch: int | None = None, *, keep_graph: bool
    ) -> Activation:
        """Forward one batch with the current weights and keep its input.

        Args:
            activation: what the stage before sent.
            batch: global index.
            micro_batch: index within the batch, or None.
            keep_graph: build the graph now. False where a recompute will: then nothing but the input is kept and
                buffers are as before.

        Returns:
            The output (detached), or on the last stage the loss as the only value.
        """
        unit = (batch, micro_batch)
        self._stored[unit] = stored = StoredInput(
            activation.values, activation.structure, activation.target, activation.share
        )
        self.peak_stored_inputs = max(self.peak_stored_inputs, len({number for number, _ in self._stored}))
        values, structure = self._pass(stored, unit, with_graph=keep_graph)
        sent = [self._sendable(value) for value in values] if keep_graph else values
        if self.is_last:
            # Of its own storage: mse_loss, for one, leaves its number in one as large as the whole output.
            sent = [loss.clone() for loss in sent]
        return activation._replace(values=sent, structure=structure)

    def recompute(self, batch: int, micro_batch: int | None = None) -> None:
        """Forward a stored input again, with the weights of now, and keep the graph."""
        if self._keeps_buffers:
            copies = {name: None if own is None else own.detach().clone() for name, own in all_buffers(self.module)}
            self._buffers_before[batch, micro_batch] = copies
        self._pass(self._stored[batch, micro_batch], (batch, micro_batch), with_graph=True)

    def backward(
        self, gradients: Sequence[Tensor | None] | None, batch: int, micro_batch: int | None = None
    ) -> list[Tensor | None]:
        """Backward a batch whose graph is kept; parameters accumulate, the stored input is dropped.

        Args:
            gradients: one per leaf of the output, of its shape and dtype (None: no gradient); None on the last
                stage, which starts from the loss.

        Returns:
            The gradient of each leaf of the input; None for leaves that have none, such as integers.
        """
        graph = self._graphs.pop((batch, micro_batch))
        self._buffers_before.pop((batch, micro_batch), None)
        del self._stored[batch, micro_batch]
        received = self._loss_gradient(graph) if gradients is None else gradients
        roots = [
            (output, gradient)
            for output, gradient in zip(graph.outputs, received, strict=True)
            if output.requires_grad and (gradient is not None or gradients is None)
        ]
        if roots:
            with blamed(f"the backward of batch {batch} on stage {self.index}", _about_backward):
                torch.autograd.backward([root for root, _ in roots], [gradient for _, gradient in roots])
        if self._saved_weights is not None:
            self._saved_weights.release((batch, micro_batch))
        self._gradients_added += int(micro_batch in (None, self._policy.micro_batches - 1))
        return [None if leaf.grad is None else self._passed_on(leaf.grad) for leaf in graph.inputs]

    def drop(self, batch: int, micro_batch: int | None = None) -> list[Tensor | None]:
        """In place of `backward`: forget the batch's graph and stored input, and pass no gradient on."""
        graph = self._graphs.pop((batch, micro_batch))
        del self._stored[batch, micro_batch]
        if self._saved_weights is not None:
            self._saved_weights.release((batch, micro_batch))
        return [None] * len(graph.inputs)

    def forget_gradients(self) -> None:
        """Forget what micro-batches of a dropped batch have accumulated."""
        self._gradients_added = 0
        for parameter in self._trainable:
            parameter.grad = None

    def update(self) -> None:
        """Update the weights with the mean of the accumulated gradients, and step the LR scheduler.

        Where all batches of this update were dropped, weights, optimizer and scheduler stay as they are.
        """
        self.lane.join()
        added, self._gradients_added = self._gradients_added, 0
        self.num_updates += 1
        if self.optimizer is None or not added:
            return
        if added > 1:
            for parameter in self._trainable:
                if parameter.grad is not None:
                    parameter.grad.div_(added)
        if self._clip_grad_norm is not None:
            nn.utils.clip_grad_norm_(self._trainable, self._clip_grad_norm)
        if self._saved_weights is not None:
            self._saved_weights.before_update()
        with self._delayed_learning_rate(self.optimizer):
            self.optimizer.step()
        if self._saved_weights is not None:
            self._saved_weights.after_update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.lr_scheduler is not None:
            self.lr_scheduler.step()

    def keep_buffers_of_recomputes(self) -> None:
        """From now on keep what the buffers were before a recompute until its backward.

        So a graph that waits for its gradient at a checkpoint can be recomputed once more there.
        """
        self._keeps_buffers = True

    def synthesize(self, output: Activation, batch: int) -> list[Tensor | None]:
        """Predict the gradient of an output (one tensor) before the stage after has computed it."""
        assert self.synthesizer is not None, "only programs with S actions need a synthesizer"
        if len(output.values) != 1:
            raise ConfigError(
                f"dni predicts the gradient of one tensor, and stage {self.index} gives {len(output.values)}; cut the "
                "model where a single tensor crosses."
            )
        return [self.synthesizer.predict(output.values[0], batch)]

    def train_synthesizer(self, gradients: Sequence[Tensor | None], batch: int) -> None:
        """Train the predictor with the gradient that the stage after computed."""
        assert self.synthesizer is not None, "only programs with T actions need a synthesizer"
        self.synthesizer.train(gradients[0], batch)

    def infer(self, activation: Activation, batch: int) -> Activation:
        """Forward without a graph and without keeping anything, in the mode the modules are in."""
        stream = random_stream(stream_seed(self.seed, self.index, batch), self.device)
        with stream, torch.no_grad(), self.precision.region(self.device):
            _, inputs = self._evaluation_isolation.inputs(activation.values, with_graph=False)
            values, structure = flatten(self._output(activation.structure, inputs, batch), self._output_name)
        self._evaluation_isolation.check(inputs, batch)
        return activation._replace(values=[self._sendable(value) for value in values], structure=structure)

    def forward_with(
        self, weights: Mapping[str, Tensor], activation: Activation, batch: int
    ) -> tuple[list[Tensor], list[Tensor], Activation]:
        """Forward a batch with other weights, with a graph that the caller keeps; the stage stays as it is.

        Returns:
            The leaves that collect the input's gradients, the outputs with their graph (on the last stage the loss),
            and the output to send.
        """
        leaves = [
            value.detach().clone().requires_grad_(not self.is_first and has_gradient(value))
            for value in activation.values
        ]
        inputs = [leaf.clone() for leaf in leaves]
        stream = random_stream(stream_seed(self.seed, self.index, batch), self.device)
        with stream, unchanged_buffers(self.module), torch.enable_grad(), self.precision.region(self.device):
            tree = unflatten(activation.structure, inputs)
            output = torch.func.functional_call(self.module, dict(weights), (tree,))
            if self.is_last:
                output = self._loss_fn(output, to_device(activation.target, self.device))
            values, structure = flatten(output)
        sent = activation._replace(values=[dense(value.detach()) for value in values], structure=structure)
        return leaves, values, sent

    def log_saved_tensors(self) -> None:
        """From now on know what autograd saves, for `graph_tensors`."""
        self._saved_tensors = SavedTensorLog()

    def stored_tensors(self) -> list[Tensor]:
        """Inputs and targets of the batches in between, and outputs that a synthesizer keeps."""
        targets = [flatten(stored.target)[0] for stored in self._stored.values()]
        inputs = [stored.values for stored in self._stored.values()]
        kept = [] if self.synthesizer is None else self.synthesizer.kept()
        return [tensor for tensors in (*inputs, *targets, kept) for tensor in tensors]

    def graph_tensors(self) -> list[Tensor]:
        """Outputs of the graphs that are kept and what autograd saved in them; the latter only where it is logged."""
        outputs = [tensor for graph in self._graphs.values() for tensor in graph.outputs]
        return outputs + ([] if self._saved_tensors is None else self._saved_tensors.alive())

    def weight_copies(self) -> list[Tensor]:
        """What is kept because weights change under stored graphs; see `SavedWeights.held`."""
        return [] if self._saved_weights is None else self._saved_weights.held()

    @contextmanager
    def evaluation_mode(self) -> Iterator[None]:
        """Every module in eval mode inside; each in its own mode after."""
        modes = [(module, module.training) for module in self.module.modules()]
        self.module.eval()
        try:
            yield
        finally:
            for module, mode in modes:
                module.training = mode

    @property
    def learning_rate(self) -> float | None:
        """Of the first parameter group, now; None without an optimizer."""
        return None if self.optimizer is None else float(self.optimizer.param_groups[0]["lr"])

    def _pass(self, stored: StoredInput, unit: Unit, *, with_graph: bool) -> tuple[list[Tensor], Structure]:
        """One pass over the layers, from the stream of its own; keeps the graph if it builds one.

        Returns:
            The outputs, without a graph as they are sent, and their structure.
        """
        if not with_graph:
            return self._pass_in(unchanged_buffers(self.module), stored, unit, with_graph=False)
        with finite_buffers(self.module) if self._protects_buffers else nullcontext():
            return self._pass_in(self._building_graph(unit), stored, unit, with_graph=True)

    def _pass_in(
        self, context: AbstractContextManager[object], stored: StoredInput, unit: Unit, *, with_graph: bool
    ) -> tuple[list[Tensor], Structure]:
        stream = random_stream(stream_seed(self.seed, self.index, *unit), self.device)
        with (
            stream,
            context,
            self._queued(stored, with_graph=with_graph),
            torch.set_grad_enabled(with_graph),
            self.precision.region(self.device),
        ):
            leaves, inputs = self._isolation.inputs(stored.values, with_graph=with_graph)
            output = self._output(stored.structure, inputs, unit[0])
            if self.is_last:
                output = self._checked_loss(self._loss(output, stored.target, unit[0]))
            values, structure = flatten(output, self._output_name)
            for value in values:
                check_sendable(value, self._output_name)
            if not with_graph:
                values = [self._sendable(value) for value in values]
        self._isolation.check(inputs, unit[0])
        if with_graph:
            self._graphs[unit] = _Graph(leaves, values, stored.share)
        return values, structure

    def _output(self, structure: Structure, inputs: list[Tensor], batch: int) -> Tree:
        def details() -> str:
            seen = describe_values(inputs)
            first = self._first_input or seen
            before = "" if first == seen else f"; that of the first batch was {first}"
            return (
                f"Its input is {seen}{before}. The layers decide what a batch may look like; give batches that fit "
                "them (usually only the number of samples may change), or run the layers alone on this one."
            )

        with blamed(f"the forward of batch {batch} on stage {self.index}", details):
            output = self._call(unflatten(structure, inputs))
        if not self._first_input:
            self._first_input = describe_values(inputs)
        return output

    def _loss(self, output: Tree, target: Tree, batch: int) -> Tensor:
        def details() -> str:
            return (
                f"It was given the output {describe_values(output)} and the target {describe_values(target)}. Give "
                "targets of the shape, type and range that it expects, or use another loss_fn."
            )

        with blamed(f"loss_fn for batch {batch}", details):
            return self._loss_fn(output, to_device(target, self.device))

    @property
    def _output_name(self) -> str:
        return f"the output of stage {self.index}"

    def _queued(self, stored: StoredInput, *, with_graph: bool) -> AbstractContextManager[object]:
        """Where a pass is queued; entered when the buffers are those that it works on."""
        return nullcontext() if with_graph else self.lane.forward([*stored.values, *self.module.buffers()])

    def rebuild_graph(self, unit: Unit, saved: Sequence[Tensor | tuple[Any, ...] | None]) -> None:
        """Build a graph of a checkpoint again, with what autograd saved for it; see `SavedWeights.replaying`."""
        assert self._saved_weights is not None, "only stages that keep graphs over updates have some to build again"
        replaying = self._saved_weights.replaying(unit, saved, self._saved_tensors)
        with unchanged_buffers(self.module):
            self._pass_in(replaying, self._stored[unit], unit, with_graph=True)

    def _building_graph(self, unit: Unit) -> AbstractContextManager[object]:
        if self._saved_weights is not None:
            if self._policy.weights == "current" and torch.is_autocast_enabled(self.device.type):
                raise ConfigError(
                    'weights="current" cannot work under autocast: the graph keeps casted copies of the weights of the '
                    'forward. Use weights="stashed" or activations="recompute".'
                )
            return self._saved_weights.recording(unit, self._saved_tensors)
        return nullcontext() if self._saved_tensors is None else self._saved_tensors.recording()

    def _loss_gradient(self, graph: _Graph) -> list[Tensor | None]:
        """Of the batch's loss with respect to this part's: its share of the samples."""
        return [None if graph.share == 1 else torch.full_like(output, graph.share) for output in graph.outputs]

    def _passed_on(self, gradient: Tensor) -> Tensor:
        scale = self._policy.gradient_scale
        return dense(gradient if scale == 1 else gradient * scale)

    @contextmanager
    def _delayed_learning_rate(self, optimizer: Optimizer) -> Iterator[None]:
        """PipeMare's T1: a learning rate divided by a power of the delay, which anneals to 0 over the first updates."""
        correction = self._policy.correction
        update = self.num_updates - 1
        if correction is None or update >= correction.annealing_updates or self._staleness == 0:
            yield
            return
        power = 1 - update / correction.annealing_updates
        scheduled = [group["lr"] for group in optimizer.param_groups]
        for group, lr in zip(optimizer.param_groups, scheduled, strict=True):
            group["lr"] = lr / (self._staleness + 1) ** power
        yield
        for group, lr in zip(optimizer.param_groups, scheduled, strict=True):
            group["lr"] = lr

    def _checked_loss(self, loss: Tensor) -> Tensor:
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            got = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise ConfigError(
                f"loss_fn returned {got}; it must return the batch's loss as one number in a tensor. "
                "Reduce it, for example with .mean()."
            )
        if not loss.is_floating_point():
            raise ConfigError(
                f"loss_fn returned a number of type {str(loss.dtype).removeprefix('torch.')}; a loss is a real one in "
                "floating point. Compute it from the output without rounding, and take the real part of complex values."
            )
        if torch.is_grad_enabled() and not loss.requires_grad and (self._trainable or self.index > 0):
            raise ConfigError(
                "loss_fn returned a tensor that does not require grad; nothing could be trained. Compute the loss "
                "from the output with differentiable operations, without .detach(), .item() or torch.no_grad()."
            )
        return loss.reshape(())

    def _sendable(self, value: Tensor) -> Tensor:
        """Detached, dense, and never the memory of a weight or buffer, which the next update would change."""
        value = dense(value.detach())
        storage = value.untyped_storage().data_ptr()
        own = (*self.module.parameters(), *self.module.buffers())
        return value.clone() if any(storage == tensor.untyped_storage().data_ptr() for tensor in own) else value


def _about_backward() -> str:
    return (
        "Nothing that a layer's backward needs may change after its forward: work in place only on what no other layer "
        "uses, or not at all. Run the layers and their backward alone to see which one it is."
    )


def _saved_weights(parameters: list[nn.Parameter], program: StageProgram) -> SavedWeights | None:
    """What names the weights in graphs that live over an update; None where no graph does."""
    if not program.stores_graphs_over_updates:
        return None
    policy, correction = program.policy, None
    if policy.correction is not None and policy.correction.discrepancy_decay is not None:
        correction = DiscrepancyCorrection(
            parameters, staleness=program.backward_lag, decay=policy.correction.discrepancy_decay
        )
    return SavedWeights(parameters, policy.weights, correction)
