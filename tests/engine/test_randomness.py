"""Random layers: forward and recompute draw the same numbers, and the caller's own stay as they were."""

from __future__ import annotations

import random
from collections.abc import Iterator
from hashlib import blake2b
from typing import Any

import pytest
import torch
from engine_nets import CPU, assert_same, build_engine, classification, mlp, sgd, train
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from stalewise.engine.randomness import preserved_random_state, random_stream, stream_seed

SMALL = st.integers(0, 2**40)


# --- the documented function ----------------------------------------------------------------------------------


@given(st.integers(-(2**63), 2**64), SMALL, SMALL, st.none() | SMALL)
@settings(deadline=None, derandomize=True)
def test_the_seed_of_a_pass_is_the_documented_function(
    seed: int, stage: int, batch: int, micro_batch: int | None
) -> None:
    digest = blake2b(f"{seed}/{stage}/{batch}/{micro_batch or 0}".encode(), digest_size=8).digest()
    assert stream_seed(seed, stage, batch, micro_batch) == int.from_bytes(digest, "little") // 2
    assert 0 <= stream_seed(seed, stage, batch, micro_batch) < 2**63
    assert stream_seed(seed, stage, batch, None) == stream_seed(seed, stage, batch, 0)


def test_the_seed_of_a_pass_is_pinned() -> None:
    """Other values would change every run with Dropout that somebody wants to repeat."""
    assert stream_seed(0, 0, 0) == 5_854_343_820_274_218_872
    assert stream_seed(1, 2, 3) == 4_132_070_907_298_997_277
    assert stream_seed(1, 2, 3, 4) == 1_159_737_786_199_761_749


def test_every_argument_counts() -> None:
    seeds = [
        stream_seed(*key) for key in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0, 0, 1), (1, 11, 1), (11, 1, 1)]
    ]
    assert len(set(seeds)) == len(seeds)


# --- the context managers -------------------------------------------------------------------------------------


def test_a_stream_is_that_of_its_seed_and_leaves_the_callers_state() -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    before = torch.get_rng_state()
    torch.rand(5)
    with random_stream(7, CPU):
        assert torch.equal(torch.rand(3), expected)
        assert torch.initial_seed() == 7
    after_draw = torch.get_rng_state()
    torch.set_rng_state(before)
    torch.rand(5)
    assert torch.equal(torch.get_rng_state(), after_draw)


@pytest.mark.parametrize("context", [lambda: random_stream(3, CPU), lambda: preserved_random_state(CPU)])
def test_the_callers_state_survives_an_error(context: Any) -> None:
    before = torch.get_rng_state()

    def fail() -> None:
        with context():
            torch.rand(1)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert torch.equal(torch.get_rng_state(), before)


# --- in an engine ---------------------------------------------------------------------------------------------


class Noise(nn.Module):
    """Records what it drew, and whether for a graph."""

    def __init__(self) -> None:
        super().__init__()
        self.drawn: list[tuple[bool, Tensor]] = []

    def forward(self, h: Tensor) -> Tensor:
        noise = torch.rand_like(h)
        self.drawn.append((torch.is_grad_enabled(), noise))
        return h + noise


@pytest.mark.parametrize("drains", [(), (2, 5)])
def test_a_recompute_draws_what_the_forward_of_its_batch_drew(drains: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    layers: list[nn.Module] = [Noise(), nn.Linear(5, 5), Noise(), nn.Linear(5, 3), Noise()]
    engine = build_engine(layers, (3, 1, 0), (2, 4), seed=9)
    batches = classification("mlp", 7)
    for start, end in zip((0, *drains), (*drains, 7), strict=True):
        train(engine, batches[start:end])
    all_drawn = []
    for stage, layer in enumerate((layers[0], layers[2], layers[4])):
        graph_less = [noise for graph, noise in layer.drawn if not graph]
        with_graph = [noise for graph, noise in layer.drawn if graph]
        assert len(with_graph) == 7
        assert len(graph_less) == (0 if stage == 2 else 7)
        for first, second in zip(graph_less, with_graph, strict=False):
            assert torch.equal(first, second)
        for batch, noise in enumerate(with_graph):  # the global index of the batch, over all drains
            with random_stream(stream_seed(9, stage, batch), CPU):
                assert torch.equal(noise, torch.rand_like(noise))
        all_drawn += [noise.flatten()[:3] for noise in with_graph]
    assert len({tuple(noise.tolist()) for noise in all_drawn}) == len(all_drawn)


def test_at_rest_a_recompute_gives_the_output_of_its_forward_bitwise() -> None:
    """At learning rate 0, with Dropout and BatchNorm: the recompute is the stored graph."""
    torch.manual_seed(0)
    block = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Dropout(0.5))
    outputs: list[tuple[bool, Tensor]] = []
    block.register_forward_hook(lambda _m, _i, z: outputs.append((z.requires_grad, z.detach().clone())))
    optimizer = lambda params: torch.optim.SGD(params, lr=0.0)  # noqa: E731
    train(build_engine([block, nn.Linear(8, 3)], (4, 0), (1,), optimizer=optimizer), classification("mlp", 6))
    forwards = [z for graph, z in outputs if not graph]
    recomputes = [z for graph, z in outputs if graph]
    assert len(forwards) == 6
    assert_same(recomputes, forwards)


def test_the_callers_random_state_is_untouched_at_every_point() -> None:
    def states() -> tuple[Any, ...]:
        return torch.get_rng_state().tolist(), random.getstate()

    seen: list[tuple[Any, ...]] = []

    def watched(count: int) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in classification("mlp", count):
            seen.append(states())
            yield batch

    engine = build_engine(mlp(), (2, 1, 0), (2, 5))
    torch.manual_seed(123)
    torch.rand(3)
    before = states()
    for _ in engine.train(watched(5), drain=True):
        seen.append(states())
    engine.evaluate(watched(3), lambda output, target: seen.append(states()) or 0.0)
    assert len(seen) == 5 + 5 + 3 + 3
    assert all(state == before for state in (*seen, states()))


def test_what_the_caller_draws_changes_no_number_and_is_not_changed() -> None:
    """A loader that shuffles and augments with torch's generator gives the batches that it gives without us."""

    def loader() -> Iterator[tuple[Tensor, Tensor]]:
        torch.manual_seed(5)
        for _ in range(6):
            yield torch.randn(4, 5), torch.randint(3, (4,))

    quiet, noisy = build_engine(mlp(), (2, 1, 0), (2, 5)), build_engine(mlp(), (2, 1, 0), (2, 5))
    batches = list(loader())
    losses = train(quiet, batches)
    drawn = []

    def recorded() -> Iterator[tuple[Tensor, Tensor]]:
        for batch in loader():
            drawn.append(batch)
            yield batch

    assert train(noisy, recorded()) == losses
    assert_same(drawn, batches)
    assert_same(noisy.state_dict(), quiet.state_dict())


def test_a_loss_may_draw_too() -> None:
    """The loss belongs to the last stage's pass: it goes on with that stream."""
    drawn: list[Tensor] = []

    def noisy_loss(output: Tensor, target: Tensor) -> Tensor:
        drawn.append(torch.rand(2))
        return cross_entropy(output, target)

    train(
        build_engine([nn.Linear(5, 3)], (0,), (), loss_fn=noisy_loss, optimizer=sgd, seed=4), classification("mlp", 2)
    )
    for batch, noise in enumerate(drawn):
        with random_stream(stream_seed(4, 0, batch), CPU):
            assert torch.equal(noise, torch.rand(2))
