"""The sequential engine computes what docs/methods.md says: bitwise the same as the straight-line reference."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from engine_nets import (
    NETS,
    Batches,
    adamw,
    assert_same,
    build_engine,
    classification,
    decay,
    documented_streams,
    model_state,
    momentum,
    nesterov,
    reference_optimizer_state,
    sgd,
    stairs,
    train,
    train_in_parts,
)
from hypothesis import event, given, settings
from hypothesis import strategies as st
from reference import train_reference
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from stalewise.methods import BP, DSP, Method
from stalewise.protocol.actions import Kind


@dataclass(frozen=True)
class Run:
    net: str
    staleness: tuple[int, ...]
    cuts: tuple[int, ...]
    count: int
    last_size: int
    drains: frozenset[int]
    pauses: frozenset[int]
    optimizer: Callable[[Any], Optimizer]
    scheduler: Callable[[Optimizer], LRScheduler] | None
    clip_grad_norm: float | None
    seed: int


@st.composite
def runs(draw: st.DrawFn) -> Run:
    net = draw(st.sampled_from(sorted(NETS)))
    staleness = (*sorted(draw(st.lists(st.integers(0, 10), max_size=3)), reverse=True), 0)
    cut = st.integers(1, len(NETS[net]()) - 1)
    cuts = draw(st.lists(cut, unique=True, min_size=len(staleness) - 1, max_size=len(staleness) - 1))
    count = draw(st.integers(1, 14))
    stops = st.frozensets(st.integers(1, count), max_size=2)
    return Run(
        net,
        staleness,
        tuple(sorted(cuts)),
        count,
        draw(st.integers(2, 4)),
        draw(stops),
        draw(stops),
        draw(st.sampled_from([sgd, momentum, nesterov, adamw])),
        draw(st.sampled_from([None, decay, stairs])),
        draw(st.sampled_from([None, 0.05])),
        draw(st.integers(0, 5)),
    )


@given(runs())
@settings(deadline=None, derandomize=True, max_examples=120)
def test_losses_weights_buffers_and_optimizers_are_bitwise_those_of_the_reference(run: Run) -> None:
    event(f"{run.optimizer.__name__}, K = {len(run.staleness)}")
    layers, truth = NETS[run.net](), NETS[run.net]()
    batches = classification(run.net, run.count, last_size=run.last_size)
    engine = build_engine(
        layers,
        run.staleness,
        run.cuts,
        optimizer=run.optimizer,
        lr_scheduler=run.scheduler,
        clip_grad_norm=run.clip_grad_norm,
        seed=run.seed,
    )
    losses = train_in_parts(engine, batches, drains=run.drains, pauses=run.pauses - run.drains)
    expected = train_reference(
        truth,
        run.cuts,
        run.staleness,
        copy.deepcopy(batches),
        cross_entropy,
        run.optimizer,
        run.scheduler,
        drains=tuple(run.drains),
        clip_grad_norm=run.clip_grad_norm,
        pass_context=documented_streams(run.seed),
    )
    assert losses == expected.losses
    assert_same(engine.state_dict(), model_state(truth))
    assert_same(engine.optimizer_state_dict(), reference_optimizer_state(expected, truth, run.cuts))


# --- guards of the comparison above ---------------------------------------------------------------------------


def trained(
    staleness: tuple[int, ...],
    *,
    net: str = "cnn",
    cuts: tuple[int, ...] = (2, 6),
    drains: tuple[int, ...] = (),
    **options: Any,
) -> tuple[list[float], dict[str, torch.Tensor]]:
    engine = build_engine(NETS[net](), staleness, cuts, **options)
    return train_in_parts(engine, classification(net, 12), drains=drains), engine.state_dict()


def test_staleness_cuts_drains_seed_and_clipping_change_the_numbers() -> None:
    """So equality to the reference means something: each argument of a run has an effect on the last loss."""
    variants = [
        trained((4, 2, 0)),
        trained((0, 0, 0)),
        trained((3, 2, 0)),
        trained((4, 1, 0)),
        trained((4, 2, 0), cuts=(1, 6)),
        trained((4, 2, 0), drains=(6,)),
        trained((4, 2, 0), seed=1),
        trained((4, 2, 0), clip_grad_norm=0.05),
        trained((4, 2, 0), lr_scheduler=decay),
        trained((4, 2, 0), optimizer=nesterov),
    ]
    assert len({losses[-1] for losses, _ in variants}) == len(variants)
    initial = model_state(NETS["cnn"]())
    for _, state in variants:
        assert not any(torch.equal(value, initial[name]) for name, value in state.items())


# --- staleness 0 is backpropagation ---------------------------------------------------------------------------


def plain_loop(
    layers: list[nn.Module],
    batches: Batches,
    make_optimizer: Callable[[Any], Optimizer],
    make_scheduler: Callable[[Optimizer], LRScheduler],
) -> tuple[list[float], Optimizer]:
    """The loop that everybody writes, over the unsplit model and with one optimizer."""
    model = nn.Sequential(*layers)
    optimizer = make_optimizer(model.parameters())
    scheduler = make_scheduler(optimizer)
    losses = []
    for inputs, target in batches:
        optimizer.zero_grad()
        loss = cross_entropy(model(inputs), target)
        loss.backward()
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
    return losses, optimizer


@pytest.mark.parametrize("make_optimizer", [sgd, momentum, nesterov, adamw])
@pytest.mark.parametrize(
    ("method", "cuts"),
    [
        (BP(1), ()),
        (BP(3), (2, 6)),
        (DSP(staleness=(0,)), ()),
        (DSP(staleness=(0, 0)), (4,)),
        (DSP(staleness=(0, 0, 0, 0)), (1, 3, 8)),
    ],
    ids=repr,
)
@pytest.mark.parametrize("net", ["cnn", "mlp"])
def test_without_staleness_it_is_the_plain_loop_over_the_unsplit_model(
    net: str, method: Method, cuts: tuple[int, ...], make_optimizer: Callable[[Any], Optimizer]
) -> None:
    cuts = tuple(min(cut, len(NETS[net]()) - 1) for cut in cuts)
    layers, truth = NETS[net](dropout=0.0), NETS[net](dropout=0.0)
    batches = classification(net, 8, last_size=3)
    engine = build_engine(layers, method, cuts, optimizer=make_optimizer, lr_scheduler=decay)
    losses = train(engine, batches)
    expected, optimizer = plain_loop(truth, batches, make_optimizer, decay)
    assert losses == expected
    assert_same(engine.state_dict(), model_state(truth))
    states = engine.optimizer_state_dict()["state"]
    for name, parameter in nn.Sequential(*truth).named_parameters():
        assert_same(states.get(name, {}), dict(optimizer.state[parameter]), name)


def test_draining_after_every_batch_is_the_plain_loop_too() -> None:
    layers, truth = NETS["cnn"](dropout=0.0), NETS["cnn"](dropout=0.0)
    batches = classification("cnn", 5)
    engine = build_engine(layers, (4, 2, 0), (2, 6), lr_scheduler=decay)
    losses = train_in_parts(engine, batches, drains=range(1, 6))
    assert losses == plain_loop(truth, batches, momentum, decay)[0]
    assert_same(engine.state_dict(), model_state(truth))


# --- what the numbers do not depend on ------------------------------------------------------------------------


@pytest.mark.parametrize("queue", [(0, 0, 0), (2, 0, 0), (1, 1, 0), (2, 2, 0)])
def test_the_queue_changes_no_number(queue: tuple[int, ...]) -> None:
    losses, state = trained((4, 2, 0))
    engine = build_engine(NETS["cnn"](), DSP(staleness=(4, 2, 0), queue=queue), (2, 6))
    assert train(engine, classification("cnn", 12)) == losses
    assert_same(engine.state_dict(), state)


@pytest.mark.parametrize("pauses", [(), (1,), (2, 3), (11,), tuple(range(1, 12))])
def test_a_pause_changes_no_number(pauses: tuple[int, ...]) -> None:
    losses, state = trained((4, 2, 0))
    engine = build_engine(NETS["cnn"](), (4, 2, 0), (2, 6))
    assert train_in_parts(engine, classification("cnn", 12), pauses=pauses) == losses
    assert_same(engine.state_dict(), state)


def test_two_runs_are_bitwise_equal() -> None:
    assert_same(trained((4, 2, 0)), trained((4, 2, 0)))


# --- what the engine did is what the program says -------------------------------------------------------------


@given(st.lists(st.integers(0, 6), max_size=3), st.integers(1, 8), st.frozensets(st.integers(1, 8), max_size=2))
@settings(deadline=None, derandomize=True, max_examples=25)
def test_traces_hold_the_actions_of_the_program_in_order(depths: list[int], count: int, stops: frozenset[int]) -> None:
    staleness = (*sorted(depths, reverse=True), 0)
    engine = build_engine(NETS["mlp"](), staleness, range(1, len(staleness)))
    drains = {stop for stop in stops if stop < count}
    train_in_parts(engine, classification("mlp", count), drains=drains)
    for stage, trace in enumerate(engine.traces()):
        expected: list[tuple[Kind, int]] = []
        for start, end in zip([0, *sorted(drains)], [*sorted(drains), count], strict=True):
            last = start
            for action in engine.program.stages[stage].actions(end - start):
                last = last if action.batch is None else start + action.batch
                expected.append((action.kind, last))
        assert [(span.kind, span.batch) for span in trace] == expected
        assert all(span.stage == stage and span.start_ns <= span.end_ns for span in trace)


def test_each_pass_sees_the_weights_of_its_update() -> None:
    """Step n of a stage runs with the weights after max(0, n - m) updates; the recompute of batch j with those of j."""
    layers = NETS["mlp"](dropout=0.0)
    staleness, cuts, count = (4, 2, 0), (2, 6), 9
    firsts = [layers[0], layers[2], layers[6]]
    weights: list[list[torch.Tensor]] = [[] for _ in staleness]
    for k, first in enumerate(firsts):
        first.register_forward_pre_hook(
            lambda module, _, k=k: weights[k].append((torch.is_grad_enabled(), module.weight.detach().clone()))
        )
    after: list[list[torch.Tensor]] = [[first.weight.detach().clone()] for first in firsts]

    def make_optimizer(params: Any) -> Optimizer:
        optimizer = momentum(params)
        k = next(k for k, first in enumerate(firsts) if first.weight is params[0])
        optimizer.register_step_post_hook(lambda *_: after[k].append(params[0].detach().clone()))
        return optimizer

    train(build_engine(layers, staleness, cuts, optimizer=make_optimizer), classification("mlp", count))
    for k, m in enumerate(staleness):
        expected = []
        for n in range(count + m):
            if n < count and m:
                expected.append((False, max(0, n - m)))
            if n >= m:
                expected.append((True, n - m))
        assert len(weights[k]) == len(expected)
        for (graph, weight), (with_graph, updates) in zip(weights[k], expected, strict=True):
            assert graph == with_graph
            assert torch.equal(weight, after[k][updates])
        assert not any(torch.equal(a, b) for a, b in zip(after[k], after[k][1:], strict=False))
