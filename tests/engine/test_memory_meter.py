"""Bytes that stages hold, counted by hand, and that measuring leaves no trace.

    stage 0   Linear 5 -> 8   ReLU   Linear 8 -> 6      102 weights, of which the backward needs the 48 of the second
    stage 1   ReLU   Linear 6 -> 3   cross entropy       21 weights

Batches of 16 samples of float32 and targets of int64:

    input of stage 0   16 x 5 x 4 = 320     target 16 x 8 = 128
    cut                16 x 6 x 4 = 384
    graph of stage 0   ReLU's output 16 x 8 x 4 = 512 and the stage's 384; the input counts as an input
    graph of stage 1   ReLU's output 384, log-probabilities 16 x 3 x 4 = 192, total weight of the mean 4, loss 4
"""

from __future__ import annotations

import json
import os
import resource
import sys
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import dist_memory
import pytest
import torch
from engine_nets import NETS, adamw, assert_same, classification, momentum, sgd
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import stalewise
from stalewise import ConfigError, Pipeline
from stalewise.engine import memory as memory_module
from stalewise.engine.memory import MemoryMeter, StageUsage, resident_bytes
from stalewise.methods import BP, DSP, GPipe, PipeDream, PipeMare, build_method
from stalewise.methods.method import Method
from stalewise.plan.memory import StageMemory
from stalewise.plan.saved_tensors import SavedTensor, SavedTensorLog

BATCH = 16
INPUT, TARGET, CUT = 320, 128, 384
WEIGHTS = (102 * 4, 21 * 4)
GRAPHS = (512 + 384, 384 + 192 + 4 + 4)
LOSS = 4


def layers() -> list[nn.Module]:
    torch.manual_seed(0)
    return [nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3)]


def batches(count: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(BATCH, 5, generator=generator), torch.randint(3, (BATCH,), generator=generator))
        for _ in range(count)
    ]


def pipeline(method: Method, net: list[nn.Module] | None = None, **options: Any) -> Pipeline:
    defaults: dict[str, Any] = {"loss_fn": cross_entropy, "optimizer": momentum, "partition": (3,), "seed": 0}
    return Pipeline(net or layers(), method=method, measure_memory=True, **(defaults | options))


def trained(method: Method, count: int = 10, **options: Any) -> Pipeline:
    pipe = pipeline(method, **options)
    for _ in pipe.train(batches(count)):
        pass
    return pipe


