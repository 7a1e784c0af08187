"""Small networks, batches and engines for the tests of the engine and of the pipeline, and bitwise comparison."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from reference import ReferenceResult
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import ExponentialLR, LRScheduler, StepLR

from stalewise.engine.assemble import assemble_stage
from stalewise.engine.randomness import stream_seed
from stalewise.engine.sequential import SequentialEngine
from stalewise.engine.split import Chain
from stalewise.methods import DSP, Method, PipeMare

CPU = torch.device("cpu")
Batches = list[tuple[Any, Any]]


# --- networks and batches -------------------------------------------------------------------------------------


def mlp(*, dropout: float = 0.3) -> list[nn.Module]:
    """8 layers on 5 features; a cut at 3 starts a stage with a ReLU in place."""
    torch.manual_seed(0)
    return [
        nn.Linear(5, 8),
        nn.Tanh(),
        nn.Linear(8, 8, bias=False),
        nn.ReLU(inplace=True),
        nn.Dropout(dropout),
        nn.LayerNorm(8),
        nn.Linear(8, 6),
        nn.Linear(6, 3),
    ]


def cnn(*, dropout: float = 0.3) -> list[nn.Module]:
    """9 layers on 2x4x4 images with BatchNorm; a cut at 2 or 6 starts a stage with a ReLU in place."""
    torch.manual_seed(0)
    return [
        nn.Conv2d(2, 4, 3, padding=1, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.Dropout(dropout),
        nn.Conv2d(4, 4, 3, stride=2, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.Flatten(),
        nn.Linear(16, 3),
    ]


NETS: dict[str, Callable[..., list[nn.Module]]] = {"mlp": mlp, "cnn": cnn}
INPUT_SHAPES = {"mlp": (5,), "cnn": (2, 4, 4)}
CURRENT_IN_GRAPHS: dict[str, Method] = {
    "stored": DSP.minimal(3, activations="stored", weights="current"),
    "auto": DSP.minimal(3, activations="auto", weights="current"),
    "pipemare": PipeMare(3),
}
"""Methods of three stages that put today's weights into yesterday's graphs."""


def classification(net: str, count: int, *, size: int = 4, last_size: int | None = None) -> Batches:
    """`count` batches of 3 classes for a network of `NETS`; the last one may be smaller."""
    generator = torch.Generator().manual_seed(1)
    sizes = [size] * count
    if last_size is not None and sizes:
        sizes[-1] = last_size
    return [
        (
            torch.randn(samples, *INPUT_SHAPES[net], generator=generator),
            torch.randint(3, (samples,), generator=generator),
        )
        for samples in sizes
    ]


def sgd(params: Any) -> Optimizer:
    return SGD(params, lr=0.05)


def momentum(params: Any) -> Optimizer:
    return SGD(params, lr=0.05, momentum=0.9, weight_decay=1e-3)


def nesterov(params: Any) -> Optimizer:
    return SGD(params, lr=0.05, momentum=0.9, nesterov=True)


def adamw(params: Any) -> Optimizer:
    return AdamW(params, lr=0.01)


def decay(optimizer: Optimizer) -> LRScheduler:
    return ExponentialLR(optimizer, 0.8)


def stairs(optimizer: Optimizer) -> LRScheduler:
    return StepLR(optimizer, 3, 0.5)


# --- engines --------------------------------------------------------------------------------------------------


def build_engine(
    layers: Sequence[nn.Module],
    method: Method | Sequence[int],
    cuts: Sequence[int],
    *,
    loss_fn: Callable[[Any, Any], Tensor] = cross_entropy,
    optimizer: Callable[[Any], Optimizer] = momentum,
    lr_scheduler: Callable[[Optimizer], LRScheduler] | None = None,
    clip_grad_norm: float | None = None,
    param_groups: Callable[[str, nn.Parameter], Mapping[str, Any]] | None = None,
    seed: int = 0,
) -> SequentialEngine:
    """The stages of a model and the engine that runs them; `method` may be a staleness of DSP."""
    if not isinstance(method, Method):
        method = DSP(staleness=method)
    chain = Chain(list(layers))
    chain.check_nothing_shared(cuts)
    program = method.program()
    stages = [
        assemble_stage(
            chain.build(cuts, index),
            index=index,
            num_stages=method.num_stages,
            device=CPU,
            seed=seed,
            optimizer=optimizer,
            lr_scheduler=lr_scheduler,
            loss_fn=loss_fn,
            clip_grad_norm=clip_grad_norm,
            param_groups=param_groups,
            program=program.stages[index],
        )
        for index in range(method.num_stages)
    ]
    return SequentialEngine(program, stages)


def train(engine: SequentialEngine, batches: Iterable[tuple[Any, Any]], *, drain: bool = True) -> list[float]:
    """The losses of a run."""
    return [loss.item() for loss in engine.train(batches, drain=drain)]


def train_in_parts(
    engine: SequentialEngine, batches: Batches, *, drains: Iterable[int] = (), pauses: Iterable[int] = ()
) -> list[float]:
    """The losses of a run that is drained after some numbers of batches and paused after others, and drained."""
    losses = []
    for start, end in pairwise(sorted({0, *drains, *pauses, len(batches)})):
        losses += train(engine, batches[start:end], drain=end in drains or end == len(batches))
    return losses


def documented_streams(seed: int) -> Callable[[int, int], Any]:
    """The random stream of a pass as documented, for the reference's `pass_context`."""

    @contextmanager
    def context(stage: int, batch: int) -> Iterator[None]:
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(stream_seed(seed, stage, batch))
            yield

    return context


# --- bitwise comparison ---------------------------------------------------------------------------------------


def assert_same(value: object, truth: object, where: str = "") -> None:
    """Equal trees, tensors bitwise and of the same dtype and shape."""
    if isinstance(truth, Tensor):
        assert isinstance(value, Tensor), where
        assert (value.dtype, value.shape) == (truth.dtype, truth.shape), where
        assert torch.equal(value, truth), where
    elif isinstance(truth, Mapping):
        assert isinstance(value, Mapping), where
        assert list(value) == list(truth), where
        for key in truth:
            assert_same(value[key], truth[key], f"{where}[{key!r}]")
    elif isinstance(truth, tuple | list):
        assert isinstance(value, tuple | list), where
        assert len(value) == len(truth), where
        for index, (item, true_item) in enumerate(zip(value, truth, strict=True)):
            assert_same(item, true_item, f"{where}[{index}]")
    else:
        assert value == truth, where


def model_state(layers: Sequence[nn.Module]) -> dict[str, Tensor]:
    """Copies of what the unsplit model holds, by name."""
    return {name: value.clone() for name, value in nn.Sequential(*layers).state_dict().items()}


def reference_optimizer_state(
    result: ReferenceResult, layers: Sequence[nn.Module], cuts: Sequence[int]
) -> dict[str, Any]:
    """The optimizers of a reference run in the layout of `optimizer_state_dict`."""
    names = {id(parameter): name for name, parameter in nn.Sequential(*layers).named_parameters()}
    state: dict[str, Any] = {}
    groups: list[dict[str, Any]] = []
    for optimizer in result.optimizers:
        for group in [] if optimizer is None else optimizer.param_groups:
            state |= {names[id(p)]: dict(optimizer.state[p]) for p in group["params"] if p in optimizer.state}
            options = {key: value for key, value in group.items() if key != "params"}
            groups.append({**options, "params": [names[id(p)] for p in group["params"]]})
    return {"state": state, "param_groups": groups}
