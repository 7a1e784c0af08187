"""Compiled stages. The backend "aot_eager" traces and splits graphs as any does, and needs no C++ compiler."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_nets import assert_same, classification, cnn, momentum
from torch import Tensor
from torch._dynamo.utils import counters
from torch.nn.functional import cross_entropy

import stalewise
from stalewise.methods import DSP, Method, PipeMare

RECOMPUTE = DSP.minimal(3)
STORED = DSP.minimal(3, activations="stored")
MIXED = DSP.minimal(3, activations=["stored", "recompute", "recompute"])


@pytest.fixture(autouse=True)
def _never_silently_eager(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    monkeypatch.setattr(torch._dynamo.config, "fail_on_recompile_limit_hit", True)
    yield
    torch._dynamo.reset()


def pipeline(method: Method = RECOMPUTE, **options: Any) -> stalewise.Pipeline:
    settings: dict[str, Any] = {"compile": "aot_eager", "partition": (2, 6), "seed": 4, **options}
    return stalewise.Pipeline(cnn(), method=method, loss_fn=cross_entropy, optimizer=momentum, verbose=False, **settings)


def run(pipe: stalewise.Pipeline) -> tuple[list[float], dict[str, Tensor]]:
    return list(pipe.train(classification("cnn", 12))), pipe.state_dict()


def compiled_graphs() -> int:
    return int(counters["stats"]["unique_graphs"])


def close(value: tuple[list[float], dict[str, Tensor]], truth: tuple[list[float], dict[str, Tensor]]) -> None:
    torch.testing.assert_close(value[0], truth[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(value[1], truth[1], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("method", [RECOMPUTE, STORED, MIXED], ids=["recompute", "stored", "mixed"])
def test_it_trains_as_without(method: Method) -> None:
    """Masks of dropout and statistics of BatchNorm included: other ones would be far off."""
    expected = run(pipeline(method, compile=False))
    assert not compiled_graphs()
    compiled = run(pipeline(method))
    assert compiled_graphs() == sum(1 + stage.recomputes for stage in method.program().stages)
    close(compiled, expected)


def test_a_smaller_batch_and_evaluation() -> None:
    scores = []
    for compile in (False, "aot_eager"):
        pipe = pipeline(compile=compile)
        list(pipe.train(classification("cnn", 9, last_size=3)))
        scores.append(pipe.evaluate(classification("cnn", 3), cross_entropy))
    assert scores[0] == pytest.approx(scores[1], rel=1e-4)


def test_under_autocast_with_memory_and_gradient_difference() -> None:
    options: dict[str, Any] = {"autocast": "bfloat16", "measure_memory": True, "gradient_difference_every": 4}
    pipe, plain = pipeline(**options), pipeline(**options, compile=False)
    torch.testing.assert_close(run(pipe)[0], run(plain)[0], rtol=0.02, atol=0.02)
    assert len(pipe.gradient_differences) == 3
    assert all(memory.total > memory.weights > 0 for memory in pipe.memory())


@pytest.mark.parametrize("method", [RECOMPUTE, STORED], ids=["recompute", "stored"])
def test_a_resumed_run_goes_on(method: Method, tmp_path: Path) -> None:
    expected = run(pipeline(method))
    batches = classification("cnn", 12)
    first, second = pipeline(method), pipeline(method)
    losses = list(first.train(batches[:5], drain=False))
    first.save(tmp_path, wait=True)
    second.resume(tmp_path, positioned=True)
    losses += second.train(batches[5:])
    assert_same((losses, second.state_dict()), expected)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_with_the_default_backend() -> None:
    close(run(pipeline(compile=True)), run(pipeline(compile=False)))
    assert compiled_graphs() == 5


@pytest.mark.parametrize("method", [DSP.minimal(3, activations="stored", weights="current"), PipeMare(3)], ids=repr)
def test_current_weights_in_stored_graphs_are_refused(method: Method) -> None:
    with pytest.raises(stalewise.ConfigError, match='weights="current" cannot work with compile'):
        pipeline(method)


def test_an_unknown_backend_and_a_missing_compiler_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(stalewise.ConfigError, match="compile is 'fast'"):
        pipeline(compile="fast")
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(stalewise.ConfigError, match=r"no C\+\+ compiler 'no-such-compiler'"):
        pipeline(compile=True)
