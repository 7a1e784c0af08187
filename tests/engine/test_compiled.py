"""Compiled stages. The backend "aot_eager" traces and splits graphs as any does, and needs no C++ compiler."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_nets import CURRENT_IN_GRAPHS, assert_same, classification, cnn, momentum
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.nn.functional import cross_entropy

import stalewise
from stalewise.methods import DSP, GPipe, Method

RECOMPUTE = DSP.minimal(3)
STORED = DSP.minimal(3, activations="stored")
MIXED = DSP.minimal(3, activations=["stored", "recompute", "recompute"])


@pytest.fixture(autouse=True)
def _never_silently_eager(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    caplog.set_level(logging.WARNING, "torch.__trace")
    torch._dynamo.reset()
    counters.clear()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        yield
    torch._dynamo.reset()


def pipeline(method: Method = RECOMPUTE, *, channels_last: bool = False, **options: Any) -> stalewise.Pipeline:
    settings: dict[str, Any] = {"compile": "aot_eager", "partition": (2, 6), "seed": 4, **options}
    layers = cnn()
    if channels_last:
        nn.Sequential(*layers).to(memory_format=torch.channels_last)
    return stalewise.Pipeline(
        layers, method=method, loss_fn=cross_entropy, optimizer=momentum, verbose=False, **settings
    )


def run(pipe: stalewise.Pipeline) -> tuple[list[float], dict[str, Tensor]]:
    return list(pipe.train(classification("cnn", 12))), pipe.state_dict()


def compiled_graphs() -> int:
    return int(counters["stats"]["unique_graphs"])


@pytest.mark.parametrize("method", [RECOMPUTE, STORED, MIXED], ids=["recompute", "stored", "mixed"])
def test_it_trains_as_without(method: Method) -> None:
    """Masks of dropout and statistics of BatchNorm included: this backend computes what eager mode does."""
    expected = run(pipeline(method, compile=False))
    assert not compiled_graphs()
    compiled = run(pipeline(method))
    assert compiled_graphs() == sum(1 + stage.recomputes for stage in method.program().stages)
    assert_same(compiled, expected)


def test_smaller_batches_micro_batches_and_evaluation() -> None:
    seen = []
    for compile in (False, "eager"):
        pipe = pipeline(GPipe(3, 2), compile=compile)
        losses = list(pipe.train(classification("cnn", 5, last_size=3)))
        seen.append((losses, pipe.evaluate(classification("cnn", 3), cross_entropy), pipe.state_dict()))
    assert compiled_graphs()
    assert_same(seen[1], seen[0])


def test_with_channels_last_memory_and_gradient_difference() -> None:
    options: dict[str, Any] = {"channels_last": True, "measure_memory": True, "gradient_difference_every": 4}
    pipe, plain = pipeline(MIXED, **options), pipeline(MIXED, compile=False, **options)
    assert_same(run(pipe), run(plain))
    assert compiled_graphs() == 4
    assert pipe.gradient_differences == plain.gradient_differences
    assert [memory.graphs > 0 for memory in pipe.memory()] == [True, True, True]


def test_under_autocast() -> None:
    """Bitwise where only calls are traced; where graphs are split, bfloat16 rounds elsewhere."""
    options: dict[str, Any] = {"autocast": "bfloat16", "channels_last": True}
    expected = run(pipeline(MIXED, compile=False, **options))
    assert_same(run(pipeline(MIXED, compile="eager", **options)), expected)
    assert compiled_graphs() == 4
    losses, _ = run(pipeline(MIXED, **options))
    assert losses == pytest.approx(expected[0], abs=0.02)


def test_a_resumed_run_goes_on(tmp_path: Path) -> None:
    expected = run(pipeline(MIXED, compile=False))
    batches = classification("cnn", 12)
    first, second = pipeline(MIXED), pipeline(MIXED)
    losses = list(first.train(batches[:5], drain=False))
    first.save(tmp_path, wait=True)
    second.resume(tmp_path, positioned=True)
    losses += second.train(batches[5:])
    assert_same((losses, second.state_dict()), expected)


@pytest.mark.parametrize("method", CURRENT_IN_GRAPHS.values(), ids=CURRENT_IN_GRAPHS)
def test_current_weights_in_stored_graphs_are_refused(method: Method) -> None:
    with pytest.raises(stalewise.ConfigError, match='weights="current" cannot work with compile'):
        pipeline(method, partition="profile")


@pytest.mark.parametrize("backend", ["fast", 3, ["eager"]])
def test_an_unknown_backend_is_refused(backend: Any) -> None:
    with pytest.raises(stalewise.ConfigError, match=r"compile is .*; it must be True, False, or one of"):
        pipeline(compile=backend)


def test_a_missing_compiler_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(stalewise.ConfigError, match=r"no C\+\+ compiler 'no-such-compiler'"):
        pipeline(compile=True)
