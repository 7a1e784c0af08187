"""The gradient difference is what its definition says, and measuring it changes nothing."""

from __future__ import annotations

import copy
from typing import Any

import dist_methods
import pytest
import torch
from torch import Tensor, nn

import stalewise
from stalewise.methods import DSP, FDG, Method


def layers() -> list[nn.Module]:
    torch.manual_seed(0)
    return [nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)]


def batches(count: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(2)
    return [
        (torch.randn(16, 6, generator=generator), torch.randint(3, (16,), generator=generator)) for _ in range(count)
    ]


def train(method: Method, data: list[Any], *, lr: float = 0.05, every: int | None) -> stalewise.Pipeline:
    pipeline = stalewise.Pipeline(
        layers(),
        method=method,
        loss_fn=nn.functional.cross_entropy,
        optimizer=lambda params: torch.optim.SGD(params, lr=lr),
        partition=(3, 5),
        gradient_difference_every=every,
        seed=0,
    )
    for _ in pipeline.train(data):
        pass
    return pipeline


def test_it_is_the_distance_to_backpropagation_at_the_weights_after_as_many_updates() -> None:
    """Written out for batch 5 of DSP (4,2,0): weights after exactly 5 updates of every stage, its G from the update."""
    data = batches(12)
    difference = dict(train(DSP.minimal(3), data, every=5).gradient_differences)[5]
    snapshots = _snapshots(data)
    before, after = snapshots[5], snapshots[6]
    model = nn.Sequential(*layers())
    model.load_state_dict(before)
    model.train()
    nn.functional.cross_entropy(model(data[5][0]), data[5][1]).backward()
    for stage, names in enumerate((("0", "1"), ("3",), ("5",))):
        distance = length = 0.0
        for name, parameter in model.named_parameters():
            if name.split(".")[0] in names:
                applied = (before[name] - after[name]) / 0.05
                distance += float((parameter.grad - applied).square().sum())
                length += float(parameter.grad.square().sum())
        assert difference[stage] == pytest.approx((distance / length) ** 0.5, rel=1e-3)
        assert (difference[stage] or 0) > 0.005


def _snapshots(data: list[Any]) -> list[dict[str, Tensor]]:
    """The weights of every stage after 0, 1, 2, .. of its updates."""
    pipeline = stalewise.Pipeline(
        layers(),
        method=DSP.minimal(3),
        loss_fn=nn.functional.cross_entropy,
        optimizer=lambda params: torch.optim.SGD(params, lr=0.05),
        partition=(3, 5),
        seed=0,
    )
    snapshots: list[dict[str, Tensor]] = [{} for _ in range(len(data) + 1)]

    def keep() -> None:
        for stage in pipeline._engine.stages:  # type: ignore[union-attr]
            state = copy.deepcopy(stage.module.state_dict())
            snapshots[stage.num_updates].update(state)

    keep()
    for stage in pipeline._engine.stages:  # type: ignore[union-attr]
        stage.optimizer.register_step_post_hook(lambda *_: keep())
    for _ in pipeline.train(data):
        pass
    return snapshots


def test_it_is_zero_where_nothing_is_stale() -> None:
    for _, difference in train(DSP(staleness=(0, 0, 0)), batches(8), every=1).gradient_differences:
        assert difference == [0.0, 0.0, 0.0]


def test_it_vanishes_where_weights_rest() -> None:
    """DSP's gradient is exact whenever the last m_0 updates were zero."""
    for _, difference in train(DSP.minimal(3), batches(9), lr=0.0, every=1).gradient_differences:
        assert difference == pytest.approx([0.0, 0.0, 0.0], abs=1e-6)


def test_a_shrunken_gradient_is_off_by_what_was_taken_away() -> None:
    ((_, difference), *_) = train(FDG(3, 0.5), batches(9), lr=0.0, every=4).gradient_differences
    assert difference == pytest.approx([0.75, 0.5, 0.0], rel=1e-5, abs=1e-6)


def test_every_batch_that_is_due_is_measured_also_those_of_the_drain() -> None:
    measured = [batch for batch, _ in train(DSP.minimal(3), batches(10), every=3).gradient_differences]
    assert measured == [0, 3, 6, 9]


def test_a_stage_without_trained_weights_has_none() -> None:
    pipeline = stalewise.Pipeline(
        [nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3)],
        method=DSP.minimal(3),
        loss_fn=nn.functional.cross_entropy,
        optimizer=lambda params: torch.optim.SGD(params, lr=0.1),
        partition=(1, 2),
        gradient_difference_every=2,
        seed=0,
    )
    for _ in pipeline.train(batches(3)):
        pass
    assert all(difference[1] is None for _, difference in pipeline.gradient_differences)


@pytest.mark.parametrize("variant", [name for name in dist_methods.VARIANTS if name != "dsp accumulate"])
def test_measuring_changes_no_number(variant: str, measured: dict[str, Any], unmeasured: dict[str, Any]) -> None:
    ours, theirs = measured[variant], unmeasured[variant]
    assert ours["losses"] == theirs["losses"]
    assert all(torch.equal(ours["state"][name], value) for name, value in theirs["state"].items())
    assert len(ours["differences"]) > 8
    assert theirs["differences"] == []


@pytest.fixture(scope="module")
def measured() -> dict[str, Any]:
    return dist_methods.train_all(every=5)


@pytest.fixture(scope="module")
def unmeasured() -> dict[str, Any]:
    return dist_methods.train_all(every=None)


def test_it_leaves_the_callers_random_state_alone() -> None:
    pipeline = stalewise.Pipeline(
        [nn.Dropout(0.5), *layers()],
        method=DSP.minimal(3),
        loss_fn=nn.functional.cross_entropy,
        optimizer=lambda params: torch.optim.SGD(params, lr=0.1),
        partition=(3, 5),
        gradient_difference_every=1,
        seed=0,
    )
    state = torch.get_rng_state()
    for _ in pipeline.train(batches(6)):
        pass
    assert torch.equal(torch.get_rng_state(), state)


def test_accumulated_gradients_cannot_be_compared() -> None:
    with pytest.raises(stalewise.ConfigError, match="accumulate=1"):
        train(DSP.minimal(3, accumulate=2), batches(4), every=1)
