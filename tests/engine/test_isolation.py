"""Nothing that a layer does in place, and no view that it returns, reaches what a stage has stored or sent."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from block import Block
from engine_nets import (
    Batches,
    assert_same,
    build_engine,
    classification,
    cnn,
    model_state,
    momentum,
    sgd,
    train,
)
from reference import train_reference
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from stalewise.errors import ConfigError

STALE = [(0, 0, 0), (2, 1, 0), (4, 2, 0), (3, 3, 0)]


class Apply(nn.Module):
    """A function as a layer."""

    def __init__(self, function: Callable[[Any], Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, h: Any) -> Any:
        return self.function(h)


def assert_like_the_reference(
    make_layers: Callable[[], list[nn.Module]], cuts: tuple[int, ...], staleness: tuple[int, ...], batches: Batches
) -> None:
    """Losses and weights bitwise; the batches untouched."""
    layers, truth = make_layers(), make_layers()
    kept = copy.deepcopy(batches)
    losses = train(engine := build_engine(layers, staleness, cuts), batches)
    expected = train_reference(truth, cuts, staleness, copy.deepcopy(kept), cross_entropy, momentum)
    assert losses == expected.losses
    assert_same(engine.state_dict(), model_state(truth))
    assert_same(batches, kept)
    assert not any(h.requires_grad for h, _ in batches)


# --- layers that work in place --------------------------------------------------------------------------------

IN_PLACE: dict[str, Callable[[], nn.Module]] = {
    "relu": lambda: nn.ReLU(inplace=True),
    "not idempotent": lambda: Apply(lambda h: h.mul_(1.5)),
    "through a view": lambda: Block(nn.Flatten(), Apply(add_to_every_other)),
    "dropout of nothing": lambda: nn.Dropout(0.0, inplace=True),
    "second layer": lambda: Block(nn.Identity(), nn.SiLU(inplace=True)),
}


def add_to_every_other(h: Tensor) -> Tensor:
    h[:, ::2].add_(1.0)
    return h


@pytest.mark.parametrize("staleness", STALE)
@pytest.mark.parametrize("first", IN_PLACE.values(), ids=IN_PLACE)
def test_a_first_layer_in_place_changes_no_stored_input(
    first: Callable[[], nn.Module], staleness: tuple[int, ...]
) -> None:
    """At the start of every stage, also of stage 0, whose input is the caller's batch."""

    def layers() -> list[nn.Module]:
        torch.manual_seed(0)
        return [first(), nn.Linear(5, 5), first(), nn.Linear(5, 5), nn.BatchNorm1d(5), first(), nn.Linear(5, 3)]

    assert_like_the_reference(layers, (2, 5), staleness, classification("mlp", 8))


def test_evaluation_leaves_the_batches_alone_too() -> None:
    batches = classification("mlp", 3)
    kept = copy.deepcopy(batches)
    torch.manual_seed(0)
    engine = build_engine([Apply(lambda h: h.mul_(2.0)), nn.Linear(5, 3)], (2, 0), (1,))
    scores = [engine.evaluate(batches, cross_entropy) for _ in range(2)]
    assert scores[0] == scores[1]
    assert_same(batches, kept)


def test_an_evaluation_does_not_decide_whether_training_copies() -> None:
    """Dropout works in place in training only."""

    def layers() -> list[nn.Module]:
        torch.manual_seed(0)
        return [nn.Linear(5, 5), nn.Dropout(0.5, inplace=True), nn.Linear(5, 5), nn.Linear(5, 3)]

    evaluated, fresh = (build_engine(layers(), (2, 1, 0), (1, 3)) for _ in range(2))
    evaluated.evaluate(classification("mlp", 2), cross_entropy)
    assert train(evaluated, classification("mlp", 6)) == train(fresh, classification("mlp", 6))
    assert_same(evaluated.state_dict(), fresh.state_dict())


def test_the_batch_that_an_in_place_layer_changed_only_later_is_not_silently_lost() -> None:
    """The first pass decides whether to copy; a layer that changes its mind is an error, not a wrong gradient."""
    calls: list[int] = []

    def sometimes(h: Tensor) -> Tensor:
        calls.append(len(calls))
        return h.mul_(2.0) if len(calls) > 4 else h * 2.0

    engine = build_engine([nn.Linear(5, 5), Apply(sometimes), nn.Linear(5, 3)], (4, 2, 0), (1, 2))
    with pytest.raises(ConfigError, match=r"stage 1 changed its input in place in batch 3, but not in its first") as e:
        train(engine, classification("mlp", 8))
    assert "always or never work in place" in str(e.value)