class TestByHand:
    """The moment with the largest total is after the gradient came, with its graph still there."""

    def test_dsp_keeps_inputs_and_one_graph(self) -> None:
        first, last = trained(DSP(staleness=(2, 0))).memory()
        assert first == StageMemory(
            weights=WEIGHTS[0],
            optimizer=WEIGHTS[0],
            inputs=3 * (INPUT + TARGET),
            graphs=GRAPHS[0],
            queues=2 * (CUT + LOSS),  # the gradient in use and, slack 2, one that waits
        )
        assert last == StageMemory(
            weights=WEIGHTS[1],
            optimizer=WEIGHTS[1],
            inputs=CUT + TARGET,
            graphs=GRAPHS[1],
            queues=3 * LOSS,  # losses are given out m_0 = 2 steps later
        )

    def test_stored_graphs_and_stashed_weights(self) -> None:
        first, _ = trained(DSP(staleness=(2, 0), activations="stored")).memory()
        assert first == StageMemory(
            weights=WEIGHTS[0],
            stashed=2 * 48 * 4,  # the versions of the two older graphs; of the weights only those that are needed
            optimizer=WEIGHTS[0],
            inputs=3 * (INPUT + TARGET),
            graphs=3 * GRAPHS[0],
            queues=2 * (CUT + LOSS),
        )

    def test_stored_graphs_with_current_weights_stash_nothing(self) -> None:
        stashed, _ = trained(DSP(staleness=(2, 0), activations="stored")).memory()
        current, _ = trained(DSP(staleness=(2, 0), activations="stored", weights="current")).memory()
        assert current == replace(stashed, stashed=0)

    def test_pipemare_keeps_averages_and_for_a_moment_estimates(self) -> None:
        pipe = trained(PipeMare(stages=2))
        assert [memory.stashed for memory in pipe.memory()] == [WEIGHTS[0], 0]
        assert [memory.stashed for memory in pipe.memory(each_category=True)] == [WEIGHTS[0] + 48 * 4, 0]
        without = trained(PipeMare(stages=2, discrepancy_decay=None))
        assert [memory.stashed for memory in without.memory(each_category=True)] == [0, 0]

    def test_backpropagation(self) -> None:
        first, last = trained(BP(stages=2)).memory()
        assert first == StageMemory(
            weights=WEIGHTS[0], optimizer=WEIGHTS[0], inputs=INPUT + TARGET, graphs=GRAPHS[0], queues=CUT + LOSS
        )
        assert last == replace(trained(DSP(staleness=(2, 0))).memory()[1], queues=LOSS)

    def test_the_first_graph_holds_a_copy_of_its_input(self) -> None:
        """By which the stage finds out whether its layers work in place; here the first layer needs its input."""
        pipe = trained(DSP(staleness=(2, 0), activations="stored"))
        assert [memory.graphs for memory in pipe.memory(each_category=True)] == [3 * GRAPHS[0] + INPUT, GRAPHS[1]]

    def test_micro_batches(self) -> None:
        """All inputs, one graph of a quarter; the loader's batch is one storage, the cut's parts are four."""
        first, last = trained(GPipe(stages=2, micro_batches=4)).memory(each_category=True)
        assert (first.inputs, last.inputs) == (INPUT + TARGET, CUT + TARGET)
        assert (first.graphs, last.graphs) == (GRAPHS[0] // 4, (384 + 192) // 4 + 4 + 4)
        stored, _ = trained(GPipe(stages=2, micro_batches=4, activations="stored")).memory(each_category=True)
        assert stored.graphs == GRAPHS[0] + INPUT // 4

    def test_gradients_of_what_is_trained(self) -> None:
        net = layers()
        net[0].requires_grad_(False)
        pipe = trained(DSP(staleness=(2, 0)), net=net)
        first, last = pipe.memory(each_category=True)
        assert (first.weights, last.weights) == WEIGHTS
        assert (first.gradients, last.gradients) == (54 * 4, WEIGHTS[1])
        assert (first.optimizer, last.optimizer) == (54 * 4, WEIGHTS[1])

    @pytest.mark.parametrize(("optimizer", "expected"), [(sgd, 0), (momentum, 102 * 4), (adamw, 2 * 102 * 4 + 4 * 4)])
    def test_optimizer_state(self, optimizer: Callable[[Any], torch.optim.Optimizer], expected: int) -> None:
        """AdamW has two moments, and a counter for each of the four weights."""
        first, _ = trained(DSP(staleness=(2, 0)), optimizer=optimizer).memory()
        assert first.optimizer == expected

    def test_buffers_are_weights(self) -> None:
        net = layers()
        net.insert(1, nn.BatchNorm1d(8))
        first, _ = trained(DSP(staleness=(2, 0)), net=net, partition=(4,)).memory()
        assert first.weights == WEIGHTS[0] + 4 * 8 * 4 + 8  # weight, bias, mean, variance and a counter
        assert first.graphs == GRAPHS[0] + 512 + 2 * 8 * 4  # BatchNorm's input, the batch's mean and deviation

    def test_a_storage_counts_once_and_in_the_first_category(self) -> None:
        """A stage that hands its input on makes nothing: its output is an input, not a graph and not a queue."""
        net = [nn.Flatten(), nn.Linear(5, 3)]
        first, last = trained(BP(stages=2), net=net, partition=(1,)).memory(each_category=True)
        assert (first.inputs, first.graphs) == (INPUT + TARGET, INPUT)  # the copy of the first pass
        steady = pipeline(BP(stages=2), net=net, partition=(1,))
        meter = steady._engine._meters[0]  # type: ignore[union-attr]
        seen = []
        for _ in steady.train(batches(3)):
            seen.append((meter.peaks.graphs, meter.now.graphs))
            meter.peaks = StageMemory()
        assert seen == [(INPUT, 0), (0, 0), (0, 0)]
        assert last.inputs == INPUT + TARGET

    def test_dni_keeps_outputs_and_a_synthesizer(self) -> None:
        pipe = trained(build_method("dni", num_stages=2, target_delay=2))
        first, last = pipe.memory(each_category=True)
        synthesizer = 2 * (6 * 6 + 6) * 4  # two linear layers on the 6 features of the cut
        assert first.weights == WEIGHTS[0] + synthesizer
        assert first.optimizer == WEIGHTS[0] + 2 * synthesizer + 4 * 4  # momentum; Adam with four counters
        assert first.inputs == INPUT + TARGET + 3 * CUT  # outputs of this batch and the two before
        assert last.weights == WEIGHTS[1]

    def test_a_loss_in_a_large_storage_is_not_kept(self) -> None:
        """mse_loss leaves its number in a storage as large as the output."""
        net = [nn.Linear(5, 8), nn.Linear(8, 100)]
        data = [(torch.randn(BATCH, 5), torch.randn(BATCH, 100)) for _ in range(6)]
        pipe = pipeline(DSP(staleness=(4, 0)), net=net, partition=(1,), loss_fn=nn.functional.mse_loss)
        for _ in pipe.train(data):
            pass
        cut, target = BATCH * 8 * 4, BATCH * 100 * 4
        first, last = pipe.memory(each_category=True)
        assert first.queues == INPUT + target + 4 * (cut + LOSS)  # what was just loaded, gradients that wait
        assert last.queues == cut + target + 4 * LOSS  # what was just received, losses that wait


@pytest.mark.parametrize("staleness", [(0, 0, 0), (2, 1, 0), (4, 2, 0), (10, 5, 0), (3, 3, 0)])
@pytest.mark.parametrize("count", [2, 14])
def test_inputs_reach_m_plus_1(staleness: tuple[int, ...], count: int) -> None:
    pipe = trained(DSP(staleness=staleness), count=count, partition=(1, 3))
    sizes = (INPUT, 16 * 8 * 4, CUT)
    assert [memory.inputs for memory in pipe.memory(each_category=True)] == [
        min(m + 1, count) * (size + TARGET) for m, size in zip(staleness, sizes, strict=True)
    ]


class TestPeaks:
    def test_the_peak_is_of_one_moment_and_the_peaks_are_not(self) -> None:
        pipe = trained(DSP(staleness=(2, 0)))
        for peak, peaks in zip(pipe.memory(), pipe.memory(each_category=True), strict=True):
            assert peak.gradients == 0  # they are there after the backward, when the graph is gone
            assert peaks.gradients == peak.weights
            assert peaks.total > peak.total

    def test_a_peak_stays(self) -> None:
        pipe = trained(DSP(staleness=(2, 0)))
        before = pipe.memory(), pipe.memory(each_category=True)
        for _ in pipe.train([(inputs[:2], target[:2]) for inputs, target in batches(9)]):
            pass
        assert (pipe.memory(), pipe.memory(each_category=True)) == before

    def test_all_is_0_before_the_first_step(self) -> None:
        assert pipeline(BP(stages=2)).memory() == [StageMemory()] * 2

    def test_which_steps_are_looked_at(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Up to 2 * 2 + 8, then every 50th, and anew after a drain; measuring is what is skipped, not the log."""
        steps: list[int] = []
        begin, measure = MemoryMeter.begin_step, MemoryMeter._measure
        now = [0]

        def begins(self: MemoryMeter, step: int) -> None:
            now[0] = step
            begin(self, step)

        def measures(self: MemoryMeter, queues: Any) -> StageMemory:
            if not steps or steps[-1] != now[0]:
                steps.append(now[0])
            return measure(self, queues)

        monkeypatch.setattr(MemoryMeter, "begin_step", begins)
        monkeypatch.setattr(MemoryMeter, "_measure", measures)
        pipe = pipeline(DSP(staleness=(2, 0)))
        assert len(list(pipe.train(batches(1) * 120))) == 120
        assert len(list(pipe.train(batches(1) * 3))) == 3
        assert steps == [*range(13), 50, 100, *range(5)]

    def test_graphs_of_steps_that_were_not_looked_at_are_known(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(memory_module, "MEASURED_AT_FIRST", -10)
        monkeypatch.setattr(memory_module, "MEASURED_EVERY", 7)
        pipe = trained(DSP(staleness=(2, 0), activations="stored"))
        assert pipe.memory()[0].graphs == 3 * GRAPHS[0]


METHODS: dict[str, Method] = {
    "recompute": DSP(staleness=(4, 2, 0)),
    "stashed": DSP(staleness=(4, 2, 0), activations="stored"),
    "current": DSP(staleness=(4, 2, 0), activations="stored", weights="current"),
    "accumulate": DSP(staleness=(2, 1, 0), accumulate=3),
    "pipemare": PipeMare(stages=3),
    "gpipe": GPipe(stages=3, micro_batches=2),
    "bp": BP(stages=3),
    "ddg": build_method("ddg", num_stages=3),
    "dni": build_method("dni", num_stages=3),
}


class TestNoTrace:
    @pytest.mark.parametrize("net", ["mlp", "cnn"])
    @pytest.mark.parametrize("method", list(METHODS))
    def test_every_number_is_the_same(self, net: str, method: str) -> None:
        """Dropout, BatchNorm, ReLUs in place, at a cut too."""
        runs = []
        for measures in (False, True):
            pipe = Pipeline(
                NETS[net](),
                method=METHODS[method],
                loss_fn=cross_entropy,
                optimizer=momentum,
                partition=(3, 6),
                seed=3,
                measure_memory=measures,
            )
            losses = list(pipe.train(classification(net, 12)))
            runs.append([losses, pipe.state_dict(), pipe.optimizer_state_dict(), torch.get_rng_state()])
        assert_same(runs[1], runs[0])

    @pytest.mark.parametrize("method", list(METHODS))
    def test_nothing_is_kept_alive(self, method: str) -> None:
        """Neither what layers made nor what the loader gave outlives the run, and within it no more than without."""
        alive: list[list[int]] = []
        for measures in (False, True):
            made: list[weakref.ref[Tensor]] = []

            def watch(module: nn.Module, args: object, output: Tensor, made: list[Any] = made) -> None:
                made.append(weakref.ref(output))

            net = NETS["mlp"]()
            for layer in net:
                layer.register_forward_hook(watch)

            def loader(made: list[weakref.ref[Tensor]] = made) -> Iterator[tuple[Tensor, Tensor]]:
                for inputs, target in (classification("mlp", 1)[0] for _ in range(9)):
                    made += [weakref.ref(inputs), weakref.ref(target)]
                    yield inputs, target
                    del inputs, target

            pipe = Pipeline(
                net,
                method=METHODS[method],
                loss_fn=cross_entropy,
                optimizer=momentum,
                partition=(2, 6),
                measure_memory=measures,
            )
            alive.append([sum(tensor() is not None for tensor in made) for _ in pipe.train(loader())])
            assert len(made) > 9 * len(net)
            assert sum(tensor() is not None for tensor in made) == 0
        assert alive[0] == alive[1]

    @pytest.mark.parametrize("method", list(METHODS))
    def test_after_a_drain_only_weights_and_optimizer_are_left(self, method: str) -> None:
        pipe = pipeline(METHODS[method], net=NETS["mlp"](), partition=(2, 6))
        for _ in pipe.train(classification("mlp", 7)):
            pass
        for stage in pipe._engine.stages:  # type: ignore[union-attr]
            assert stage.graph_tensors() == []
            assert stage.stored_tensors() == []

    def test_nothing_is_measured_where_it_is_not_asked_for(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(*args: object) -> None:
            raise AssertionError("hooks")

        monkeypatch.setattr(torch.autograd.graph, "saved_tensors_hooks", refuse)
        monkeypatch.setattr(memory_module, "storages", refuse)
        for measures in (False, True):
            pipe = Pipeline(
                layers(),
                method=DSP(staleness=(2, 0)),
                loss_fn=cross_entropy,
                optimizer=momentum,
                partition=(3,),
                measure_memory=measures,
            )
            if measures:
                with pytest.raises(AssertionError, match="hooks"):
                    list(pipe.train(batches(3)))
            else:
                assert len(list(pipe.train(batches(3)))) == 3
                with pytest.raises(ConfigError, match="measure_memory=True"):
                    pipe.memory()

    def test_memory_wants_cuts(self) -> None:
        with pytest.raises(ConfigError, match="memory was called before the cuts are known"):
            pipeline(BP(stages=2), partition="profile").memory()


class TestSavedTensors:
    def test_the_log_knows_what_a_graph_holds_and_holds_nothing(self) -> None:
        log = SavedTensorLog()
        inputs = torch.randn(2, 3, requires_grad=True)
        with log.recording():
            output = inputs.exp()
        (saved,) = log.alive()
        assert saved.data_ptr() == output.data_ptr()
        assert not saved.requires_grad
        del saved
        kept = weakref.ref(output)
        loss = output.sum()
        del output
        assert kept() is None  # the graph holds its storage
        assert len(log.alive()) == 1
        loss.backward()
        assert log.alive() == []
        assert torch.equal(inputs.grad, inputs.detach().exp())  # type: ignore[arg-type]

    def test_a_graph_that_is_dropped_takes_its_tensors_along(self) -> None:
        log = SavedTensorLog()
        with log.recording():
            output = torch.randn(2, 3, requires_grad=True).exp()
        assert len(log.alive()) == 1
        del output
        assert log.alive() == []

    def test_changes_in_place_are_still_errors(self) -> None:
        saved = SavedTensor.of(torch.zeros(2))
        assert saved.unpack().tolist() == [0, 0]
        saved.tensor.add_(1)
        with pytest.raises(ConfigError, match="changed in place after the forward"):
            saved.unpack()

    def test_in_a_pipeline_too(self) -> None:
        class Spoils(nn.Module):
            def forward(self, inputs: Tensor) -> Tensor:
                result = inputs.exp()
                saved = result * 2
                result.add_(1)
                return saved

        net = [nn.Linear(5, 8), Spoils(), nn.Linear(8, 3)]
        with pytest.raises(ConfigError, match="changed in place after the forward"):
            list(pipeline(DSP(staleness=(1, 0)), net=net, partition=(2,)).train(batches(3)))


class TestTraffic:
    def test_bytes_sent(self) -> None:
        pipe = trained(DSP(staleness=(4, 2, 0)), count=7, partition=(1, 3))
        inner = 16 * 8 * 4
        assert pipe.bytes_sent() == [7 * (inner + TARGET), 7 * (CUT + TARGET + inner + LOSS), 7 * (CUT + LOSS)]

    def test_micro_batches_add_up_to_the_batch_and_carry_a_loss_each(self) -> None:
        pipe = trained(GPipe(stages=2, micro_batches=4), count=7)
        assert pipe.bytes_sent() == [7 * (CUT + TARGET), 7 * (CUT + 4 * LOSS)]

    def test_where_losses_travel_alone(self) -> None:
        pipe = trained(build_method("dni", num_stages=3), count=7, partition=(1, 3))
        inner = 16 * 8 * 4
        assert pipe.bytes_sent() == [7 * (inner + TARGET), 7 * (CUT + TARGET + inner + LOSS), 7 * (CUT + LOSS)]

    def test_views_are_sent_without_what_they_hide(self) -> None:
        class Narrow(nn.Linear):
            def forward(self, inputs: Tensor) -> Tensor:
                return super().forward(inputs)[:8]

        net = [Narrow(5, 6), nn.Linear(6, 3)]
        pipe = pipeline(BP(stages=2), net=net, partition=(1,), loss_fn=lambda output, _: output.sum())
        list(pipe.train(batches(1)))
        assert pipe.bytes_sent() == [8 * 6 * 4 + TARGET, 8 * 6 * 4 + LOSS]

    def test_evaluations_are_not_counted_and_drains_do_not_reset(self) -> None:
        pipe = trained(BP(stages=2), count=3)
        pipe.evaluate(batches(4), lambda output, target: 0.0)
        list(pipe.train(batches(2)))
        assert pipe.bytes_sent() == [5 * (CUT + TARGET), 5 * (CUT + LOSS)]


class TestResidentMemory:
    def test_linux(self) -> None:
        if not sys.platform.startswith("linux"):
            pytest.skip("not Linux")
        now = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        most = resident_bytes()
        assert most is not None
        # Counters of the kernel that are kept apart, and a parent's peak may count in the second.
        assert 0.99 * now <= most <= 1.01 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        before, each = resident_bytes(), pipeline(BP(stages=2)).resident_memory()
        assert before is not None
        assert all(before <= held <= resident_bytes() for held in each)

    def test_elsewhere(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def fails(self: Path, **options: Any) -> str:
            raise FileNotFoundError

        monkeypatch.setattr(Path, "read_text", fails)
        assert resident_bytes() is None

    def test_a_system_that_does_not_tell(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(Path, "read_text", lambda self, **options: "Name:\tpython\nVmRSS:\t 12 kB\n")
        assert resident_bytes() is None
        monkeypatch.setattr(Path, "read_text", lambda self, **options: "Name:\tpython\nVmHWM:\t 12 kB\n")
        assert resident_bytes() == 12 * 1024


def test_usage_travels_as_json() -> None:
    memory = StageMemory(weights=1, queues=2)
    for usage in (
        StageUsage(peak=memory, peaks=replace(memory, graphs=3), resident_bytes=4, bytes_sent=5),
        StageUsage(peak=None, peaks=None, resident_bytes=None, bytes_sent=0),
    ):
        assert StageUsage.from_json(json.loads(json.dumps(usage.as_json()))) == usage


@pytest.mark.dist
def test_processes_tell_the_same_on_every_rank_and_as_one_process(tmp_path: Path) -> None:
    """What waits where is up to the timing; all else is not."""
    stalewise.launch(dist_memory.measure_all, num_workers=2, args=[str(tmp_path)])
    told = [json.loads((tmp_path / f"memory.{rank}.json").read_text()) for rank in range(2)]
    assert told[0] == told[1]
    for name in dist_memory.METHODS:
        alone, together = dist_memory.measured(name), told[0][name]
        assert together["losses"] == alone["losses"]
        assert together["bytes_sent"] == alone["bytes_sent"]
        assert all(resident is None or resident > 50 << 20 for resident in together["resident"])
        for here, there in zip(alone["peaks"], together["peaks"], strict=True):
            for category in ("weights", "stashed", "optimizer", "gradients", "inputs", "graphs"):
                assert there[category] == here[category], (name, category)
            assert there["queues"] > 0
        for peak, peaks in zip(together["memory"], together["peaks"], strict=True):
            assert 0 < peak["total"] <= peaks["total"]


def test_pipedream_stashes_what_its_staleness_says() -> None:
    """m_k versions of the weights that a backward needs; stage 1 now has an input with a gradient."""
    pipe = trained(PipeDream(stages=3), partition=(1, 3))
    assert [memory.stashed for memory in pipe.memory(each_category=True)] == [0, 1 * 48 * 4, 0]
    deeper = trained(DSP(staleness=(4, 2, 0), activations="stored"), partition=(1, 3))
    assert [memory.stashed for memory in deeper.memory(each_category=True)] == [0, 2 * 48 * 4, 0]
