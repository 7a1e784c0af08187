"""What layers keep, and what follows for stages: by hand, and against what the engine measures.

Where sizes are made up, a stage's are powers of ten, so that a sum shows what it is made of.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from stalewise import BP, DSP, Pipeline, PlanError
from stalewise.errors import ProgramError
from stalewise.methods import GPipe, PipeMare, build_method
from stalewise.methods.method import Method
from stalewise.models import build_model
from stalewise.plan.layer_graph import Ends, LayerGraph, ends_of_chain
from stalewise.plan.memory import StageMemory, predict_memory
from stalewise.plan.partition import LayerCost, fixed_partition
from stalewise.plan.profile import profile_layers
from stalewise.plan.storage import storages
from stalewise.protocol.program import Program


class TestStageMemory:
    def test_total_dict_and_maximum(self) -> None:
        one = StageMemory(weights=1, stashed=20, inputs=300)
        other = StageMemory(weights=2, stashed=10, queues=4000)
        assert (one.total, other.total) == (321, 4012)
        assert one.as_dict() == {
            "weights": 1,
            "stashed": 20,
            "optimizer": 0,
            "gradients": 0,
            "inputs": 300,
            "graphs": 0,
            "queues": 0,
            "total": 321,
        }
        assert one.maximum(other) == StageMemory(weights=2, stashed=20, inputs=300, queues=4000)


class TestStorages:
    def test_views_share_theirs(self) -> None:
        whole = torch.zeros(10)
        assert list(storages([whole, whole[2:4], whole.detach(), whole.view(2, 5)]).values()) == [40]
        assert list(storages([whole[2:4]]).values()) == [40]
        assert sorted(storages([whole, whole.clone(), torch.zeros(3, dtype=torch.int64)]).values()) == [24, 40, 40]

    def test_expanded_and_empty(self) -> None:
        assert list(storages([torch.zeros(1).expand(100)]).values()) == [4]
        assert storages([torch.zeros(0), torch.zeros(0, 5)]) == {}

    def test_sparse(self) -> None:
        sparse = torch.sparse_coo_tensor(torch.tensor([[0, 2]]), torch.tensor([1.0, 2.0]), (4,), check_invariants=True)
        assert sorted(storages([sparse]).values()) == [8, 16]


def measured(layers: Sequence[nn.Module], inputs: Any, targets: Any = None, loss: Any = None) -> list[LayerCost]:
    return profile_layers(
        layers,
        inputs,
        torch.zeros(()) if targets is None else targets,
        loss or (lambda output, _: output.sum()),
        device="cpu",
        names=[str(index) for index in range(len(layers))],
        repeats=1,
    )


class TestLayers:
    """Batches of 16 float32: 64 bytes a feature."""

    def test_linear_relu_chain(self) -> None:
        layers = [nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 6), nn.Linear(6, 3)]
        costs = measured(layers, torch.randn(16, 5), torch.randint(3, (16,)), cross_entropy)
        # A linear layer needs its input, and, where that has a gradient, its weight; a ReLU needs its output.
        assert [cost.graph_bytes for cost in costs] == [8 * 64, 8 * 64, 6 * 64, 3 * 64 + 4 + 4]
        assert [cost.unsaved_output_bytes for cost in costs] == [8 * 64, 0, 0, 0]
        assert [cost.saved_input_bytes for cost in costs] == [5 * 64, 0, 8 * 64, 6 * 64]
        assert [cost.saved_weight_bytes for cost in costs] == [0, 0, 48 * 4, 18 * 4]
        assert [cost.weight_bytes for cost in costs] == [48 * 4, 0, 54 * 4, 21 * 4]
        assert [cost.gradient_bytes for cost in costs] == [48 * 4, 0, 54 * 4, 21 * 4]
        assert [cost.changes_input for cost in costs] == [False] * 4

    def test_batch_norm_and_frozen_weights(self) -> None:
        norm = nn.BatchNorm1d(8)
        norm.bias.requires_grad_(False)
        cost, _ = measured([norm, nn.ReLU()], torch.randn(16, 8))
        assert cost.weight_bytes == 4 * 8 * 4 + 8
        assert cost.gradient_bytes == 8 * 4
        assert cost.saved_weight_bytes == 8 * 4
        assert cost.graph_bytes == 8 * 64 + 2 * 8 * 4  # its output, the batch's mean and deviation
        assert cost.unsaved_output_bytes == 8 * 64  # not needed by the ReLU

    def test_views_hand_on_who_needs_what(self) -> None:
        layers = [nn.Linear(5, 8), nn.Flatten(), nn.Linear(8, 3)]
        costs = measured(layers, torch.randn(16, 5))
        assert [cost.graph_bytes for cost in costs][:2] == [8 * 64, 0]
        assert [cost.unsaved_output_bytes for cost in costs][:2] == [0, 0]  # needed two layers further
        assert [cost.saved_input_bytes for cost in costs][:2] == [5 * 64, 8 * 64]
        last_needs_nothing = measured([nn.Linear(5, 8), nn.Flatten(), nn.Flatten()], torch.randn(16, 5))
        assert last_needs_nothing[0].unsaved_output_bytes == 8 * 64

    def test_work_in_place(self) -> None:
        layers = [nn.Linear(5, 8), nn.Flatten(), nn.ReLU(inplace=True), nn.Linear(8, 3), nn.ReLU()]
        costs = measured(layers, torch.randn(16, 5))
        assert [cost.changes_input for cost in costs] == [False, True, True, False, False]
        assert [cost.graph_bytes for cost in costs][:3] == [8 * 64, 0, 0]
        assert [cost.saved_input_bytes for cost in costs][:3] == [5 * 64, 8 * 64, 8 * 64]

    def test_dropout_keeps_its_mask(self) -> None:
        costs = measured([nn.Linear(5, 8), nn.Dropout(0.5), nn.Linear(8, 3)], torch.randn(16, 5))
        mask = 16 * 8 * 4  # torch keeps it as float32 on the CPU
        assert costs[1].graph_bytes == 8 * 64 + mask

    def test_what_a_layer_saves_twice_counts_once(self) -> None:
        class Twice(nn.Module):
            def forward(self, inputs: Tensor) -> Tensor:
                result = inputs.exp()
                return result * result

        costs = measured([nn.Linear(5, 8), Twice(), nn.Identity()], torch.randn(16, 5))
        assert costs[1].graph_bytes == 2 * 8 * 64

    def test_a_layer_that_forbids_hooks_is_timed_without(self) -> None:
        class Inner(nn.Module):
            def forward(self, inputs: Tensor) -> Tensor:
                gradient: Tensor = torch.func.grad(lambda x: x.square().sum())(inputs)
                return gradient

        costs = measured([nn.Linear(5, 8), Inner(), nn.Linear(8, 3)], torch.randn(16, 5))
        assert costs[1].forward_s is not None
        assert costs[1].graph_bytes is costs[1].unsaved_output_bytes is costs[1].saved_weight_bytes is None
        assert costs[1].weight_bytes == 0
        assert costs[0].unsaved_output_bytes == 0  # nobody knows whether it is needed
        with pytest.raises(PlanError, match=r"layer '1' \(Inner\) has no known .*_bytes"):
            predict_memory(
                fixed_partition(costs, (1,), recompute=[True, False]),
                DSP.minimal(2).program(),
                input_bytes=1,
                target_bytes=1,
            )

    def test_an_unknown_layer_leaves_the_others_known(self) -> None:
        known = LayerGraph(graph_bytes=1, saved_weight_bytes=0, inputs=((7, False),), changes_input=False, outputs=())
        assert ends_of_chain([known, None, known]) == [
            Ends(unsaved_output_bytes=0, saved_input_bytes=0, changes_input=False),
            None,
            Ends(unsaved_output_bytes=0, saved_input_bytes=0, changes_input=False),
        ]


def layer(scale: int) -> LayerCost:
    """Sizes of a stage of one layer: weights 1, trained 1, saved weights 1, graph 100, output 10, times `scale`."""
    return LayerCost(
        parameters=1,
        name=f"fc{scale}",
        type="Linear",
        output_bytes=10 * scale,
        graph_bytes=100 * scale,
        unsaved_output_bytes=0,
        saved_input_bytes=0,
        changes_input=False,
        weight_bytes=scale,
        gradient_bytes=scale,
        saved_weight_bytes=scale,
    )


def predicted(method: Method, **options: Any) -> list[StageMemory]:
    """Three stages of one layer each, of scales 1, 1000, 10^6; an input of 1000 bytes, no targets."""
    program = method.program()
    layers = [layer(1), layer(1000), layer(10**6)]
    plan = fixed_partition(layers, (1, 2), recompute=[stage.recomputes for stage in program.stages])
    return predict_memory(plan, program, **({"input_bytes": 1000, "target_bytes": 0} | options))


class TestByHand:
    def test_dsp(self) -> None:
        """m + 1 inputs, one graph, and on each link d = 2 gradients: the one in use, and one that waits."""
        assert predicted(DSP(staleness=(4, 2, 0))) == [
            StageMemory(weights=1, optimizer=1, inputs=5 * 1000, graphs=100, queues=2 * 10),
            StageMemory(weights=10**3, optimizer=10**3, inputs=3 * 10, graphs=10**5, queues=2 * 10**4),
            StageMemory(weights=10**6, optimizer=10**6, inputs=10**4, graphs=10**8),
        ]

    def test_stored_graphs(self) -> None:
        """m + 1 graphs, weights of m versions."""
        assert predicted(DSP(staleness=(4, 2, 0), activations="stored")) == [
            StageMemory(weights=1, stashed=4, optimizer=1, inputs=5 * 1000, graphs=5 * 100, queues=2 * 10),
            StageMemory(
                weights=10**3, stashed=2 * 10**3, optimizer=10**3, inputs=3 * 10, graphs=3 * 10**5, queues=2 * 10**4
            ),
            StageMemory(weights=10**6, optimizer=10**6, inputs=10**4, graphs=10**8),
        ]
        current = predicted(DSP(staleness=(4, 2, 0), activations="stored", weights="current"))
        assert [memory.stashed for memory in current] == [0, 0, 0]
        corrected = predicted(PipeMare(stages=3))
        assert [memory.stashed for memory in corrected] == [1, 10**3, 0]
        assert [memory.graphs for memory in corrected] == [5 * 100, 3 * 10**5, 10**8]

    def test_the_lags_count_and_not_the_name(self) -> None:
        by_name = {name: predicted(build_method(name, num_stages=3)) for name in ("ddg", "pipedream", "fdg", "fr")}
        assert by_name["ddg"] == by_name["pipedream"] == predicted(DSP(staleness=(2, 1, 0), activations="stored"))
        assert by_name["fdg"] == predicted(DSP(staleness=(4, 2, 0), activations="stored"))
        assert by_name["fr"] == predicted(DSP(staleness=(2, 1, 0)))

    def test_backpropagation(self) -> None:
        assert predicted(BP(stages=3)) == [
            StageMemory(weights=1, optimizer=1, inputs=1000, graphs=100, queues=10),
            StageMemory(weights=10**3, optimizer=10**3, inputs=10, graphs=10**5, queues=10**4),
            StageMemory(weights=10**6, optimizer=10**6, inputs=10**4, graphs=10**8),
        ]

    def test_micro_batches(self) -> None:
        """All inputs of a batch; with recompute one graph of a part, else all; from the second part on gradients."""
        _, middle, _ = predicted(GPipe(stages=3, micro_batches=5))
        assert (middle.inputs, middle.graphs) == (10, 10**5 // 5)
        _, middle, _ = predicted(GPipe(stages=3, micro_batches=5, activations="stored"))
        assert (middle.inputs, middle.graphs) == (10, 10**5)
        graphs = [memory.graphs for memory in predicted(build_method("1f1b", num_stages=3, micro_batches=5))]
        assert graphs == [3 * 100 // 5, 2 * 10**5 // 5, 10**8 // 5]

    def test_targets_travel_along(self) -> None:
        without = predicted(DSP(staleness=(4, 2, 0)))
        with_targets = predicted(DSP(staleness=(4, 2, 0)), target_bytes=7)
        assert [b.inputs - a.inputs for a, b in zip(without, with_targets, strict=True)] == [5 * 7, 3 * 7, 7]

    @pytest.mark.parametrize(("copies", "expected"), [(0, 0), (1, 10**6), (2.5, 2_500_000)])
    def test_copies_in_the_optimizer(self, copies: float, expected: int) -> None:
        assert predicted(BP(stages=3), optimizer_copies=copies)[2].optimizer == expected

    def test_a_slow_stage_has_full_queues(self) -> None:
        """d activations wait for it and, between forward and backward, d + 1 gradients: in the drain m + 1."""
        slow = predicted(DSP(staleness=(4, 2, 0)), timing="slow")
        lockstep = predicted(DSP(staleness=(4, 2, 0)))
        assert [memory.queues for memory in slow] == [5 * 10, 2 * 10 + 3 * 10**4, 2 * 10**4]
        for one, other in zip(slow, lockstep, strict=True):
            assert replace(one, queues=0) == replace(other, queues=0)

    def test_the_last_output_stays_and_others_only_where_they_are_needed(self) -> None:
        lets_go = replace(layer(1), unsaved_output_bytes=10)
        program = DSP(staleness=(2, 0)).program()
        plan = fixed_partition([lets_go] * 4, (3,), recompute=[True, False])
        first, last = predict_memory(plan, program, input_bytes=0, target_bytes=0)
        assert (first.graphs, last.graphs) == (90 + 90 + 100, 100)

    def test_layers_that_work_in_place_on_a_copy_of_the_input(self) -> None:
        changing = replace(layer(1), changes_input=True, saved_input_bytes=7)
        needing = replace(layer(1), saved_input_bytes=7)  # copied in the first pass of a stage that stores its graph
        stored = DSP(staleness=(3, 0), activations="stored")
        for method, cost, expected in (
            (DSP(staleness=(3, 0)), changing, [107, 107]),
            (DSP(staleness=(3, 0)), needing, [100, 107]),
            (stored, changing, [4 * 107, 107]),
            (stored, needing, [4 * 100 + 7, 107]),
        ):
            program = method.program()
            plan = fixed_partition([cost, cost], (1,), recompute=[stage.recomputes for stage in program.stages])
            found = predict_memory(plan, program, input_bytes=0, target_bytes=0, optimizer_copies=0)
            assert [memory.graphs for memory in found] == expected


class TestRefusals:
    def test_another_number_of_stages(self) -> None:
        plan = fixed_partition([layer(1)] * 3, (1,), recompute=[True, False])
        with pytest.raises(PlanError, match="the partition has 2 stages and the program 3"):
            predict_memory(plan, BP(stages=3).program(), input_bytes=1, target_bytes=1)

    @pytest.mark.parametrize("field", ["output_bytes", "graph_bytes", "weight_bytes", "changes_input"])
    def test_what_is_unknown(self, field: str) -> None:
        plan = fixed_partition([layer(1), replace(layer(2), **{field: None})], (1,), recompute=[True, False])
        with pytest.raises(PlanError, match=rf"layer 'fc2' \(Linear\) has no known {field}.*profile_layers"):
            predict_memory(plan, BP(stages=2).program(), input_bytes=1, target_bytes=1)

    def test_timing(self) -> None:
        with pytest.raises(PlanError, match="timing is 'fast'"):
            predicted(BP(stages=3), timing="fast")

    def test_a_program_that_breaks_a_rule(self) -> None:
        program = BP(stages=2).program()
        broken = Program(
            stages=(replace(program.stages[0], slots=program.stages[0].slots[:-1]), program.stages[1]),
            staleness=program.staleness,
        )
        plan = fixed_partition([layer(1)] * 2, (1,), recompute=[False, False])
        with pytest.raises(ProgramError, match="V5"):
            predict_memory(plan, broken, input_bytes=1, target_bytes=1)


NETS: dict[str, tuple[Callable[[], list[nn.Module]], tuple[int, ...], tuple[int, ...]]] = {
    "linear": (
        lambda: [nn.Linear(40, 50), nn.ReLU(), nn.Linear(50, 60), nn.Tanh(), nn.Linear(60, 30), nn.Linear(30, 3)],
        (2, 4),
        (40,),
    ),
    "in place at a cut": (
        lambda: [
            nn.Conv2d(3, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(inplace=True),
            nn.Conv2d(8, 6, 3),
            nn.ReLU(),
            nn.Flatten(),
            nn.Dropout(0.2),
            nn.Linear(6 * 36, 3),
        ],
        (2, 5),
        (3, 8, 8),
    ),
}

METHODS: dict[str, Method] = {
    **{
        name: build_method(name, num_stages=3)
        for name in ("dsp", "dsp-stored", "fr", "ddg", "pipedream", "pipemare", "fdg", "bp", "gpipe", "1f1b")
    },
    "deep": DSP(staleness=(7, 2, 0)),
    "locked": DSP(staleness=(3, 3, 0), activations="stored"),
    "accumulate": DSP(staleness=(4, 2, 0), accumulate=3),
    "gpipe stored": GPipe(stages=3, micro_batches=2, activations="stored"),
}


def momentum(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.01, momentum=0.9)


def compare(
    net: Callable[[], Sequence[nn.Module]], method: Method, cuts: tuple[int, ...], batch: tuple[Tensor, Tensor]
) -> list[tuple[StageMemory, StageMemory, StageMemory]]:
    """Measured, predicted, and predicted for a slow stage."""
    program = method.program()
    costs = measured(list(net()), *batch, cross_entropy)
    plan = fixed_partition(costs, cuts, recompute=[stage.recomputes for stage in program.stages])
    sizes = {"input_bytes": batch[0].nbytes, "target_bytes": batch[1].nbytes}
    pipe = Pipeline(
        list(net()),
        method=method,
        loss_fn=cross_entropy,
        optimizer=momentum,
        partition=cuts,
        measure_memory=True,
    )
    data = [(batch[0].clone(), batch[1].clone()) for _ in range(2 * program.max_lag + 5)]
    assert len(list(pipe.train(data))) == len(data)
    return list(
        zip(
            pipe.memory(),
            predict_memory(plan, program, **sizes),
            predict_memory(plan, program, timing="slow", **sizes),
            strict=True,
        )
    )


@pytest.mark.parametrize("net", list(NETS))
@pytest.mark.parametrize("method", list(METHODS))
def test_prediction_and_measurement(net: str, method: str) -> None:
    """Equal but for scalars (losses, a mean's weight per micro-batch), statistics of parts, and targets of parts."""
    build, cuts, shape = NETS[net]
    batch = torch.randn(32, *shape), torch.randint(3, (32,))
    parts = METHODS[method].program().stages[0].policy.micro_batches
    slack = 40 if parts == 1 else 40 + 8 * 32 + 128 * parts
    for here, there, slow in compare(build, METHODS[method], cuts, batch):
        for field in fields(StageMemory):
            one, other = getattr(here, field.name), getattr(there, field.name)
            assert abs(one - other) <= slack, (field.name, here, there)
        assert slow.total >= there.total


@pytest.mark.parametrize("method", ["dsp", "dsp-stored", "ddg", "pipedream", "gpipe"])
def test_a_residual_network(method: str) -> None:
    batch = torch.randn(4, 3, 32, 32), torch.randint(10, (4,))

    def net() -> Sequence[nn.Module]:
        return list(build_model("resnet20", num_classes=10))

    for here, there, _ in compare(net, METHODS[method], (3, 6), batch):
        assert there.total == pytest.approx(here.total, rel=0.01)


def test_six_stages() -> None:
    """The dry run keeps step as the sequential engine does, whatever the number of stages."""
    net = NETS["linear"][0]
    batch = torch.randn(32, 40), torch.randint(3, (32,))
    for method in (DSP.minimal(6), build_method("1f1b", num_stages=6)):
        for here, there, _ in compare(net, method, (1, 2, 3, 4, 5), batch):
            assert abs(here.total - there.total) <= 700, (method, here, there)


def test_the_slow_bound_grows_with_the_staleness() -> None:
    totals = [
        sum(memory.total for memory in predicted(DSP(staleness=staleness), timing="slow"))
        for staleness in ((2, 1, 0), (4, 2, 0), (6, 3, 0), (10, 5, 0))
    ]
    assert all(shallow < deep for shallow, deep in pairwise(totals))
