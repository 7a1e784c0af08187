"""Saved state: the unsplit model's names, copies, and a continuation that is bitwise the run without a stop."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from engine_nets import (
    adamw,
    assert_same,
    build_engine,
    classification,
    cnn,
    decay,
    model_state,
    momentum,
    train,
)
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer

from stalewise.engine.sequential import SequentialEngine
from stalewise.errors import ConfigError


def other_values() -> list[nn.Module]:
    """A network of the same shape whose weights and buffers all differ."""
    layers = cnn(dropout=0.0)
    with torch.no_grad():
        for value in nn.Sequential(*layers).state_dict().values():
            value.add_(1)
    return layers


def saved(engine: SequentialEngine) -> Any:
    """State through a file, as a checkpoint would."""
    file = io.BytesIO()
    torch.save([engine.state_dict(), engine.optimizer_state_dict()], file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_names_and_order_are_those_of_the_unsplit_model() -> None:
    layers = cnn()
    layers.insert(1, nn.Sequential(nn.Dropout(), nn.BatchNorm2d(4)))
    layers[1][1].register_buffer("unsaved", torch.zeros(1), persistent=False)
    engine = build_engine(layers, (4, 2, 0), (2, 6))
    assert_same(engine.state_dict(), dict(nn.Sequential(*layers).state_dict()))
    assert all(value.device.type == "cpu" and not value.requires_grad for value in engine.state_dict().values())


@pytest.mark.parametrize("make_optimizer", [momentum, adamw])
@pytest.mark.parametrize("staleness", [(0, 0, 0), (2, 1, 0), (4, 2, 0)])
def test_a_run_in_two_processes_is_the_run_in_one(
    staleness: tuple[int, ...], make_optimizer: Callable[[Any], Optimizer]
) -> None:
    batches = classification("cnn", 12)
    whole = build_engine(cnn(dropout=0.0), staleness, (2, 6), optimizer=make_optimizer)
    losses = train(whole, batches[:5]) + train(whole, batches[5:])
    first = build_engine(cnn(dropout=0.0), staleness, (2, 6), optimizer=make_optimizer)
    halves = train(first, batches[:5])
    second = build_engine(other_values(), staleness, (2, 6), optimizer=make_optimizer)
    weights, optimizer = saved(first)
    second.load_state_dict(weights)
    second.load_optimizer_state_dict(optimizer)
    assert_same(second.optimizer_state_dict(), first.optimizer_state_dict())
    halves += train(second, batches[5:])
    assert halves == losses
    assert_same(second.state_dict(), whole.state_dict())
    assert_same(second.optimizer_state_dict(), whole.optimizer_state_dict())


def plain_groups(name: str, parameter: nn.Parameter) -> dict[str, Any]:
    return {"weight_decay": 0.0} if parameter.ndim == 1 else {}


@pytest.mark.parametrize("make_optimizer", [momentum, adamw])
@pytest.mark.parametrize("param_groups", [None, plain_groups])
@pytest.mark.parametrize("cuts", [((2, 6), (5,)), ((5,), (1, 4, 8)), ((4,), ()), ((), (1, 2))])
def test_a_run_that_is_cut_anew_halfway_is_the_plain_loop(
    cuts: tuple[tuple[int, ...], tuple[int, ...]], param_groups: Any, make_optimizer: Callable[[Any], Optimizer]
) -> None:
    """Without staleness the cuts change no number, so neither does changing them."""
    batches = classification("cnn", 8)
    options = {"param_groups": param_groups, "optimizer": make_optimizer}
    before, after = (
        build_engine(make(), (0,) * (len(c) + 1), c, **options)
        for c, make in zip(cuts, [lambda: cnn(dropout=0.0), other_values], strict=True)
    )
    losses = train(before, batches[:4])
    weights, optimizer = saved(before)
    after.load_state_dict(weights)
    after.load_optimizer_state_dict(optimizer)
    losses += train(after, batches[4:])
    truth = nn.Sequential(*cnn(dropout=0.0))
    named = truth.named_parameters()
    plain = make_optimizer([{"params": [p], **(param_groups(n, p) if param_groups else {})} for n, p in named])
    expected = []
    for h, target in batches:
        plain.zero_grad()
        loss = cross_entropy(truth(h), target)
        loss.backward()
        plain.step()
        expected.append(loss.item())
    assert losses == expected
    assert_same(after.state_dict(), dict(truth.state_dict()))
    states = after.optimizer_state_dict()["state"]
    assert_same(
        {n: states[n] for n, _ in truth.named_parameters()},
        {n: dict(plain.state[p]) for n, p in truth.named_parameters()},
    )


def test_the_learning_rate_that_a_schedule_reached_is_loaded() -> None:
    first = build_engine(cnn(), (2, 0), (5,), lr_scheduler=decay)
    train(first, classification("cnn", 3))
    second = build_engine(cnn(), (0, 0, 0), (2, 6))
    second.load_optimizer_state_dict(first.optimizer_state_dict())
    assert second.learning_rate == first.learning_rate == 0.05 * 0.8**3
    assert [stage.learning_rate for stage in second.stages] == [first.learning_rate] * 3


def test_optimizer_state_is_torchs_layout_with_names_for_indices() -> None:
    engine = build_engine(cnn(), (2, 0), (5,), optimizer=adamw, param_groups=plain_groups)
    assert engine.optimizer_state_dict()["state"] == {}
    train(engine, classification("cnn", 2))
    state = engine.optimizer_state_dict()
    assert [group["params"] for group in state["param_groups"]] == [
        ["0.weight", "4.weight"],
        ["1.weight", "1.bias", "4.bias"],
        ["5.weight", "5.bias", "8.bias"],
        ["8.weight"],
    ]
    assert sorted(state["state"]) == sorted(name for name, _ in nn.Sequential(*cnn()).named_parameters())
    for name, parameter in nn.Sequential(*cnn()).named_parameters():
        assert state["state"][name]["exp_avg"].shape == parameter.shape
        assert state["state"][name]["step"] == 2


def test_loading_copies_into_the_tensors_that_are_there() -> None:
    """Optimizers, tied layers and the user's own references go on with the same tensors."""
    layers = cnn()
    engine = build_engine(layers, (2, 0), (5,))
    objects = list(nn.Sequential(*layers).state_dict(keep_vars=True).values())
    state = model_state(other_values())
    kept = copy.deepcopy(state)
    engine.load_state_dict(state)
    assert [id(v) for v in nn.Sequential(*layers).state_dict(keep_vars=True).values()] == [id(v) for v in objects]
    assert_same(engine.state_dict(), kept)
    train(engine, classification("cnn", 2))
    assert_same(state, kept)
    assert not torch.equal(engine.state_dict()["0.weight"], kept["0.weight"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda state: state.pop("5.weight"),
            r"^the state has no value for '5\.weight' of stage 1; it must hold every name of the unsplit model\. Load",
        ),
        (
            lambda state: [state.pop(name) for name in list(state) if name.startswith("5.")],
            r"^the state has no value for '5\.weight' and 4 more of stage 1; ",
        ),
        (
            lambda state: state.update({"8.bias": torch.zeros(4)}),
            r"^'8\.bias' is of shape \(3,\) in the model and \(4,\) in the state; load a state of the same model\.",
        ),
    ],
)
def test_a_state_of_another_model_is_refused_and_the_stage_keeps_its_values(
    change: Callable[[dict[str, Any]], Any], message: str
) -> None:
    engine = build_engine(cnn(), (2, 0), (5,))
    before = engine.state_dict()
    state = model_state(other_values())
    change(state)
    with pytest.raises(ConfigError, match=message):
        engine.load_state_dict(state)
    after = engine.state_dict()
    of_stage_1 = [name for name in after if name[0] in "5678"]
    assert_same({name: after[name] for name in of_stage_1}, {name: before[name] for name in of_stage_1})


def test_an_optimizer_state_of_another_model_is_refused() -> None:
    engine = build_engine(cnn(), (2, 0), (5,))
    state = engine.optimizer_state_dict()
    state["param_groups"][1]["params"].remove("8.bias")
    with pytest.raises(
        ConfigError, match=r"has no group with '8\.bias' of stage 1; load an optimizer_state_dict\(\) of"
    ):
        engine.load_optimizer_state_dict(state)
