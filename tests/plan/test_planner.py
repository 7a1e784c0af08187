"""The plan against a search through all cuts and all that stages can keep."""

from __future__ import annotations

import re
from itertools import combinations, pairwise, product
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stalewise.errors import ConfigError, PlanError
from stalewise.methods import DSP, build_method
from stalewise.methods.method import Method
from stalewise.plan.memory import predict_memory
from stalewise.plan.partition import LayerCost, fixed_partition
from stalewise.plan.planner import HEADROOM, BatchBytes, Link, plan_stages

BATCH = BatchBytes(inputs=1000, targets=10)


def layer(forward_s: float, backward_s: float, *, graph: int = 300, output: int = 100, weights: int = 50) -> LayerCost:
    return LayerCost(
        forward_s=forward_s,
        backward_s=backward_s,
        output_bytes=output,
        graph_bytes=graph,
        unsaved_output_bytes=output // 2,
        saved_input_bytes=output,
        changes_input=False,
        weight_bytes=weights,
        gradient_bytes=weights,
        saved_weight_bytes=weights // 2,
        parameters=weights // 4,
        name="fc",
        type="Linear",
    )


def needs(layers: list[LayerCost], method: Method, cuts: tuple[int, ...]) -> list[int]:
    plan = fixed_partition(layers, cuts, recompute=[stage.recomputes for stage in method.program().stages])
    memory = predict_memory(
        plan,
        method.program(),
        input_bytes=BATCH.inputs,
        target_bytes=BATCH.targets,
        optimizer_copies=BATCH.optimizer_copies,
        timing="slow",
    )
    return [held.total for held in memory]


def seconds(layers: list[LayerCost], method: Method, cuts: tuple[int, ...], slowdowns: list[float]) -> list[float]:
    spans = pairwise((0, *cuts, len(layers)))
    return [
        slowdown * sum(x.forward_s * (2 if stage.recomputes else 1) + x.backward_s for x in layers[start:end])  # type: ignore[operator,misc]
        for (start, end), stage, slowdown in zip(spans, method.program().stages, slowdowns, strict=True)
    ]


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[LayerCost], DSP, list[float], int | None]:
    num_stages = draw(st.integers(1, 3))
    sizes = st.integers(0, 2000)
    layers = [
        layer(
            draw(st.integers(0, 9)),
            draw(st.integers(0, 9)),
            graph=draw(sizes),
            output=draw(st.integers(0, 200)),
            weights=draw(sizes),
        )
        for _ in range(draw(st.integers(num_stages, 6)))
    ]
    steps = draw(st.lists(st.integers(0, 3), min_size=num_stages - 1, max_size=num_stages - 1))
    staleness = [sum(steps[stage:]) for stage in range(num_stages)]
    slowdowns = draw(st.lists(st.sampled_from([1.0, 2.0, 3.0]), min_size=num_stages, max_size=num_stages))
    limit = draw(st.none() | st.integers(2000, 30000))
    return layers, DSP(staleness=staleness, activations="auto"), slowdowns, limit


@settings(max_examples=60, deadline=None)
@given(problems())
def test_no_plan_is_faster_and_none_as_fast_holds_less(
    problem: tuple[list[LayerCost], DSP, list[float], int | None],
) -> None:
    layers, method, slowdowns, limit = problem
    found: dict[tuple[tuple[int, ...], tuple[str, ...]], tuple[list[float], list[int]]] = {}
    for cuts in combinations(range(1, len(layers)), method.num_stages - 1):
        for kept in product(("recompute", "stored"), repeat=method.num_stages):
            decided = method.with_activations(kept)  # type: ignore[arg-type]
            held = needs(layers, decided, cuts)
            if limit is None or max(held) <= limit:
                found[cuts, kept] = seconds(layers, decided, cuts, slowdowns), held
    if not found:
        with pytest.raises(PlanError, match="no plan fits"):
            plan_stages(layers, method, batch=BATCH, memory_limit=limit, slowdowns=slowdowns)
        return
    plan = plan_stages(layers, method, batch=BATCH, memory_limit=limit, slowdowns=slowdowns)
    best = min(max(times) for times, _ in found.values())
    assert max(plan.stage_s) == pytest.approx(best)  # type: ignore[type-var]
    assert plan.memory is not None
    held = [memory.total for memory in plan.memory]
    assert held == needs(layers, plan.method, plan.partition.cuts)
    assert limit is None or max(held) <= limit

    def has_headroom(cuts: tuple[int, ...], kept: tuple[str, ...], times: list[float]) -> bool:
        """Whether no stage recomputes near the slowest one though it could store."""
        for stage, (how, time) in enumerate(zip(kept, times, strict=True)):
            other = (*kept[:stage], "stored", *kept[stage + 1 :])
            if how == "recompute" and time > HEADROOM * best and (cuts, other) in found:
                return False
        return True

    least = min(
        sum(held)
        for (cuts, kept), (times, held) in found.items()
        if max(times) <= best and has_headroom(cuts, kept, times)
    )
    assert sum(held) <= least