def test_inputs_are_copied_only_where_a_layer_works_in_place() -> None:
    """The price of the guard: a clone per pass where it is needed, none (after the first pass) where it is not."""
    given: dict[str, list[bool]] = {"in place": [], "pure": []}
    batches = classification("mlp", 6)
    addresses = {h.data_ptr() for h, _ in batches}

    def watch(name: str, first: nn.Module) -> nn.Module:
        first.register_forward_pre_hook(lambda _m, args: given[name].append(args[0].data_ptr() in addresses))
        return first

    train(build_engine([watch("in place", nn.ReLU(inplace=True)), nn.Linear(5, 3)], (2, 0), (1,)), batches)
    train(build_engine([watch("pure", nn.ReLU()), nn.Linear(5, 3)], (2, 0), (1,)), batches)
    assert given["in place"] == [False] * 12
    assert given["pure"] == [False] + [True] * 11


# --- outputs that are views, weights, or of another layout ----------------------------------------------------


def with_middle(middle: Callable[[], nn.Module], images: bool = False) -> Callable[[], list[nn.Module]]:
    """Three stages; `middle` is all of stage 1, and stage 2 starts in place."""

    def layers() -> list[nn.Module]:
        torch.manual_seed(0)
        if images:
            return [
                nn.Conv2d(2, 4, 3, padding=1),
                middle(),
                nn.ReLU(inplace=True),
                nn.Conv2d(4, 2, 3, bias=False),
                nn.BatchNorm2d(2),
                nn.Flatten(),
                nn.LazyLinear(3),
            ]
        return [nn.Linear(5, 6), middle(), nn.ReLU(inplace=True), nn.Linear(6, 3)]

    return layers


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "itself": lambda h: h,
    "view": lambda h: h.view_as(h),
    "reshape": lambda h: h.reshape(2, -1).reshape(h.shape),
    "transposed twice": lambda h: h.t().contiguous().t(),
    "flipped": lambda h: h.flip(1),
    "narrow": lambda h: torch.cat([h, h], 1)[:, 2:8],
    "strided": lambda h: torch.stack([h, -h], 2)[:, :, 0],
    "expanded": lambda h: h[:, :1].expand(-1, 6),
}


@pytest.mark.parametrize("staleness", STALE)
@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_a_stage_whose_output_is_a_view(view: Callable[[Tensor], Tensor], staleness: tuple[int, ...]) -> None:
    assert_like_the_reference(with_middle(lambda: Apply(view)), (1, 2), staleness, classification("mlp", 8))


@pytest.mark.parametrize("staleness", STALE)
def test_a_stage_that_hands_the_batch_itself_on(staleness: tuple[int, ...]) -> None:
    """Stage 0 has nothing to train and its output is the caller's tensor."""

    def layers() -> list[nn.Module]:
        torch.manual_seed(0)
        return [nn.Identity(), nn.ReLU(inplace=True), nn.Linear(5, 4), nn.Flatten(), nn.Linear(4, 3)]

    assert_like_the_reference(layers, (1, 3), staleness, classification("mlp", 8))


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "channels last": lambda h: h.contiguous(memory_format=torch.channels_last),
    "permuted": lambda h: h.permute(0, 1, 3, 2),
    "batch last": lambda h: h.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
    "cropped": lambda h: h[:, :, :-1, 1:],
    "one channel of many": lambda h: h[:, ::2].repeat_interleave(2, 1),
}


@pytest.mark.parametrize("staleness", [(0, 0, 0), (4, 2, 0)])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_a_stage_whose_output_has_another_layout(
    layout: Callable[[Tensor], Tensor], staleness: tuple[int, ...]
) -> None:
    batches = classification("cnn", 7)

    def layers() -> list[nn.Module]:
        built = with_middle(lambda: Apply(layout), images=True)()
        with torch.no_grad():  # makes the lazy layer; the running statistics are started again
            nn.Sequential(*built)(batches[0][0])
        built[4].reset_running_stats()
        return built

    assert_like_the_reference(layers, (1, 2), staleness, batches)


