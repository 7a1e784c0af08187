"""A run that is saved and resumed is bitwise the run that was not interrupted."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch
from dist_equal import assert_equal
from dist_methods import VARIANTS
from engine_nets import NETS, classification
from hypothesis import event, given, settings
from hypothesis import strategies as st
from resume_runs import SESSIONS, Outcome, batches, method_of, pipeline, train
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

import stalewise
from stalewise import DSP, CheckpointError, ConfigError
from stalewise.checkpoint import writer
from stalewise.methods import Method

TOTAL = sum(count for count, _ in SESSIONS)


@pytest.fixture(scope="module")
def undisturbed() -> dict[str, Outcome]:
    """Of each variant, filled when first asked for."""
    return {}


def expected(label: str, undisturbed: dict[str, Outcome]) -> Outcome:
    if label not in undisturbed:
        undisturbed[label] = train(pipeline(method_of(label)))
    return undisturbed[label]


@pytest.mark.parametrize("label", VARIANTS)
@pytest.mark.parametrize("stop", [0, 2, 9, 14, 15, 22])
def test_every_method_goes_on_as_if_nothing_had_happened(
    label: str, stop: int, undisturbed: dict[str, Outcome], tmp_path: Path
) -> None:
    """Saved before the first batch, in warm-up, after a pause, in a drain, at its end, and in the second cycle."""
    truth = expected(label, undisturbed)
    saved = train(pipeline(method_of(label)), stop=stop, folder=tmp_path)
    assert_equal(vars(saved), vars(truth))
    resumed = train(pipeline(method_of(label)), losses=truth.losses[:stop], folder=tmp_path)
    assert_equal(vars(resumed), vars(truth))


def test_what_a_run_that_was_left_still_writes_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is the newest checkpoint, and with keep=1 the one before goes with its coming."""
    pipe = pipeline(DSP.minimal(3))
    list(pipe.train(batches(0)))
    pipe.save(tmp_path, keep=1)
    pipe.wait_saved()
    publish = writer.publish

    def late(*args: Any, **options: Any) -> Path:
        time.sleep(0.3)
        return publish(*args, **options)

    monkeypatch.setattr(writer, "publish", late)
    next(pipe.train(batches(1)))
    pipe.save(tmp_path, keep=1)
    del pipe
    point = pipeline(DSP.minimal(3)).resume(tmp_path)
    assert point.path.name.startswith("ckpt-000002-")
    assert point.path.is_dir()


@st.composite
def methods(draw: st.DrawFn) -> Method:
    staleness = (*sorted(draw(st.lists(st.integers(0, 6), max_size=3)), reverse=True), 0)
    options: dict[str, Any] = draw(
        st.sampled_from(
            [{}, {"activations": "stored"}, {"activations": "stored", "weights": "current"}, {"accumulate": 2}]
        )
    )
    return DSP(staleness=staleness, **options)


@given(st.data(), methods(), st.sampled_from(sorted(NETS)), st.integers(1, 12), st.sampled_from([None, 0.05]))
@settings(deadline=None, derandomize=True, max_examples=60)
def test_any_staleness_any_cuts_any_step(
    data: st.DataObject, method: Method, net: str, count: int, clip: float | None
) -> None:
    event(f"K = {method.num_stages}")
    inner = st.integers(1, len(NETS[net]()) - 1)
    cuts = sorted(
        data.draw(st.lists(inner, unique=True, min_size=method.num_stages - 1, max_size=method.num_stages - 1))
    )
    stop = data.draw(st.integers(1, count))
    batches = classification(net, count, last_size=3)
    optimizer = data.draw(
        st.sampled_from(
            [
                lambda params: torch.optim.SGD(params, lr=0.05, momentum=0.9, nesterov=True),
                lambda params: torch.optim.AdamW(params, lr=0.01, amsgrad=True),
            ]
        )
    )

    def build() -> stalewise.Pipeline:
        return stalewise.Pipeline(
            NETS[net](),
            method=method,
            loss_fn=cross_entropy,
            optimizer=optimizer,
            lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.MultiStepLR(optimizer, [3, 5]),
            partition=cuts,
            clip_grad_norm=clip,
            seed=7,
        )

    truth, saved, resumed = build(), build(), build()
    losses = list(truth.train(batches))
    with TemporaryDirectory() as folder:
        seen = []
        for loss in saved.train(batches):
            seen.append(loss)
            if len(seen) == stop:
                saved.save(folder, wait=True)
                break
        point = resumed.resume(folder, positioned=True)
    assert point is not None
    assert point.exact
    rest = [] if point.session_batches is None else batches[point.session_batches :]
    assert seen + list(resumed.train(rest)) == losses
    assert_equal(resumed.state_dict(), truth.state_dict())
    assert_equal(resumed.optimizer_state_dict(), truth.optimizer_state_dict())


