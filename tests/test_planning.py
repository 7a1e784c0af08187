"""What is measured before a plan, and pipelines that follow one."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss

from stalewise import DSP, ConfigError, Pipeline, PlanError, planning
from stalewise.engine.split import Chain
from stalewise.plan.partition import LayerCost
from stalewise.planning import measure, optimizer_copies, parse_bytes

CPU = torch.device("cpu")


def layers(count: int = 6) -> list[nn.Module]:
    torch.manual_seed(0)
    return [nn.Linear(4, 4) for _ in range(count)]


def batches(count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    torch.manual_seed(1)
    return [(torch.randn(8, 4), torch.randn(8, 4)) for _ in range(count)]


def pipeline(**options: Any) -> Pipeline:
    return Pipeline(
        layers(),
        **{
            "method": DSP.minimal(3),
            "loss_fn": mse_loss,
            "optimizer": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
            "engine": "sequential",
            "verbose": False,
            **options,
        },
    )


class TestPipeline:
    def test_auto_is_decided_by_the_plan_and_trains_as_if_it_had_been_given(self) -> None:
        planned = pipeline(method=DSP.minimal(3, activations="auto"))
        losses = list(planned.train(batches(6)))
        assert planned.plan is not None
        assert planned.cuts is not None
        decided = planned.plan.method
        assert decided.is_decided
        assert planned.method == decided
        given = pipeline(method=decided, partition=planned.cuts)
        assert list(given.train(batches(6))) == losses

    def test_what_it_holds_is_within_the_limit(self) -> None:
        free = pipeline(method=DSP.minimal(3, activations="stored"), measure_memory=True)
        list(free.train(batches(12)))
        assert free.plan is not None
        assert free.plan.memory is not None
        limit = max(memory.total for memory in free.plan.memory) - 1
        tight = pipeline(method=DSP.minimal(3, activations="auto"), memory_limit=limit, measure_memory=True)
        list(tight.train(batches(12)))
        assert max(memory.total for memory in tight.memory()) <= limit

    def test_a_limit_that_nothing_keeps(self) -> None:
        with pytest.raises(PlanError, match="no plan fits 10 bytes per stage"):
            list(pipeline(memory_limit=10).train(batches(2)))

    def test_a_limit_needs_a_profile(self) -> None:
        with pytest.raises(ConfigError, match=r'memory_limit needs a profile.*Use partition="profile"'):
            pipeline(memory_limit="1GiB", partition=(2, 4))

    def test_auto_needs_a_profile(self) -> None:
        with pytest.raises(ConfigError, match='activations is "auto", which a plan decides'):
            pipeline(method=DSP.minimal(3, activations="auto"), partition=(2, 4))

    def test_given_cuts_are_no_plan(self) -> None:
        assert pipeline(partition=(2, 4)).plan is None

    def test_the_recipe_is_called_for_the_stages_alone_without_a_limit(self) -> None:
        called: list[int] = []

        def recipe(params: list[nn.Parameter]) -> torch.optim.Optimizer:
            called.append(len(params))
            return torch.optim.SGD(params, lr=0.1)

        list(pipeline(optimizer=recipe).train(batches(2)))
        assert len(called) == 3


def cost(forward_s: float, backward_s: float) -> LayerCost:
    return LayerCost(forward_s=forward_s, backward_s=backward_s, parameters=1, name="fc", type="Linear")


class TestMeasure:
    def test_alone(self) -> None:
        measured = measure(Chain(layers()), batches(1)[0], mse_loss, device=CPU, job=None, num_stages=3)
        assert (len(measured.layers), measured.slowdowns) == (6, (1.0, 1.0, 1.0))
        assert (measured.inputs, measured.targets) == (128, 128)
        assert measured.batch(2.0).optimizer_copies == 2.0

    @pytest.mark.parametrize(
        ("of_ranks", "slowdowns"), [((1.0, 3.0, 1.0), (1.0, 3.0, 1.0)), ((1.0, 1.1, 0.95), (1.0, 1.0, 1.0))]
    )
    def test_the_slow_rank_is_seen_and_noise_is_not(
        self, of_ranks: tuple[float, ...], slowdowns: tuple[float, ...], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        own = [cost(1.0, 2.0)] * 6
        everyone = [[vars(cost(1.0 * factor, 2.0 * factor))] * 6 for factor in of_ranks]
        monkeypatch.setattr(planning, "profile_layers", lambda *args, **options: own)
        monkeypatch.setattr(planning, "all_gather_json", lambda value, group: everyone)
        job = cast(Any, SimpleNamespace(group=None))
        measured = measure(Chain(layers()), batches(1)[0], mse_loss, device=CPU, job=job, num_stages=3)
        assert measured.slowdowns == pytest.approx(slowdowns)
        assert measured.layers[0].forward_s == 1.0


@pytest.mark.parametrize(
    ("recipe", "copies"),
    [
        (lambda params: torch.optim.SGD(params, lr=0.1), 0.0),
        (lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9), 1.0),
        (lambda params: torch.optim.AdamW(params), 2.0),
        (lambda params: torch.optim.AdamW(params, amsgrad=True), 3.0),
    ],
)
def test_copies_in_the_state(recipe: Any, copies: float) -> None:
    assert optimizer_copies(recipe) == copies


@pytest.mark.parametrize(
    ("text", "expected"),
    [(17, 17), ("17", 17), ("2GiB", 2 << 30), ("2 gb", 2 * 10**9), ("1.5MiB", 3 << 19), ("64k", 64_000)],
)
def test_bytes(text: int | str, expected: int) -> None:
    assert parse_bytes(text) == expected


@pytest.mark.parametrize("text", ["", "GiB", "-1", "0", 0, -5, True, "2 apples", "1e400", 1.5, None])
def test_what_is_no_number_of_bytes(text: Any) -> None:
    with pytest.raises(ConfigError, match="memory_limit is"):
        parse_bytes(text)
