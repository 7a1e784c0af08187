"""A model as a chain: names and layers of the unsplit model, and what may not be cut apart."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import pytest
import torch
from engine_nets import assert_same, cnn
from torch import Tensor, nn

from stalewise.engine.split import Chain
from stalewise.errors import ConfigError, PlanError

CUTS = [(), (1,), (3, 4), (1, 2, 8)]


@pytest.mark.parametrize("cuts", CUTS)
@pytest.mark.parametrize("as_list", [False, True])
def test_the_stages_together_are_the_unsplit_model(cuts: tuple[int, ...], as_list: bool) -> None:
    layers = cnn()
    chain = Chain(layers if as_list else nn.Sequential(*layers))
    stages = [chain.build(cuts, stage) for stage in range(len(cuts) + 1)]
    assert [layer for stage in stages for layer in stage] == layers
    state = [item for stage in stages for item in stage.state_dict().items()]
    assert_same(dict(state), dict(nn.Sequential(*layers).state_dict()))
    names = [name for stage in stages for name, _ in stage.named_parameters()]
    assert names == [name for name, _ in nn.Sequential(*layers).named_parameters()]


def test_named_layers_keep_their_names() -> None:
    model = nn.Sequential(OrderedDict(stem=nn.Linear(2, 2), body=nn.Sequential(nn.Linear(2, 2)), head=nn.Linear(2, 1)))
    chain = Chain(model)
    assert chain.names == ("stem", "body.0", "head")
    assert len(chain) == 3
    assert list(chain.build((1,), 1).state_dict()) == ["body.0.weight", "body.0.bias", "head.weight", "head.bias"]


def nested() -> nn.Sequential:
    inner = nn.Sequential(OrderedDict(a=nn.Linear(2, 3), b=nn.Sequential(nn.Tanh(), nn.Linear(3, 3))))
    return nn.Sequential(OrderedDict(stem=nn.Linear(2, 2), body=inner, head=nn.Sequential(nn.Linear(3, 1))))


@pytest.mark.parametrize("cuts", [(1,), (2,), (3,), (1, 2, 3, 4)])
def test_a_model_is_cut_inside_of_nested_chains(cuts: tuple[int, ...]) -> None:
    model = nested()
    chain = Chain(model)
    assert chain.names == ("stem", "body.a", "body.b.0", "body.b.1", "head.0")
    h = expected = torch.randn(3, 2)
    state: dict[str, Tensor] = {}
    for stage in range(len(cuts) + 1):
        module = chain.build(cuts, stage)
        h = module(h)
        state |= module.state_dict()
    assert torch.equal(h, model(expected))
    assert_same(state, dict(model.state_dict()))


def test_chains_in_a_list_are_opened_too() -> None:
    assert Chain([nn.Linear(2, 2), nn.Sequential(nn.Tanh(), nn.Tanh())]).names == ("0", "1.0", "1.1")


def test_what_is_more_than_a_chain_stays_whole() -> None:
    class Doubled(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    hooked = nn.Sequential(nn.Tanh())
    hooked.register_forward_hook(lambda module, args, output: output + 1)
    weighted = nn.Sequential(nn.Tanh())
    weighted.register_parameter("scale", nn.Parameter(torch.ones(())))
    model = nn.Sequential(Doubled(nn.Tanh()), hooked, weighted, nn.Sequential())
    assert Chain(model).names == ("0", "1", "2", "3")


def test_a_module_that_stands_twice_in_a_model_runs_twice() -> None:
    """`nn.Sequential(linear, act, linear, act)` is a common model, and `named_children` hides the second `act`."""
    act = nn.Tanh()
    model = nn.Sequential(nn.Linear(2, 2), act, nn.Linear(2, 2), act)
    chain = Chain(model)
    assert chain.layers == tuple(model)
    assert chain.names == ("0", "1", "2", "3")
    h = torch.randn(3, 2)
    assert torch.equal(chain.build((2,), 1)(chain.build((2,), 0)(h)), model(h))


def test_factories_are_called_only_for_their_stage() -> None:
    called: list[str] = []

    def factory(name: str) -> Any:
        def build() -> nn.Module:
            called.append(name)
            return nn.Linear(2, 2)

        return build

    chain = Chain([factory("a"), nn.Linear(2, 2), factory("b"), factory("c")])
    assert called == []
    stage = chain.build((1, 3), 1)
    assert called == ["b"]
    assert list(stage.state_dict()) == ["1.weight", "1.bias", "2.weight", "2.bias"]


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Linear(2, 2), "model is a Linear; it must be an nn.Sequential or a list of modules"),
        (nn.ModuleList([nn.Linear(2, 2)]), "model is a ModuleList; it must be an nn.Sequential or a list of modules"),
        (3, "model is a int; it must be"),
        (None, "model is a NoneType; it must be"),
        (iter([nn.Linear(2, 2)]), "model is a list_iterator; it must be"),
        ([nn.Linear(2, 2), 5], "layer 1 of the model is a int; each must be a module or a function"),
        ("ab", "layer 0 of the model is a str; each must be"),
        ([], "the model has no layers; give at least one."),
        (nn.Sequential(), "the model has no layers; give at least one."),
    ],
)
def test_what_is_no_chain_is_refused(model: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Chain(model)
    assert str(caught.value).startswith(message)


def test_a_sequential_with_a_forward_of_its_own_is_refused() -> None:
    """Its layers one after another are not what it computes."""

    class Residual(nn.Sequential):
        def forward(self, h: Tensor) -> Tensor:
            return h + super().forward(h)

    class Plain(nn.Sequential):
        pass

    assert len(Chain(Plain(nn.Linear(2, 2)))) == 1
    assert len(Chain([Residual(nn.Linear(2, 2))])) == 1  # as a layer it is welcome
    with pytest.raises(ConfigError, match="Residual"):
        Chain(Residual(nn.Linear(2, 2), nn.Linear(2, 2)))


def test_a_factory_returns_a_module() -> None:
    chain = Chain([nn.Linear(2, 2), lambda: 3])
    with pytest.raises(ConfigError, match=r"the factory of layer 1 returned a int; it must return a module\."):
        chain.build((1,), 1)


def tied() -> nn.Sequential:
    model = nn.Sequential(OrderedDict(a=nn.Linear(2, 2), b=nn.Sequential(nn.Linear(2, 2)), c=nn.Linear(2, 2)))
    model.b[0].weight = model.a.weight
    return model


def with_shared_buffer() -> nn.Sequential:
    model = nn.Sequential(OrderedDict(a=nn.BatchNorm1d(2), b=nn.Sequential(nn.BatchNorm1d(2)), c=nn.Linear(2, 2)))
    model.b[0].running_mean = model.a.running_mean
    return model


@pytest.mark.parametrize(("make", "leaf"), [(tied, "weight"), (with_shared_buffer, "running_mean")])
def test_tensors_shared_across_stages_are_refused_by_name(make: Any, leaf: str) -> None:
    chain = Chain(make())
    chain.check_nothing_shared((2,))
    chain.check_nothing_shared(())
    for cuts, stage in (((1,), 1), ((1, 2), 1)):
        with pytest.raises(PlanError) as caught:
            chain.check_nothing_shared(cuts)
        assert str(caught.value).startswith(
            f"'a.{leaf}' (stage 0) and 'b.0.{leaf}' (stage {stage}) are the same tensor; a stage owns its weights"
        )
        assert "Move the cut so that both are on one side" in str(caught.value)


def test_a_module_with_weights_that_stands_in_two_stages_is_refused() -> None:
    layer = nn.Linear(2, 2)
    with pytest.raises(PlanError, match=r"'0\.weight' \(stage 0\) and '2\.weight' \(stage 1\) are the same tensor"):
        Chain([layer, nn.Tanh(), layer]).check_nothing_shared((2,))


def test_the_description_tells_models_apart() -> None:
    def lines(*layers: Any) -> list[str]:
        return Chain(list(layers)).describe()

    assert lines(nn.Linear(2, 3), nn.Tanh()) == ["0:Linear:weight(3, 2),bias(3,)", "1:Tanh:"]
    assert lines(lambda: nn.Linear(2, 3)) == ["0:factory"]
    assert lines(nn.Linear(2, 3)) == lines(nn.Linear(2, 3))
    assert lines(nn.Linear(2, 3)) != lines(nn.Linear(3, 2))
    assert lines(nn.Tanh()) != lines(nn.ReLU())
