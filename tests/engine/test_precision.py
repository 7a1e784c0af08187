"""Autocast: around forward, recompute and loss of every stage, and around nothing else."""

from __future__ import annotations

import copy
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_nets import CURRENT_IN_GRAPHS, Batches, assert_same, classification, cnn, momentum
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import stalewise
from stalewise.methods import BP, DSP, GPipe, Method
from stalewise.plan.memory import predict_memory

CUTS = (2, 6)
RECOMPUTE = DSP.minimal(3)
STORED = DSP.minimal(3, activations="stored")
MIXED = DSP.minimal(3, activations=["stored", "recompute", "recompute"])


def pipeline(method: Method = RECOMPUTE, *, dropout: float = 0.3, **options: Any) -> stalewise.Pipeline:
    settings: dict[str, Any] = {"autocast": "bfloat16", "partition": CUTS, "seed": 4, **options}
    return stalewise.Pipeline(
        cnn(dropout=dropout), method=method, loss_fn=cross_entropy, optimizer=momentum, verbose=False, **settings
    )


def run(pipe: stalewise.Pipeline, count: int = 12) -> tuple[list[float], dict[str, Tensor]]:
    return list(pipe.train(classification("cnn", count))), pipe.state_dict()


def region() -> torch.autocast:
    return torch.autocast("cpu", dtype=torch.bfloat16)


