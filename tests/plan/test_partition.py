"""What a partition reports, and which cuts are refused with which words."""

from __future__ import annotations

import inspect
import json
import re
from types import ModuleType
from typing import Any

import pytest

import stalewise.plan.partition
import stalewise.plan.split
from stalewise.errors import PlanError
from stalewise.plan.partition import LayerCost, Partition, check_cuts, fixed_partition, partition


def layer(forward_s: float | None, backward_s: float | None, **other: Any) -> LayerCost:
    defaults = {"output_bytes": 64, "parameters": 1000, "name": "fc", "type": "Linear"}
    return LayerCost(forward_s=forward_s, backward_s=backward_s, **(defaults | other))


def example() -> Partition:
    layers = [layer(0.001 * (1 + index % 2), 0.004, name=f"fc{index}") for index in range(4)]
    return fixed_partition([*layers, layer(0.5, 0.25, parameters=1_234_567)], (1, 4), recompute=(True, False, False))


class TestPartition:
    def test_equal_layers_leave_more_of_them_to_the_stage_without_recompute(self) -> None:
        plan = partition([layer(0.001, 0.002)] * 11, recompute=[True, True, False])
        assert plan.cuts == (3, 6)
        assert plan.stage_costs_s == pytest.approx((0.012, 0.012, 0.015))
        assert (plan.slowest_stage, plan.num_stages) == (2, 3)
        assert plan.predicted_step_s == pytest.approx(0.015)
        assert plan.balance == pytest.approx(13 / 15)

    def test_backward_is_weighed_too(self) -> None:
        plan = partition([layer(1, 9), layer(1, 0), layer(1, 0), layer(1, 0)], recompute=[False, False])
        assert plan.cuts == (1,)

    def test_one_stage_takes_all(self) -> None:
        plan = partition([layer(1, 2)] * 3, recompute=[False])
        assert (plan.cuts, plan.stage_costs_s, plan.balance) == ((), (9,), 1.0)

    def test_free_layers_are_balanced(self) -> None:
        assert partition([layer(0, 0)] * 3, recompute=[True, False]).balance == 1.0

    @pytest.mark.parametrize(
        ("num_layers", "num_stages", "message"),
        [
            (
                12,
                16,
                "12 layers cannot fill 16 stages; each stage needs at least one. Use --stages 12 or fewer.",
            ),
            (1, 2, "1 layer cannot fill 2 stages; each stage needs at least one. Use --stages 1."),
            (0, 2, "the model has no layers; each stage needs at least one. Give a model with layers."),
            (3, 0, "0 stages were asked for; a model runs on at least one. Use --stages 1 or more."),
        ],
    )
    def test_too_few_layers(self, num_layers: int, num_stages: int, message: str) -> None:
        with pytest.raises(PlanError, match=re.escape(message)):
            partition([layer(1, 1)] * num_layers, recompute=[True] * num_stages)

    @pytest.mark.parametrize(("forward_s", "backward_s", "missing"), [(None, 1.0, "forward"), (1.0, None, "backward")])
    def test_unknown_times_are_refused(self, forward_s: float | None, backward_s: float | None, missing: str) -> None:
        layers = [layer(1, 1), layer(forward_s, backward_s, name="head")]
        with pytest.raises(PlanError, match=rf"layer 1 \(head, Linear\) has no known {missing} time.*Profile"):
            partition(layers, recompute=[True, False])

    @pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
    @pytest.mark.parametrize(
        "field",
        [
            "forward_s",
            "backward_s",
            "output_bytes",
            "parameters",
            "graph_bytes",
            "unsaved_output_bytes",
            "saved_input_bytes",
            "weight_bytes",
            "gradient_bytes",
            "saved_weight_bytes",
        ],
    )
    def test_costs_that_are_none(self, field: str, value: float) -> None:
        with pytest.raises(PlanError, match=f"{field} of layer 'fc' is {value}"):
            layer(**({"forward_s": 1.0, "backward_s": 1.0} | {field: value}))