def test_only_stages_near_the_slowest_one_store() -> None:
    layers = [layer(1, 2), layer(1, 2), layer(4, 8), layer(1, 1)]
    plan = plan_stages(layers, DSP.minimal(3, activations="auto"), batch=BATCH)
    # The long layer decides with 12 s even where it stores; the first two take 8 s with a recompute.
    assert plan.partition.cuts == (2, 3)
    assert plan.activations == ("recompute", "stored", None)
    assert plan.method == DSP.minimal(3, activations=("recompute", "stored", "recompute"))
    assert plan.stage_s == (8, 12, 2)


def test_without_a_limit_and_sizes_the_fewest_stages_store() -> None:
    layers = [LayerCost(forward_s=1, backward_s=2, parameters=1, name="fc", type="Linear")] * 7
    plan = plan_stages(layers, DSP.minimal(3, activations="auto"))
    assert (plan.partition.cuts, plan.activations, plan.memory) == ((2, 4), ("recompute", "recompute", None), None)


def test_less_memory_means_recompute() -> None:
    layers = [layer(1, 2, graph=10_000) for _ in range(9)]
    method = DSP.minimal(3, activations="auto")
    stored = plan_stages(layers, method, batch=BATCH)
    assert stored.activations == ("stored", "stored", None)
    assert stored.memory is not None
    limit = max(memory.total for memory in stored.memory) - 1
    tighter = plan_stages(layers, method, batch=BATCH, memory_limit=limit)
    assert "recompute" in tighter.activations
    assert max(tighter.stage_s) > max(stored.stage_s)  # type: ignore[type-var]


def test_the_message_says_what_would_fit() -> None:
    layers = [layer(1, 2, graph=10_000) for _ in range(6)]
    method = DSP.minimal(3)
    with pytest.raises(PlanError, match="no plan fits 1,000 bytes per stage however the model is cut") as error:
        plan_stages(layers, method, batch=BATCH, memory_limit=1000)
    needed = int(re.findall(r"needs ([\d,]+)", str(error.value))[0].replace(",", ""))
    plan_stages(layers, method, batch=BATCH, memory_limit=needed)
    with pytest.raises(PlanError, match="no plan fits"):
        plan_stages(layers, method, batch=BATCH, memory_limit=needed - 1)


def test_a_slow_device_gets_less_to_do() -> None:
    layers = [layer(0, 1) for _ in range(12)]
    method = build_method("pipedream", num_stages=3)
    assert plan_stages(layers, method, batch=BATCH).partition.cuts == (4, 8)
    slow = plan_stages(layers, method, batch=BATCH, slowdowns=(1, 2, 1))
    assert slow.partition.cuts == (5, 7)
    assert slow.stage_s == (5, 4, 5)


def test_a_slow_link_is_not_put_where_much_crosses_it() -> None:
    layers = [layer(0, 1, output=100), layer(0, 1, output=900), layer(0, 1, output=100), layer(0, 1)]
    method = build_method("pipedream", num_stages=2)
    assert plan_stages(layers, method, batch=BATCH).partition.cuts == (2,)
    slow = plan_stages(layers, method, batch=BATCH, link=Link(bytes_per_s=100))
    assert slow.partition.cuts == (1,)
    assert slow.link_s == (1.0,)


def test_given_cuts_keep_their_place() -> None:
    layers = [layer(1, 2) for _ in range(9)]
    plan = plan_stages(layers, DSP.minimal(3, activations="auto"), batch=BATCH, cuts=(1, 2))
    assert plan.partition.cuts == (1, 2)
    assert plan.activations == ("recompute", "recompute", None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"slowdowns": (1, 2)}, "give a factor above 0 for each of the 3 stages"),
        ({"slowdowns": (1, 0, 1)}, "give a factor above 0"),
        ({"memory_limit": 10, "batch": None}, "nothing can be held to it"),
        ({"cuts": (2, 1)}, "do not grow"),
    ],
)
def test_what_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        plan_stages([layer(1, 1)] * 4, DSP.minimal(3), **{"batch": BATCH, **arguments})


def test_too_few_layers() -> None:
    with pytest.raises(PlanError, match="2 layers cannot fill 3 stages"):
        plan_stages([layer(1, 1)] * 2, DSP.minimal(3))


def test_a_link_must_carry_something() -> None:
    with pytest.raises(PlanError, match="a rate above 0"):
        Link(bytes_per_s=0)


def test_an_undecided_method_has_no_program() -> None:
    with pytest.raises(ConfigError, match='"auto", which a plan decides'):
        DSP.minimal(3, activations="auto").program()
