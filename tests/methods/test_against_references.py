"""Every method, through the public interface, against a straight-line reference written from its definition.

The references (`tests/method_references.py`) share no code with the library. Weights, buffers, optimizer state and
losses are compared bitwise; to rounding only where the two add numbers in another order, which each case says.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import method_references as references
import pytest
import torch
from torch import Tensor, nn

import stalewise
from stalewise.engine.randomness import random_stream, stream_seed
from stalewise.engine.synthesizer import build_synthesizer
from stalewise.methods import BP, DDG, DNI, DSP, FDG, FeaturesReplay, GPipe, Method, OneFOneB, PipeDream, PipeMare

CUTS = {1: (), 2: (3,), 3: (3, 6), 4: (2, 4, 7)}
SEED = 11


def net(*, batch_norm: bool = True, dropout: bool = False) -> list[nn.Module]:
    torch.manual_seed(0)
    return [
        nn.Conv2d(2, 6, 3, padding=1),
        nn.BatchNorm2d(6) if batch_norm else nn.Identity(),
        nn.ReLU(inplace=True),
        nn.Conv2d(6, 6, 3, padding=1, stride=2),
        nn.BatchNorm2d(6) if batch_norm else nn.Identity(),
        nn.Dropout(0.3) if dropout else nn.Tanh(),
        nn.Conv2d(6, 4, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16, 5),
    ]


def batches(count: int, size: int = 8) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(size, 2, 8, 8, generator=generator), torch.randint(5, (size,), generator=generator))
        for _ in range(count)
    ]


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "momentum": lambda params: torch.optim.SGD(params, lr=0.05, momentum=0.9, weight_decay=1e-3),
    "adam": lambda params: torch.optim.Adam(params, lr=0.01),
    "adam foreach": lambda params: torch.optim.Adam(params, lr=0.01, foreach=True),
    "adam fused": lambda params: torch.optim.Adam(params, lr=0.01, fused=True),
    "sgd foreach": lambda params: torch.optim.SGD(params, lr=0.05, momentum=0.9, foreach=True),
}


def schedule(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.StepLR(optimizer, step_size=5, gamma=0.5)


@contextmanager
def stream(stage: int, batch: Any) -> Iterator[None]:
    """The documented random stream of a pass; micro-batched references name (batch, micro-batch)."""
    unit = batch if isinstance(batch, tuple) else (batch,)
    with random_stream(stream_seed(SEED, stage, *unit), torch.device("cpu")):
        yield


def train(method: Method, layers: list[nn.Module], data: list[Any], optimizer: str) -> tuple[Any, list[float]]:
    pipeline = stalewise.Pipeline(
        layers,
        method=method,
        loss_fn=nn.functional.cross_entropy,
        optimizer=OPTIMIZERS[optimizer],
        lr_scheduler=schedule,
        partition=CUTS[method.num_stages],
        seed=SEED,
    )
    return pipeline, list(pipeline.train(data))


def compare(
    method: Method,
    reference: Callable[..., references.Trained],
    *,
    optimizer: str = "momentum",
    close: float | None = None,
    count: int = 14,
    size: int = 8,
    model: Callable[[], list[nn.Module]] = net,
    **options: Any,
) -> None:
    """Train both from the same weights on the same batches and compare everything."""
    data = batches(count, size)
    theirs = model()
    if close is not None:
        data = [(images.double(), labels) for images, labels in data]
        theirs = [layer.double() for layer in theirs]
    ours = copy.deepcopy(theirs)
    pipeline, losses = train(method, ours, data, optimizer)
    trained = reference(
        layers=theirs,
        cuts=CUTS[method.num_stages],
        batches=data,
        loss_fn=nn.functional.cross_entropy,
        make_optimizer=OPTIMIZERS[optimizer],
        make_scheduler=schedule,
        pass_context=stream,
        **options,
    )
    state, expected = pipeline.state_dict(), nn.Sequential(*theirs).state_dict()
    assert list(state) == list(expected)
    if close is None:
        assert losses == pytest.approx(trained.losses, rel=1e-6 if "num_micro_batches" in options else 0, abs=0)
        different = [name for name in expected if not torch.equal(state[name], expected[name])]
        assert not different
    else:
        assert losses == pytest.approx(trained.losses, rel=close)
        for name, value in expected.items():
            torch.testing.assert_close(state[name], value, rtol=close, atol=close)
    initial = dict(nn.Sequential(*model()).named_parameters())
    assert any(not torch.equal(state[name].float(), initial[name].detach()) for name in initial), "nothing was trained"


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(
    ("method", "staleness"),
    [
        (DDG(3), (2, 1, 0)),
        (PipeDream(3), (2, 1, 0)),
        (PipeDream(4), (3, 2, 1, 0)),
        (DSP.minimal(3, activations="stored"), (4, 2, 0)),
        (DSP(staleness=(5, 1, 0), activations="stored", weights="stashed"), (5, 1, 0)),
        (DSP(staleness=(3, 3, 0), activations="stored"), (3, 3, 0)),
    ],
    ids=str,
)
def test_stored_graphs_are_differentiated_with_the_weights_of_their_forward(
    method: Method, staleness: tuple[int, ...], optimizer: str
) -> None:
    compare(method, references.stored_stale, optimizer=optimizer, staleness=staleness, weights="stashed")


@pytest.mark.parametrize("optimizer", ["momentum", "adam", "adam fused"])
@pytest.mark.parametrize("staleness", [(4, 2, 0), (2, 1, 0), (5, 0, 0)])
def test_stored_graphs_with_the_current_weights(staleness: tuple[int, ...], optimizer: str) -> None:
    """To rounding: the reference writes the backward formulas out by hand."""
    method = DSP(staleness=staleness, activations="stored", weights="current")
    compare(method, references.stored_stale, optimizer=optimizer, close=1e-8, staleness=staleness, weights="current")


def test_current_and_stashed_weights_are_not_the_same() -> None:
    """Else the two tests above could not tell them apart."""
    data = batches(14)
    states = [
        train(DSP.minimal(3, activations="stored", weights=weights), net(), data, "momentum")[0].state_dict()
        for weights in ("stashed", "current")
    ]
    assert not torch.equal(states[0]["0.weight"], states[1]["0.weight"])


@pytest.mark.parametrize("beta", [1.0, 0.5])
def test_fdg_shrinks_gradients_at_each_cut(beta: float) -> None:
    compare(FDG(3, beta), references.stored_stale, staleness=(4, 2, 0), weights="stashed", gradient_scale=beta)


@pytest.mark.parametrize("corrections", [(0, None), (8, None), (0, 0.135), (8, 0.135)])
def test_pipemare_corrects_rate_and_weights(corrections: tuple[int, float | None]) -> None:
    annealing, decay = corrections
    compare(
        PipeMare(3, annealing_updates=annealing, discrepancy_decay=decay),
        references.pipemare,
        close=1e-8,
        annealing_updates=annealing or None,
        decay=decay,
    )


@pytest.mark.parametrize("stages", [1, 2, 3, 4])
def test_features_replay_is_recompute_at_one_step_per_stage(stages: int) -> None:
    compare(FeaturesReplay(stages), references.features_replay)


@pytest.mark.parametrize("accumulate", [1, 2, 4, 5])
@pytest.mark.parametrize("staleness", [(4, 2, 0), (0, 0, 0), (3, 3, 0)])
def test_gradients_accumulate_over_batches(staleness: tuple[int, ...], accumulate: int) -> None:
    compare(DSP(staleness=staleness, accumulate=accumulate), references.dsp, staleness=staleness, accumulate=accumulate)


@pytest.mark.parametrize("parts", [1, 2, 3, 8])
@pytest.mark.parametrize("activations", ["recompute", "stored"])
def test_gpipe(parts: int, activations: Any) -> None:
    method = GPipe(3, parts, activations)
    compare(method, references.gpipe, num_micro_batches=parts, recompute=activations == "recompute")


@pytest.mark.parametrize("parts", [1, 2, 3, 8])
@pytest.mark.parametrize("stages", [2, 3, 4])
def test_1f1b(parts: int, stages: int) -> None:
    compare(OneFOneB(stages, parts), references.one_f_one_b, num_micro_batches=parts)


@pytest.mark.parametrize("method", [GPipe(3, 4), GPipe(3, 3, "stored"), OneFOneB(3, 4), OneFOneB(4, 3)], ids=str)
def test_synchronous_micro_batches_give_the_gradients_of_bp(method: Method) -> None:
    """Without BatchNorm, whose statistics are those of a micro-batch. To rounding: sums over samples are split."""
    data = [(images.double(), labels) for images, labels in batches(6)]
    layers = [layer.double() for layer in net(batch_norm=False)]
    ours, _ = train(method, copy.deepcopy(layers), data, "momentum")
    bp, _ = train(BP(method.num_stages), layers, data, "momentum")
    for name, value in bp.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    "method",
    [DDG(3), FeaturesReplay(3), PipeDream(3), DSP.minimal(3, activations="stored"), GPipe(3, 2, "stored")],
    ids=str,
)
def test_random_layers_draw_from_the_documented_streams(method: Method) -> None:
    def model() -> list[nn.Module]:
        return net(dropout=True)

    if isinstance(method, GPipe):
        compare(method, references.gpipe, model=model, num_micro_batches=2, recompute=False)
    elif isinstance(method, FeaturesReplay):
        compare(method, references.features_replay, model=model)
    else:
        compare(method, references.stored_stale, model=model, staleness=tuple(method.staleness), weights="stashed")


@pytest.mark.parametrize("delay", [1, 2, 3])
def test_dni(delay: int) -> None:
    data = batches(14)
    shapes = {0: (8, 6, 8, 8), 1: (8, 6, 4, 4)}

    def make_synthesizer(stage: int) -> nn.Module:
        with random_stream(stream_seed(SEED, stage, -1), torch.device("cpu")):
            return build_synthesizer(torch.empty(shapes[stage]), 1)

    compare(
        DNI(3, target_delay=delay, synthesizer_lr=0.01),
        references.dni,
        count=len(data),
        target_delay=delay,
        make_synthesizer=make_synthesizer,
        make_synthesizer_optimizer=lambda params: torch.optim.Adam(params, lr=0.01),
    )


def test_a_synthesizer_learns_and_a_shallow_net_trains_with_it() -> None:
    generator = torch.Generator().manual_seed(3)
    centres = 2 * torch.randn(5, 10, generator=generator)
    labels = torch.randint(5, (64,), generator=generator)
    data = [(centres[labels] + 0.5 * torch.randn(64, 10, generator=generator), labels) for _ in range(150)]
    torch.manual_seed(0)
    layers = [nn.Linear(10, 16), nn.ReLU(), nn.Linear(16, 5)]
    pipeline = stalewise.Pipeline(
        layers,
        method=DNI(2, synthesizer_lr=0.01),
        loss_fn=nn.functional.cross_entropy,
        optimizer=lambda params: torch.optim.SGD(params, lr=0.1),
        partition=(2,),
        seed=SEED,
    )
    first = layers[0].weight.detach().clone()  # type: ignore[union-attr]
    predictor = pipeline._engine.stages[0].synthesizer  # type: ignore[union-attr]
    errors, losses = [], []
    for loss in pipeline.train(data):
        losses.append(loss)
        if predictor.loss is not None:
            errors.append(float(predictor.loss))
    assert sum(errors[-20:]) < 0.5 * sum(errors[:20])
    assert sum(losses[-20:]) < 0.25 * sum(losses[:20])
    assert not torch.equal(first, layers[0].weight)  # type: ignore[arg-type]


def test_a_forward_dependency_changes_no_number() -> None:
    """FR and DSP with m_k = K-1-k, DDG and PipeDream: the tokens are timing alone."""
    data = batches(9)
    for one, other in ((FeaturesReplay(3), DSP(staleness=(2, 1, 0))), (DDG(3), PipeDream(3))):
        a, b = (train(method, net(), data, "momentum")[0].state_dict() for method in (one, other))
        assert all(torch.equal(a[name], b[name]) for name in a)


def test_fewer_samples_than_micro_batches_are_refused() -> None:
    with pytest.raises(stalewise.ConfigError, match=r"\[3\] samples cannot be split into 4 micro-batches"):
        train(GPipe(2, 4), net(), batches(1, size=3), "momentum")


def test_current_weights_are_refused_under_autocast() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        train(DSP.minimal(2, activations="stored"), net(), batches(4), "momentum")
        with pytest.raises(stalewise.ConfigError, match='weights="current" cannot work under autocast'):
            train(DSP.minimal(2, activations="stored", weights="current"), net(), batches(4), "momentum")