class TestReports:
    def test_table(self) -> None:
        assert example().table().splitlines() == [
            "stage  layers  parameters  forward ms  recompute ms  backward ms  total ms  share of slowest",
            "    0     0-0       1,000       1.000         1.000        4.000     6.000              0.8%",
            "    1     1-3       3,000       5.000         0.000       12.000    17.000              2.3%",
            "    2     4-4   1,234,567     500.000         0.000      250.000   750.000            100.0%",
        ]

    def test_table_of_unknown_costs(self) -> None:
        layers = [layer(None, None, output_bytes=None), layer(0.001, None), layer(0.001, 0.002)]
        plan = fixed_partition(layers, (1, 2), recompute=(True, True, False))
        assert plan.table().splitlines() == [
            "stage  layers  parameters  forward ms  recompute ms  backward ms  total ms  share of slowest",
            "    0     0-0       1,000           ?             ?            ?         ?                 ?",
            "    1     1-1       1,000       1.000         1.000            ?         ?                 ?",
            "    2     2-2       1,000       1.000         0.000        2.000     3.000                 ?",
        ]
        assert (plan.predicted_step_s, plan.slowest_stage, plan.balance) == (None, None, None)
        assert plan.stage_costs_s == (None, None, pytest.approx(0.003))
        assert [stage["predicted_s"] for stage in plan.as_dict()["stages"]] == [
            None,
            None,
            pytest.approx(0.003),
        ]

    def test_table_of_free_layers(self) -> None:
        rows = fixed_partition([layer(0, 0)] * 2, (1,), recompute=(True, False)).table().splitlines()
        assert all(row.endswith(" 0.0%") for row in rows[1:])

    def test_dict_is_json(self) -> None:
        plan = example().as_dict()
        assert json.loads(json.dumps(plan, allow_nan=False)) == plan
        assert plan["cuts"] == [1, 4]
        assert [entry["stage"] for entry in plan["layers"]] == [0, 1, 1, 1, 2]
        assert plan["layers"][1] == {
            "index": 1,
            "name": "fc1",
            "type": "Linear",
            "parameters": 1000,
            "stage": 1,
            "forward_s": 0.002,
            "backward_s": 0.004,
            "output_bytes": 64,
            "graph_bytes": None,
            "unsaved_output_bytes": None,
            "saved_input_bytes": None,
            "weight_bytes": None,
            "gradient_bytes": None,
            "saved_weight_bytes": None,
            "changes_input": None,
        }
        assert plan["stages"] == [
            {"stage": 0, "layers": [0, 1], "parameters": 1000, "predicted_s": pytest.approx(0.006)},
            {"stage": 1, "layers": [1, 4], "parameters": 3000, "predicted_s": pytest.approx(0.017)},
            {"stage": 2, "layers": [4, 5], "parameters": 1_234_567, "predicted_s": pytest.approx(0.75)},
        ]


class TestCuts:
    @pytest.mark.parametrize(
        ("cuts", "num_layers", "num_stages"), [((), 5, 1), ([1], 2, 2), ((1, 2, 3), 4, 4), ((3, 9), 12, 3)]
    )
    def test_valid(self, cuts: Any, num_layers: int, num_stages: int) -> None:
        assert check_cuts(cuts, num_layers, num_stages) == tuple(cuts)

    @pytest.mark.parametrize(
        ("cuts", "message"),
        [
            (3, "cuts is 3; it must name the first layer of each stage but stage 0, such as (4, 8)."),
            (
                (3.0, 8),
                "cuts[0] is 3.0; a cut is the index of a stage's first layer, so it must be an integer.",
            ),
            ((3, True), "cuts[1] is True; a cut is the index"),
            ("48", "cuts[0] is '4'; a cut is the index"),
            ((3,), "cuts (3,) make 2 stages of 12 layers; 3 stages need 2 of them, such as (4, 8)."),
            (
                (1, 2, 3),
                "cuts (1, 2, 3) make 4 stages of 12 layers; 3 stages need 2 of them, such as (4, 8).",
            ),
            (
                (0, 8),
                "cuts[0] is 0; with 12 layers a cut lies between 1 and 11, so that no stage is empty. 3 st",
            ),
            ((4, 12), "cuts[1] is 12; with 12 layers a cut lies between 1 and 11"),
            (
                (8, 4),
                "cuts (8, 4) do not grow from cuts[0] to cuts[1]; they must grow strictly, so that no stage ",
            ),
            ((8, 4), "Did you mean (4, 8)?"),
            ((5, 5), "Did you mean (4, 8)?"),
        ],
    )
    def test_refused(self, cuts: Any, message: str) -> None:
        with pytest.raises(PlanError, match=re.escape(message)):
            check_cuts(cuts, 12, 3)

    def test_what_is_proposed_is_valid(self) -> None:
        for num_layers in range(1, 20):
            for num_stages in range(1, num_layers + 1):
                with pytest.raises(PlanError) as caught:
                    check_cuts((0.5,), num_layers, num_stages)  # type: ignore[arg-type]
                proposed = tuple(int(cut) for cut in re.findall(r"\d+", str(caught.value).rsplit("(", 1)[1]))
                assert check_cuts(proposed, num_layers, num_stages) == proposed

    def test_fixed_partition_checks_them(self) -> None:
        with pytest.raises(PlanError, match="do not grow"):
            fixed_partition([layer(1, 1)] * 4, (2, 2), recompute=(True, True, False))
        with pytest.raises(PlanError, match=r"4 layers cannot fill 5 stages"):
            fixed_partition([layer(1, 1)] * 4, (1, 2, 3, 4), recompute=(True,) * 5)


@pytest.mark.parametrize("module", [stalewise.plan, stalewise.plan.partition, stalewise.plan.split])
def test_planning_needs_no_torch(module: ModuleType) -> None:
    names = [line.split()[1] for line in inspect.getsource(module).splitlines() if re.match("from|import", line)]
    assert not any(name.split(".")[0] == "torch" for name in names)
    assert {name for name in names if name.startswith("stalewise")} <= {
        "stalewise.errors",
        "stalewise.plan.split",
    }