def plain_loop(batches: Batches, layers: list[nn.Module]) -> list[float]:
    """The loop that torch's manual shows; weights leave the pass of a stage as they came, so casts are per pass."""
    model = nn.Sequential(*layers)
    optimizer = momentum(model.parameters())
    losses = []
    for inputs, target in batches:
        with region():
            loss = cross_entropy(model(inputs), target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("method", [BP(3), DSP(staleness=(0, 0, 0))], ids=repr)
def test_without_staleness_it_is_the_plain_loop_under_autocast(method: Method) -> None:
    batches, truth = classification("cnn", 8), cnn(dropout=0.0)
    pipe = pipeline(method, dropout=0.0)
    losses = list(pipe.train(batches))
    assert losses == plain_loop(batches, truth)
    assert_same(pipe.state_dict(), nn.Sequential(*truth).state_dict())
    assert losses != list(pipeline(method, dropout=0.0, autocast=None).train(batches))


def reference(method: Method, batches: Batches) -> tuple[list[float], dict[str, Tensor]]:
    """DSP by hand: stage by stage, each step as the listing of the method says; no dropout, no drain but at the end."""
    layers = cnn(dropout=0.0)
    stages = [nn.Sequential(*layers[a:b]) for a, b in pairwise((0, *CUTS, len(layers)))]
    optimizers = [momentum(stage.parameters()) for stage in stages]
    recomputes = [stage.recomputes for stage in method.program().stages]
    inputs: list[dict[int, Tensor]] = [{} for _ in stages]
    graphs: list[dict[int, tuple[Tensor, Tensor]]] = [{} for _ in stages]
    gradients: list[dict[int, Tensor]] = [{} for _ in stages]
    losses = []

    def forward(k: int, j: int) -> Tensor:
        given = inputs[k][j].detach().requires_grad_(k > 0)
        with region():
            # a leaf of its own per version of the weights, as stashing keeps them
            weights = {name: value + 0 for name, value in stages[k].named_parameters()}
            output: Tensor = torch.func.functional_call(stages[k], weights, (given.clone(),))
            if k == len(stages) - 1:
                output = cross_entropy(output, batches[j][1])
        graphs[k][j] = given, output
        return output

    for n in range(len(batches) + method.staleness[0]):
        for k, stage in enumerate(stages):
            if n < len(batches):
                inputs[k][n] = batches[n][0] if k == 0 else inputs[k][n]
                if recomputes[k]:
                    with torch.no_grad(), region():
                        sent = copy.deepcopy(stage)(inputs[k][n])
                else:
                    sent = forward(k, n).detach()
                if k + 1 < len(stages):
                    inputs[k + 1][n] = sent
                else:
                    losses.append(sent.item())
        for k in reversed(range(len(stages))):
            j = n - method.staleness[k]
            if not 0 <= j < len(batches):
                continue
            if recomputes[k]:
                forward(k, j)
            given, output = graphs[k].pop(j)
            output.backward(gradients[k].pop(j) if k + 1 < len(stages) else None)
            if k:
                assert given.grad is not None
                gradients[k - 1][j] = given.grad
            optimizers[k].step()
            optimizers[k].zero_grad()
    state = {
        name: value
        for stage, start in zip(stages, (0, *CUTS), strict=True)
        for name, value in [
            (f"{start + int(key.split('.', 1)[0])}.{key.split('.', 1)[1]}", value)
            for key, value in stage.state_dict().items()
        ]
    }
    return losses, state


@pytest.mark.parametrize("method", [RECOMPUTE, STORED, MIXED], ids=["recompute", "stored", "mixed"])
def test_it_is_the_method_by_hand(method: Method) -> None:
    batches = classification("cnn", 12)
    pipe = pipeline(method, dropout=0.0)
    losses = list(pipe.train(batches))
    expected, state = reference(method, batches)
    assert losses == expected
    assert_same(pipe.state_dict(), state)


def test_what_crosses_a_cut_is_half_as_large_and_weights_are_not() -> None:
    half, full = pipeline(partition=(1, 5)), pipeline(partition=(1, 5), autocast=None)
    for pipe in (half, full):
        run(pipe)
    target = 12 * 4 * 8  # batches, samples, bytes of a label
    loss = 12 * 4
    above, below = [pipe.bytes_sent() for pipe in (half, full)]
    assert 2 * (above[0] - target) == below[0] - target
    assert 2 * (above[2] - loss) == below[2] - loss
    assert {value.dtype for value in half.state_dict().values()} == {torch.float32, torch.int64}
    states = half.optimizer_state_dict()["state"].values()
    assert {value.dtype for state in states for value in state.values() if isinstance(value, Tensor)} == {torch.float32}


def test_evaluation_is_under_autocast_metric_too() -> None:
    seen: list[tuple[torch.dtype, bool]] = []

    def metric(output: Tensor, target: Tensor) -> float:
        seen.append((output.dtype, torch.is_autocast_enabled("cpu")))
        return 1.0

    pipe = pipeline()
    pipe.evaluate(classification("cnn", 2), metric)
    assert seen == [(torch.bfloat16, True)] * 2


def test_backward_and_update_are_outside() -> None:
    seen: list[bool] = []
    layers = cnn(dropout=0.0)
    layers[4].register_full_backward_hook(lambda *_: seen.append(torch.is_autocast_enabled("cpu")))

    def optimizer(params: Any) -> torch.optim.Optimizer:
        built = momentum(params)
        built.register_step_pre_hook(lambda *_: seen.append(torch.is_autocast_enabled("cpu")))
        return built

    pipe = stalewise.Pipeline(
        layers, method=RECOMPUTE, loss_fn=cross_entropy, optimizer=optimizer, partition=(3, 6), autocast="bfloat16"
    )
    list(pipe.train(classification("cnn", 3)))
    assert seen
    assert not any(seen)


@pytest.mark.parametrize("method", [RECOMPUTE, STORED], ids=["recompute", "stored"])
def test_an_autocast_of_the_callers_gives_the_same_numbers(method: Method) -> None:
    """Torch keeps casted weights until the outermost autocast ends; a pass must not meet those of an older update."""
    expected = run(pipeline(method))
    with region():
        assert_same(run(pipeline(method, autocast=None)), expected)
        assert_same(run(pipeline(method)), expected)


def test_gradient_difference_is_zero_without_staleness_and_changes_nothing() -> None:
    exact = pipeline(BP(3), gradient_difference_every=3)
    run(exact)
    assert [stages for _, stages in exact.gradient_differences] == [[0.0, 0.0, 0.0]] * 4
    stale = pipeline(gradient_difference_every=3)
    assert_same(run(stale), run(pipeline()))
    assert all(value is not None and value > 0 for _, stages in stale.gradient_differences[1:] for value in stages[:1])


@pytest.mark.parametrize("method", [RECOMPUTE, STORED, GPipe(3, 2)], ids=["recompute", "stored", "gpipe"])
def test_memory_is_measured_and_predicted(method: Method) -> None:
    pipe = pipeline(method, partition="profile", measure_memory=True)
    assert_same(run(pipe), run(pipeline(method, partition=pipe.cuts)))
    assert pipe.partition is not None
    inputs, targets = classification("cnn", 1)[0]
    predicted = predict_memory(
        pipe.partition, pipe.method.program(), input_bytes=inputs.nbytes, target_bytes=targets.nbytes
    )
    full = pipeline(method, partition=pipe.cuts, measure_memory=True, autocast=None)
    run(full)
    for half, whole, expected in zip(pipe.memory(), full.memory(), predicted, strict=True):
        assert half.weights == whole.weights
        assert half.total == pytest.approx(expected.total, rel=0.35)


@pytest.mark.parametrize("method", CURRENT_IN_GRAPHS.values(), ids=CURRENT_IN_GRAPHS)
@pytest.mark.parametrize("partition", ["profile", CUTS])
def test_current_weights_in_stored_graphs_are_refused_when_it_is_built(method: Method, partition: Any) -> None:
    with pytest.raises(stalewise.ConfigError, match="weights=\"current\" cannot work under autocast='bfloat16'"):
        pipeline(method, partition=partition)


@pytest.mark.parametrize(
    ("autocast", "message"),
    [("float16", "small gradients vanish"), ("half", 'must be "bfloat16" or None'), (torch.bfloat16, "must be")],
)
def test_other_precisions_are_refused(autocast: Any, message: str) -> None:
    with pytest.raises(stalewise.ConfigError, match=message):
        pipeline(autocast=autocast)


@pytest.mark.parametrize("method", [RECOMPUTE, STORED, MIXED], ids=["recompute", "stored", "mixed"])
def test_a_resumed_run_goes_on_bitwise(method: Method, tmp_path: Path) -> None:
    expected = run(pipeline(method))
    batches = classification("cnn", 12)
    first, second = pipeline(method), pipeline(method)
    losses = list(first.train(batches[:5], drain=False))
    first.save(tmp_path, wait=True)
    second.resume(tmp_path, positioned=True)
    losses += second.train(batches[5:])
    assert_same((losses, second.state_dict()), expected)
