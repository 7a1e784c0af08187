"""Slow steps take longer by what was asked for, all of their actions do, and no number changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from engine_nets import NETS, assert_same, classification, sgd
from torch.nn.functional import cross_entropy

from stalewise.engine import brake
from stalewise.engine.brake import Brake
from stalewise.methods import build_method
from stalewise.pipeline import Pipeline
from stalewise.protocol.actions import COMPUTE, Kind
from stalewise.protocol.stragglers import Straggler, Stragglers

SPELLS = Straggler(probability=0.3, factor=2, duration=2, how="sleep", seed=5)


class FakeTime:
    """A clock that advances where somebody sleeps or multiplies matrices."""

    def __init__(self) -> None:
        self.now_ns = 1_000
        self.slept_s: list[float] = []

    def perf_counter_ns(self) -> int:
        return self.now_ns

    def sleep(self, seconds: float) -> None:
        self.slept_s.append(seconds)
        self.now_ns += round(seconds * 1e9)


def test_sleeping_and_pausing(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = FakeTime()
    monkeypatch.setattr(brake, "time", clock)
    held = Brake(
        Stragglers.of([Straggler(factor=2.5, how="sleep", first=1), Straggler(pause_s=7, first=1, last=1)]),
        0,
        torch.device("cpu"),
    )
    for update, elapsed_s in ((0, 4), (1, 2), (1, 6), (2, 1)):
        start = clock.now_ns
        clock.now_ns += elapsed_s * 10**9
        held.hold(update, start)
    assert clock.slept_s == [7, 3, 9, 1.5], "the first step is quick, a pause comes once a step"


def test_being_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    """It computes until the time is over; what it was too long is taken off the next time."""
    clock = FakeTime()
    products = []

    def multiply(*_: Any, **__: Any) -> None:
        products.append(clock.now_ns)
        clock.now_ns += 40

    monkeypatch.setattr(brake, "time", clock)
    monkeypatch.setattr(brake.torch, "mm", multiply)
    held = Brake(Stragglers.of(Straggler(factor=1.5)), 0, torch.device("cpu"))
    ends = []
    for _ in range(3):
        start = clock.now_ns
        clock.now_ns += 200
        held.hold(0, start)
        ends.append(clock.now_ns - start)
    assert ends == [320, 280, 320], "3, 2 and 3 products of 40 for 100 each time, of which 20 were too much twice"


@pytest.mark.parametrize("name", ["bp", "gpipe", "dsp", "pipedream"])
def test_every_method_meets_the_same_slow_steps(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step is everything up to its update, and all methods make the same updates."""
    held: list[tuple[int, int, bool]] = []

    def note(self: Brake, update: int, start_ns: int) -> None:
        held.append((self._stage, update, self._stragglers.slowing(self._stage, update) is not None))

    monkeypatch.setattr(Brake, "hold", note)
    pipeline = trained(name, stragglers=SPELLS)
    slow = {(stage, update) for stage, update, is_slow in held if is_slow}
    assert slow == {(stage, update) for stage in range(3) for update in range(14) if SPELLS.is_slow(stage, update)}
    assert 5 < len(slow) < 37
    for stage, trace in enumerate(pipeline.traces()):
        updates = 0
        expected = []
        for span in trace:
            if span.kind in COMPUTE:
                expected.append(updates)
            updates += span.kind is Kind.UPDATE
        assert [update for of_stage, update, _ in held if of_stage == stage] == expected


@pytest.mark.parametrize("how", ["busy", "sleep"])
@pytest.mark.parametrize("name", ["dsp", "dsp-stored", "gpipe", "dni"])
def test_no_number_changes(name: str, how: Any) -> None:
    calm = trained(name)
    slowed = trained(
        name, stragglers=[Straggler(probability=0.4, factor=1.7, how=how), Straggler(pause_s=1e-4, probability=0.2)]
    )
    assert_same(slowed.state_dict(), calm.state_dict())
    assert_same(slowed.optimizer_state_dict(), calm.optimizer_state_dict())


def trained(name: str, **options: Any) -> Pipeline:
    """A pipeline of 3 stages after 14 updates, with dropout and BatchNorm."""
    pipeline = Pipeline(
        NETS["cnn"](),
        method=build_method(name, num_stages=3),
        loss_fn=cross_entropy,
        optimizer=sgd,
        partition=(2, 6),
        seed=1,
        engine="sequential",
        **options,
    )
    data = classification("cnn", 9)
    assert len([*pipeline.train(data, drain=False), *pipeline.train(data[:5])]) == 14
    return pipeline