class Odd(nn.Module):
    """Keeps a buffer that is not in the state dict, one that comes with the first pass, and returns a view."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 5)
        self.register_buffer("passes", torch.zeros(()), persistent=False)
        self.register_buffer("late", None)

    def forward(self, inputs: Tensor) -> Tensor:
        self.passes += 1
        self.late = self.passes * 2
        return (self.linear(inputs) * (1 + self.passes / 10 + self.late / 10)).t().contiguous().t()


@pytest.mark.parametrize(
    "options", [{}, {"activations": "stored"}, {"activations": "stored", "weights": "current"}], ids=str
)
def test_layers_whose_buffers_matter_to_their_output(options: dict[str, Any], tmp_path: Path) -> None:
    """A graph in flight saw the buffers of its forward, which are long gone when it is built again."""

    def build() -> stalewise.Pipeline:
        torch.manual_seed(0)
        layers = [Odd(), nn.Tanh(), Odd(), nn.Sigmoid(), nn.Linear(5, 3)]
        return stalewise.Pipeline(
            layers,
            method=DSP(staleness=(4, 2, 0), **options),
            loss_fn=cross_entropy,
            optimizer=lambda params: torch.optim.SGD(params, lr=0.05),
            partition=(2, 4),
            seed=1,
        )

    batches = classification("mlp", 14)
    truth, saved, resumed = build(), build(), build()
    losses = list(truth.train(batches))
    seen = list(saved.train(batches[:8], drain=False))
    saved.save(tmp_path, wait=True)
    resumed.resume(tmp_path)
    assert seen + list(resumed.train(batches[8:])) == losses
    assert_equal(resumed.state_dict(), truth.state_dict())


def test_random_numbers_of_the_users_go_on(tmp_path: Path) -> None:
    pipe = pipeline(method_of("dsp"))
    list(pipe.train(classification_images(3)))
    pipe.save(tmp_path, wait=True)
    drawn = (random.random(), np.random.rand(), torch.rand(()).item())
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    pipeline(method_of("dsp")).resume(tmp_path)
    assert (random.random(), np.random.rand(), torch.rand(()).item()) == drawn


def classification_images(count: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(2)
    return [(torch.randn(4, 3, 8, 8, generator=generator), torch.tensor([1, 2, 3, 4])) for _ in range(count)]


class Counting:
    """An iterable that can say where it stands."""

    def __init__(self, batches: list[Any]) -> None:
        self._batches = batches
        self._next = 0

    def __iter__(self) -> Iterator[Any]:
        while self._next < len(self._batches):
            self._next += 1
            yield self._batches[self._next - 1]

    def state_dict(self) -> dict[str, int]:
        return {"next": self._next}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._next = state["next"]


def saved_amid(batches: Any, folder: Path) -> list[float]:
    """Losses until the sixth, after which the run was saved."""
    pipe = pipeline(method_of("dsp"))
    seen = []
    for loss in pipe.train(batches):
        seen.append(loss)
        if len(seen) == 6:
            pipe.save(folder, wait=True)
            break
    return seen


class TestBatches:
    def test_an_iterable_with_a_state_is_brought_to_its_place(self, tmp_path: Path) -> None:
        data = classification_images(20)
        truth = list(pipeline(method_of("dsp")).train(data))
        seen = saved_amid(Counting(data), tmp_path)
        pipe = pipeline(method_of("dsp"))
        pipe.resume(tmp_path)
        assert seen + list(pipe.train(Counting(data))) == truth

    def test_one_without_is_refused(self, tmp_path: Path) -> None:
        data = classification_images(20)
        saved_amid(DataLoader(data, batch_size=None), tmp_path)
        pipe = pipeline(method_of("dsp"))
        point = pipe.resume(tmp_path)
        assert point is not None
        with pytest.raises(ConfigError, match=f"saved after {point.session_batches} batches .* positioned=True"):
            next(iter(pipe.train(DataLoader(data, batch_size=None))))

    def test_between_sessions_any_iterable_will_do(self, tmp_path: Path) -> None:
        data = classification_images(12)
        pipe, truth = pipeline(method_of("dsp")), pipeline(method_of("dsp"))
        seen = list(pipe.train(data[:7]))
        pipe.save(tmp_path, wait=True)
        resumed = pipeline(method_of("dsp"))
        resumed.resume(tmp_path)
        assert seen + list(resumed.train(iter(data[7:]))) == list(truth.train(data[:7])) + list(truth.train(data[7:]))


class TestElsewhere:
    @pytest.mark.parametrize("label", ["dsp", "dsp current", "dni", "gpipe", "dsp accumulate"])
    @pytest.mark.parametrize(("new", "cuts"), [("dsp", (1, 6)), ("bp", (2, 5)), ("dsp", (3,)), ("dsp", (1, 3, 5))])
    def test_the_batches_in_flight_are_finished_first(
        self, label: str, new: str, cuts: tuple[int, ...], tmp_path: Path
    ) -> None:
        """So the weights that go to the new stages are those of the old pipeline after a drain, bit by bit."""
        data = classification_images(9)
        old, drained = pipeline(method_of(label)), pipeline(method_of(label))
        seen = list(old.train(data, drain=False))
        old.save(tmp_path, wait=True)
        losses = list(drained.train(data))
        moved = pipeline(method_of(new, len(cuts) + 1), cuts=cuts)
        point = moved.resume(tmp_path)
        assert point is not None
        if (new, cuts) == (label, (2, 5)):
            assert point.exact
            return
        assert not point.exact
        assert "moved by name" in point.did
        assert seen + list(point.losses) == losses
        assert_equal(moved.state_dict(), drained.state_dict())
        momentum = drained.optimizer_state_dict()["state"]
        assert_equal(moved.optimizer_state_dict()["state"], momentum)
        assert moved.learning_rate == drained.learning_rate
        assert moved.num_batches == 9
        assert len(list(moved.train(data))) == 9

    def test_cuts_that_are_not_known_yet(self, tmp_path: Path) -> None:
        """A profile takes those of the checkpoint where the method is the same, and its own where it is not."""
        data = classification_images(9)
        old = pipeline(method_of("dsp"))
        list(old.train(data))
        old.save(tmp_path, wait=True)
        same = pipeline(method_of("dsp"), cuts="profile")
        other = pipeline(method_of("bp", 2), cuts="profile", verbose=False)
        assert same.resume(tmp_path).exact
        assert same.cuts == (2, 5)
        assert not other.resume(tmp_path).exact
        iterator = iter(other.train(data))
        next(iterator)
        assert other.num_batches == 10

    def test_a_method_of_the_users_own(self, tmp_path: Path) -> None:
        class Own(DSP):
            def __repr__(self) -> str:
                return "Own()"

        data = classification_images(9)
        old = pipeline(Own(staleness=(2, 1, 0)))
        list(old.train(data, drain=False))
        old.save(tmp_path, wait=True)
        assert pipeline(Own(staleness=(2, 1, 0))).resume(tmp_path).exact
        with pytest.raises(CheckpointError, match=r"saved by Own\(\), a method of your own"):
            pipeline(method_of("bp")).resume(tmp_path)


class TestMisuse:
    def test_a_pipeline_that_has_trained(self, tmp_path: Path) -> None:
        pipe = pipeline(method_of("dsp"))
        list(pipe.train(classification_images(2)))
        pipe.save(tmp_path, wait=True)
        with pytest.raises(ConfigError, match="trained on 2 batches already; resume a new one"):
            pipe.resume(tmp_path)

    def test_nothing_to_resume(self, tmp_path: Path) -> None:
        assert pipeline(method_of("dsp")).resume(tmp_path, missing_ok=True) is None
        with pytest.raises(CheckpointError, match="there is no complete checkpoint"):
            pipeline(method_of("dsp")).resume(tmp_path / "none")

    @pytest.mark.parametrize("keep", [0, -1, 1.5, True])
    def test_keep(self, keep: Any, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="keep is"):
            pipeline(method_of("dsp")).save(tmp_path, keep=keep)

    def test_extra(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="extra cannot be saved"):
            pipeline(method_of("dsp")).save(tmp_path, extra=torch.ones(()))

    def test_cuts_that_are_not_known(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="save was called before the cuts are known"):
            pipeline(method_of("dsp"), cuts="profile").save(tmp_path)

    @pytest.mark.parametrize(
        ("options", "text"),
        [
            ({"optimizer": lambda params: torch.optim.Adam(params)}, "optimizer of stage 0 is SGD in it and Adam here"),
            ({"lr_scheduler": None}, "lr scheduler of stage 0 is OneCycleLR in it and None here"),
        ],
    )
    def test_another_run(self, options: dict[str, Any], text: str, tmp_path: Path) -> None:
        pipeline(method_of("dsp")).save(tmp_path, wait=True)
        with pytest.raises(CheckpointError, match=text):
            pipeline(method_of("dsp"), **options).resume(tmp_path)

    def test_another_precision(self, tmp_path: Path) -> None:
        """Refused both ways; a method that can run under autocast is resumed with the same one."""
        for saved, other in ((None, "bfloat16"), ("bfloat16", None)):
            folder = tmp_path / str(saved)
            pipeline(method_of("dsp"), autocast=saved).save(folder, wait=True)
            with pytest.raises(CheckpointError, match=f"saved with autocast={saved!r}, .* has autocast={other!r}"):
                pipeline(method_of("dsp"), autocast=other).resume(folder)
            point = pipeline(method_of("dsp"), autocast=saved).resume(folder)
            assert point is not None
            assert point.exact

    def test_another_clipping_and_other_threads_are_told(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        pipeline(method_of("dsp"), clip_grad_norm=0.5).save(tmp_path, wait=True)
        point = pipeline(method_of("dsp"), clip_grad_norm=2.0).resume(tmp_path)
        assert point is not None
        assert not point.exact
        assert "from here on clip_grad_norm is 2.0 instead of 0.5" in point.did
        assert "round differently" not in point.did
        now = {"torch": "9.9", "threads": torch.get_num_threads()}
        monkeypatch.setattr("stalewise.runtime.persistence.environment", lambda: now)
        point = pipeline(method_of("dsp"), clip_grad_norm=0.5).resume(tmp_path)
        assert point is not None
        assert point.exact
        assert "and this is 9.9: kernels may round differently" in point.did

    def test_another_model(self, tmp_path: Path) -> None:
        pipeline(method_of("dsp")).save(tmp_path, wait=True)
        layers = [nn.Conv2d(3, 8, 5, padding=2), *list(pipeline(method_of("dsp"))._chain.layers)[1:]]
        other = stalewise.Pipeline(
            layers,
            method=method_of("dsp"),
            loss_fn=cross_entropy,
            optimizer=lambda params: torch.optim.SGD(params, lr=0.02),
            partition=(2, 5),
            lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=9),
        )
        before = {name: value.clone() for name, value in other.state_dict().items()}
        with pytest.raises(CheckpointError, match=r"model: '0.weight' .* \[8, 3, 3, 3\] in it and \[8, 3, 5, 5\] here"):
            other.resume(tmp_path)
        assert_equal(other.state_dict(), before)
