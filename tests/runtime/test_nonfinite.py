"""Batches whose loss is NaN or infinite: stop with the batch saved, skip it on all stages, or go on."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import dist_nonfinite
import pytest
import torch
from dist_equal import assert_equal
from dist_nonfinite import BAD, VARIANTS, data, pipeline
from torch import nn

import stalewise
from stalewise.checkpoint.batch_file import read_batch


@pytest.fixture(scope="module")
def alone() -> dict[str, dict[str, Any]]:
    return dist_nonfinite.skip_all(data())


@pytest.mark.parametrize("variant", VARIANTS)
def test_skipped_batches_leave_no_trace(variant: str, alone: dict[str, dict[str, Any]]) -> None:
    ran = alone[variant]
    assert [index for index, loss in enumerate(ran["losses"]) if not math.isfinite(loss)] == list(BAD)
    assert all(torch.isfinite(value).all() for value in ran["state"].values())
    states = ran["optimizer"]["state"].values()
    assert all(torch.isfinite(value).all() for state in states for value in state.values() if value is not None)


def test_without_staleness_a_run_that_skips_is_a_run_without_those_batches(alone: dict[str, dict[str, Any]]) -> None:
    # Dropout draws by batch index, so the good batches keep theirs where the bad ones have no updates at all.
    ran, reference = alone["bp"], dist_nonfinite.net()
    stages = [reference[:2], reference[2:4], reference[4:]]
    optimizers = [torch.optim.SGD(s.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01) for s in stages]
    schedulers = [torch.optim.lr_scheduler.StepLR(optimizer, 4, gamma=0.9) for optimizer in optimizers]
    from stalewise.engine.randomness import random_stream, stream_seed

    for batch, (inputs, target) in enumerate(data()):
        if batch in BAD:
            continue
        value = inputs
        for index, stage in enumerate(stages):
            with random_stream(stream_seed(1, index, batch), torch.device("cpu")):
                value = stage(value)
        loss = nn.functional.cross_entropy(value, target)
        loss.backward()
        assert loss.item() == ran["losses"][batch]
        for optimizer, scheduler in zip(optimizers, schedulers, strict=True):
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
    expected = reference.state_dict()
    assert all(torch.equal(ran["state"][name], value) for name, value in expected.items())


@pytest.mark.dist
def test_processes_skip_what_one_process_skips(tmp_path: Path, alone: dict[str, dict[str, Any]]) -> None:
    stalewise.launch(dist_nonfinite.skip_worker, num_workers=3, args=[str(tmp_path)])
    for rank in range(3):
        assert_equal(torch.load(tmp_path / f"rank{rank}.pt"), alone)


@pytest.mark.parametrize("variant", [*VARIANTS, "dni"])
def test_a_run_stops_where_the_loss_is_due(variant: str, tmp_path: Path) -> None:
    with pytest.raises(stalewise.NonFiniteLoss, match=r"batch 5 is (nan|inf) \(stage 2 computed it\).*batch-5\.json"):
        dist_nonfinite.stop_worker(str(tmp_path), variant)
    assert len((tmp_path / "losses0.txt").read_text().splitlines()) == 5
    assert_equal(read_batch(tmp_path / "bad" / "batch-5.json"), data((5,))[5])
    assert sorted(path.name for path in (tmp_path / "bad").iterdir()) == ["batch-5.json", "batch-5.safetensors"]


@pytest.mark.dist
@pytest.mark.parametrize("variant", ["dsp", "1f1b"])
def test_a_job_stops_with_the_batch_saved(variant: str, tmp_path: Path) -> None:
    with pytest.raises(stalewise.WorkerError, match=r"stage 0 .* failed, batch 5") as caught:
        stalewise.launch(dist_nonfinite.stop_worker, num_workers=3, args=[str(tmp_path), variant])
    assert caught.value.cause_type == "NonFiniteLoss"
    assert "the loss of batch 5 is nan (stage 2 computed it)" in caught.value.cause
    assert_equal(read_batch(tmp_path / "bad" / "batch-5.json"), data((5,))[5])
    assert len((tmp_path / "losses0.txt").read_text().splitlines()) == 5


def test_go_on_trains_with_every_batch() -> None:
    ran = pipeline("dsp", "go-on")
    losses = list(ran.train(data((5,))))
    assert [math.isfinite(loss) for loss in losses] == [True] * 5 + [False] * 15


def test_a_run_resumed_with_a_bad_batch_in_flight_skips_it(tmp_path: Path, alone: dict[str, dict[str, Any]]) -> None:
    first = pipeline("dsp", "skip")
    losses = []
    for loss in first.train(data()):
        losses.append(loss)
        if len(losses) == 4:
            first.save(tmp_path, wait=True)
            break
    second = pipeline("dsp", "skip")
    point = second.resume(tmp_path, positioned=True)
    assert point is not None
    assert point.session_batches == 8  # batches 5, 6 and 7 are on their way down
    losses = [*losses[:4], *second.train(data()[8:])]
    ran = alone["dsp"]
    assert [repr(loss) for loss in losses] == [repr(loss) for loss in ran["losses"]]
    assert_equal(second.state_dict(), ran["state"])


def test_a_batch_that_cannot_be_saved_still_stops_the_run(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    ran = pipeline("dsp", "stop", nonfinite_folder=tmp_path / "file" / "bad")
    with pytest.raises(stalewise.NonFiniteLoss, match="could not be saved: cannot write"):
        list(ran.train(data((5,))))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variant": "dsp", "policy": "ignore"}, 'it must be "stop", "skip" or "go-on"'),
        ({"variant": "dsp", "policy": None}, "nonfinite_loss is None"),
        ({"variant": "dni", "policy": "skip"}, "before a stage knows the loss"),
        ({"variant": "dsp", "policy": "stop", "nonfinite_folder": 3}, "nonfinite_folder is 3"),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(stalewise.ConfigError, match=message):
        pipeline(**options)


def test_constant_buffers_may_be_infinite() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mask", torch.tensor([0.0, float("-inf")]))
            self.norm = nn.BatchNorm1d(4)

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return self.norm(inputs)

    ran = stalewise.Pipeline(
        [Masked(), nn.Linear(4, 3)],
        method=stalewise.DSP.minimal(2),
        loss_fn=nn.functional.cross_entropy,
        optimizer=lambda params: torch.optim.SGD(params, lr=0.1),
        partition=(1,),
        nonfinite_loss="skip",
    )
    list(ran.train(data(())))
    assert ran.state_dict()["0.norm.num_batches_tracked"] == 20


@pytest.mark.parametrize("damage", ["{}", "[", "null", '{"format": "stalewise batch 1", "value": ["tensor", 0]}'])
def test_damaged_files_of_batches_are_refused(damage: str, tmp_path: Path) -> None:
    (tmp_path / "batch-1.json").write_text(damage)
    with pytest.raises(stalewise.CheckpointError, match="is not a saved batch"):
        read_batch(tmp_path / "batch-1.json")