def test_dense_layouts_cross_a_cut_as_they_are_and_others_contiguous() -> None:
    arrived: list[tuple[int, ...]] = []
    record = Apply(lambda h: arrived.append(h.stride()) or h)
    for layout in (LAYOUTS["channels last"], LAYOUTS["batch last"], LAYOUTS["cropped"]):
        torch.manual_seed(0)
        layers = [nn.Conv2d(2, 4, 3, padding=1), Apply(layout), record, nn.Flatten(), nn.LazyLinear(3)]
        with torch.no_grad():
            nn.Sequential(*layers)(classification("cnn", 1)[0][0])
        arrived.clear()
        train(build_engine(layers, (2, 1, 0), (1, 2)), classification("cnn", 2))
        expected = layout(torch.empty(4, 4, 4, 4))
        strides = expected.stride() if layout is not LAYOUTS["cropped"] else expected.contiguous().stride()
        assert set(arrived) == {strides}


def test_a_channels_last_model_and_batch_train_as_in_the_reference() -> None:
    def layers() -> list[nn.Module]:
        return [layer.to(memory_format=torch.channels_last) for layer in cnn(dropout=0.0)]

    batches = [(h.contiguous(memory_format=torch.channels_last), y) for h, y in classification("cnn", 8)]
    assert_like_the_reference(layers, (2, 6), (4, 2, 0), batches)


class Bias(nn.Module):
    """Returns its own weight, or a view of it, whatever it is given."""

    def __init__(self, view: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1, 1, 24).reshape(4, 6))
        self.view = view

    def forward(self, h: Tensor) -> Tensor:
        return self.view(self.weight)


@pytest.mark.parametrize("staleness", STALE)
@pytest.mark.parametrize(
    "view",
    [lambda w: w, lambda w: w.view(4, 6), lambda w: w[:3], lambda w: w.detach()],
    ids=["", "view", "part", "detached"],
)
def test_an_output_that_is_a_weight_does_not_change_with_it(
    view: Callable[[Tensor], Tensor], staleness: tuple[int, ...]
) -> None:
    """Stage 1 of three sends its weight; stage 2 stores it for no step, and a fourth stage for several."""
    seen: dict[bool, list[Tensor]] = {False: [], True: []}
    record = Apply(lambda h: seen[torch.is_grad_enabled()].append(h.detach().clone()) or h)
    torch.manual_seed(0)
    layers = [nn.Linear(5, 6), Bias(view), record, nn.Linear(6, 3)]
    values = [layers[1].weight.detach().clone()]
    depths = (*(entry + 3 for entry in staleness[:2]), 3, 0)

    def make_optimizer(params: Any) -> Any:
        optimizer = sgd(params)
        if params[0] is layers[1].weight:
            optimizer.register_step_post_hook(lambda *_: values.append(params[0].detach().clone()))
        return optimizer

    size = len(view(layers[1].weight))
    batches = [(h[:size], target[:size]) for h, target in classification("mlp", 9)]
    train(build_engine(layers, depths, (1, 2, 3), optimizer=make_optimizer), batches)
    assert len(seen[True]) == len(seen[False]) == 9
    for n, (stored, sent) in enumerate(zip(seen[True], seen[False], strict=True)):
        assert torch.equal(sent, view(values[max(0, n - depths[1])]))
        assert torch.equal(stored, sent)


# --- updates and pending graphs -------------------------------------------------------------------------------


@pytest.mark.parametrize("staleness", STALE)
def test_no_update_changes_weights_between_a_graph_and_its_backward(staleness: tuple[int, ...]) -> None:
    """Weights that a graph saved have the version, and the values, of its forward when it is backwarded."""
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 3)]
    checked: list[int] = []

    class Checked(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, h: Tensor, weight: Tensor, stage: int) -> Tensor:
            ctx.weight, ctx.version, ctx.copy, ctx.stage = weight, weight._version, weight.detach().clone(), stage
            return h.clone()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
            assert ctx.weight._version == ctx.version
            assert torch.equal(ctx.weight, ctx.copy)
            checked.append(ctx.stage)
            return gradient, None, None

    for stage, layer in enumerate(layers):
        layer.register_forward_hook(lambda m, _, z, stage=stage: Checked.apply(z, m.weight, stage))
    train(build_engine(layers, staleness, (1, 2)), classification("mlp", 7))
    assert sorted(checked) == [0] * 7 + [1] * 7 + [2] * 7
