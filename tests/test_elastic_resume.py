"""Random orders of elastic stages, interrupted after any loss and resumed: bitwise as without the interruption."""

from __future__ import annotations

from tempfile import TemporaryDirectory

import pytest
import torch
from dist_equal import assert_equal
from elastic_play import play
from engine_nets import classification
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import stalewise
from stalewise import DSP, CheckpointError
from stalewise.protocol.course import Orders


class Counts(nn.Module):
    """Its output depends on how often it was called, in buffers that come in all kinds; it drops out at random."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 5)
        self.norm = nn.BatchNorm1d(5)
        self.drop = nn.Dropout(0.3)
        self.register_buffer("passes", torch.zeros(()), persistent=False)
        self.register_buffer("total", torch.zeros(()))
        self.register_buffer("late", None)

    def forward(self, inputs: Tensor) -> Tensor:
        self.passes += 1
        self.total += 2
        self.late = (torch.zeros(()) if self.late is None else self.late) + 3
        scale = 1 + self.passes / 10 + self.total / 20 + self.late / 30
        return self.drop(self.norm(self.linear(inputs))) * scale


def build(staleness: list[int], replay: Orders | None = None) -> stalewise.Pipeline:
    torch.manual_seed(0)
    count = len(staleness)
    layers = [layer for _ in range(count) for layer in (Counts(), nn.Tanh())]
    return stalewise.Pipeline(
        [*layers, nn.Linear(5, 3)],
        method=DSP(staleness=staleness, elastic=True),
        loss_fn=cross_entropy,
        optimizer=lambda params: torch.optim.AdamW(params, lr=0.01),
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 3),
        partition=[2 * stage for stage in range(1, count)],
        seed=5,
        replay=replay,
    )


@given(st.data())
@settings(deadline=None, derandomize=True, max_examples=25)
def test_any_order_any_step(data: st.DataObject) -> None:
    num_stages = data.draw(st.integers(2, 4))
    extra = sorted(data.draw(st.lists(st.integers(0, 3), min_size=num_stages - 1, max_size=num_stages - 1)))[::-1]
    staleness = [num_stages - 1 - stage + more for stage, more in enumerate([*extra, 0])]
    method = DSP(staleness=staleness, elastic=True)
    count = data.draw(st.integers(2, 10))
    orders = play(method, count, data, None)
    batches = classification("mlp", count)
    stop = data.draw(st.integers(1, count))
    truth, saved, resumed = (build(staleness, orders) for _ in range(3))
    losses = list(truth.train(batches))
    with TemporaryDirectory() as folder:
        seen = []
        for loss in saved.train(batches):
            seen.append(loss)
            if len(seen) == stop:
                saved.save(folder, wait=True)
        point = resumed.resume(folder, positioned=True)
    assert point is not None
    assert point.exact
    rest = [] if point.session_batches is None else batches[point.session_batches :]
    assert seen == losses
    assert seen[:stop] + list(resumed.train(rest)) == losses
    assert_equal(resumed.state_dict(), truth.state_dict())
    assert_equal(resumed.optimizer_state_dict(), truth.optimizer_state_dict())
    assert resumed.orders() == truth.orders() == orders
    assert resumed.statuses()[0]["staleness_counts"] == truth.statuses()[0]["staleness_counts"]


def test_another_record_is_refused(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("record")
    pipe = build([3, 1, 0])
    list(pipe.train(classification("mlp", 6), drain=False))
    pipe.save(folder, wait=True)
    wrong = tuple(("R" + cycles[0],) for cycles in pipe.orders())
    with pytest.raises(CheckpointError, match="another one than that of the checkpoint: cycle 0 of stage 0 begins"):
        build([3, 1, 0], wrong).resume(folder)


def test_moving_elsewhere_finishes_the_batches_in_flight(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("elsewhere")
    batches = classification("mlp", 8)
    pipe = build([4, 2, 0])
    seen = list(pipe.train(batches, drain=False))
    pipe.save(folder, wait=True)
    losses = [*seen, *pipe.drain()]
    torch.manual_seed(0)
    other = stalewise.Pipeline(
        [layer for _ in range(3) for layer in (Counts(), nn.Tanh())] + [nn.Linear(5, 3)],
        method=DSP(staleness=(1, 0), elastic=True),
        loss_fn=cross_entropy,
        optimizer=lambda params: torch.optim.AdamW(params, lr=0.01),
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 3),
        partition=[3],
        seed=5,
    )
    point = other.resume(folder)
    assert point is not None
    assert not point.exact
    assert [*seen, *point.losses] == losses
    assert_equal(other.state_dict(), pipe.state_dict())
