"""The reference is held to simpler truths: plain loops, hand-written recurrences, counts, stability."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise

import pytest
import torch
from reference import train_reference
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import ExponentialLR, LRScheduler

Batches = list[tuple[Tensor, Tensor]]
MakeOptimizer = Callable[[list[nn.Parameter]], Optimizer]


# --- helpers ----------------------------------------------------------------------------------------------


def cnn() -> list[nn.Module]:
    """Seven layers with BatchNorm, and ReLUs in place: cut 2 puts one at the start of a stage."""
    torch.manual_seed(0)
    return [
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.Conv2d(8, 8, 3, stride=2, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 5)),
    ]


def image_batches(count: int) -> Batches:
    torch.manual_seed(1)
    return [(torch.randn(6, 3, 8, 8), torch.randint(5, (6,))) for _ in range(count)]


def momentum_sgd(params: list[nn.Parameter]) -> Optimizer:
    return SGD(params, lr=0.05, momentum=0.9, nesterov=True, weight_decay=5e-4)


def adamw(params: list[nn.Parameter]) -> Optimizer:
    return AdamW(params, lr=0.01)


def decay(optimizer: Optimizer) -> LRScheduler:
    return ExponentialLR(optimizer, 0.8)


def train_plain(
    layers: list[nn.Module],
    parts: list[slice],
    batches: Batches,
    make_optimizer: MakeOptimizer,
    clip_grad_norm: float | None = None,
) -> tuple[list[float], list[Optimizer]]:
    """The loop everybody writes; ``parts`` only says which parameters share an optimizer and a norm."""
    net, losses = nn.Sequential(*layers), []
    params = [list(nn.Sequential(*layers[part]).parameters()) for part in parts]
    optimizers = [make_optimizer(p) for p in params]
    schedulers = [decay(optimizer) for optimizer in optimizers]
    for inputs, target in batches:
        loss = cross_entropy(net(inputs), target)
        net.zero_grad()
        loss.backward()
        losses.append(loss.item())
        for p, optimizer, scheduler in zip(params, optimizers, schedulers, strict=True):
            if clip_grad_norm is not None:
                nn.utils.clip_grad_norm_(p, clip_grad_norm)
            optimizer.step()
            scheduler.step()
    return losses, optimizers


def assert_same_layers(layers: list[nn.Module], expected: list[nn.Module]) -> None:
    """Bitwise equality of every parameter and buffer."""
    state, truth = nn.Sequential(*layers).state_dict(), nn.Sequential(*expected).state_dict()
    assert list(state) == list(truth)
    for name, value in truth.items():
        torch.testing.assert_close(state[name], value, rtol=0, atol=0, msg=lambda m, n=name: f"{n}: {m}")


def assert_same_optimizers(optimizers: list[Optimizer | None], expected: list[Optimizer]) -> None:
    """Bitwise equality of every entry of the optimizers' states, the learning rate included."""
    for optimizer, truth in zip(optimizers, expected, strict=True):
        assert optimizer.param_groups[0]["lr"] == truth.param_groups[0]["lr"]
        state, true_state = optimizer.state_dict()["state"], truth.state_dict()["state"]
        assert len(true_state) > 0
        torch.testing.assert_close(state, true_state, rtol=0, atol=0)


class Shift(nn.Module):
    """h + w, one weight."""

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weight, dtype=torch.float64))

    def forward(self, h: Tensor) -> Tensor:
        return h + self.weight


class Sine(Shift):
    """sin(w h): both partial derivatives depend on both w and h."""

    def forward(self, h: Tensor) -> Tensor:
        return torch.sin(self.weight * h)


class Square(nn.Module):
    """h * h, no parameters."""

    def forward(self, h: Tensor) -> Tensor:
        return h * h


def scalar_batches(count: int) -> Batches:
    generator = torch.Generator().manual_seed(2)
    values = torch.rand(count, 2, dtype=torch.float64, generator=generator) + 0.5
    return [(h, target) for h, target in values]


def half_square(output: Tensor, target: Tensor) -> Tensor:
    return 0.5 * (output - target) ** 2


# --- m = 0, or a drain after every batch, is plain backpropagation ----------------------------------------


@pytest.mark.parametrize("make_optimizer", [momentum_sgd, adamw])
@pytest.mark.parametrize(
    ("cuts", "staleness", "drains"),
    [
        ((), (0,), ()),
        ((3,), (0, 0), ()),
        ((2, 4, 6), (0, 0, 0, 0), (4,)),
        ((2, 4), (4, 2, 0), tuple(range(1, 13))),
        ((1, 3, 6), (3, 3, 1, 0), tuple(range(13))),
    ],
)
@pytest.mark.parametrize("clip_grad_norm", [None, 0.1])
def test_without_staleness_it_is_plain_backpropagation_bitwise(
    make_optimizer: MakeOptimizer,
    cuts: tuple[int, ...],
    staleness: tuple[int, ...],
    drains: tuple[int, ...],
    clip_grad_norm: float | None,
) -> None:
    batches, layers, plain = image_batches(12), cnn(), cnn()
    parts = [slice(low, high) for low, high in pairwise([0, *cuts, len(plain)])]
    losses, optimizers = train_plain(plain, parts, batches, make_optimizer, clip_grad_norm)
    result = train_reference(
        layers,
        cuts,
        staleness,
        batches,
        cross_entropy,
        make_optimizer,
        decay,
        drains=drains,
        clip_grad_norm=clip_grad_norm,
    )
    assert result.losses == losses
    assert_same_layers(layers, plain)
    assert_same_optimizers(result.optimizers, optimizers)
    with pytest.raises(AssertionError):  # the comparison sees that training changed something
        assert_same_layers(layers, cnn())


def test_with_staleness_it_is_not_plain_backpropagation_until_a_batch_is_stale() -> None:
    batches, layers, plain = image_batches(12), cnn(), cnn()
    losses, _ = train_plain(plain, [slice(0, 2), slice(2, 4), slice(4, 7)], batches, momentum_sgd)
    result = train_reference(layers, (2, 4), (4, 2, 0), batches, cross_entropy, momentum_sgd, decay)
    assert result.losses[0] == losses[0]  # forwarded before any update
    assert all(a != b for a, b in zip(result.losses[1:], losses[1:], strict=True))


# --- one trained stage is delayed SGD ----------------------------------------------------------------------


@pytest.mark.parametrize("delay", [0, 1, 2, 5])
def test_one_trained_stage_is_delayed_sgd_on_a_quadratic(delay: int) -> None:
    """Loss a/2 (h + w - t)^2 through a stage without parameters: w_{n+1} = w_n - lr grad(w_{max(0, n-m)})."""
    a, lr, batches, layer = 0.7, 0.3, scalar_batches(30), Shift(2.0)
    truth = [2.0]
    for n, (h, target) in enumerate(batches):
        truth.append(truth[n] - lr * a * (h.item() + truth[max(0, n - delay)] - target.item()))
    seen: list[float] = []

    def make_optimizer(params: list[nn.Parameter]) -> Optimizer:
        optimizer = SGD(params, lr=lr)
        optimizer.register_step_post_hook(lambda *_: seen.append(params[0].item()))
        return optimizer

    result = train_reference(
        [layer, nn.Identity()], (1,), (delay, 0), batches, lambda y, t: a * half_square(y, t), make_optimizer
    )
    assert seen == pytest.approx(truth[1:], rel=1e-12)
    assert result.optimizers[1] is None
    expected = [a / 2 * (h.item() + truth[max(0, n - delay)] - t.item()) ** 2 for n, (h, t) in enumerate(batches)]
    assert result.losses == pytest.approx(expected, rel=1e-9)


def test_frozen_stages_pass_gradients_and_have_no_optimizer() -> None:
    """Stage 0 frozen, stage 1 trained with delay 2, stages 2 and 3 frozen or without parameters."""
    lr, delay, batches = 0.1, 2, scalar_batches(20)
    below, trained, above = Shift(0.3), Shift(1.0), Shift(-0.2)
    below.requires_grad_(False)
    above.requires_grad_(False)
    truth = [1.0]
    for n, (h, target) in enumerate(batches):
        y = h.item() + 0.3 + truth[max(0, n - delay)] - 0.2
        truth.append(truth[n] - lr * (y * y - target.item()) * 2 * y)
    result = train_reference(
        [below, trained, above, Square()],
        (1, 2, 3),
        (5, delay, 1, 0),
        batches,
        half_square,
        lambda p: SGD(p, lr),
    )
    assert trained.weight.item() == pytest.approx(truth[-1], rel=1e-12)
    assert (below.weight.item(), above.weight.item()) == (0.3, -0.2)
    assert [optimizer is None for optimizer in result.optimizers] == [True, False, True, True]


# --- several trained stages: a truth without a pipeline ----------------------------------------------------


def sines_by_hand(
    weights: list[float],
    staleness: tuple[int, ...],
    batches: Batches,
    lr: float,
    momentum: float,
    decay_rate: float,
    drains: tuple[int, ...],
) -> tuple[list[float], list[list[float]]]:
    """DSP on sin(w_k h) stages without steps or queues: history[k][u] is stage k's weight after u updates.

    Batch j is the (j + 1)-th update everywhere, so its recompute uses history[k][j]. Its forward uses
    history[k][u] with section 3's u = U + max(0, n - m_k): n counts from the last drain, after U updates.
    """
    history, velocity = [[w] for w in weights], [0.0] * len(weights)
    losses = []
    for j, (h0, target) in enumerate(batches):
        drained = max(d for d in (0, *drains) if d <= j)
        h = [h0.item()]
        for k, m in enumerate(staleness):
            h.append(math.sin(history[k][drained + max(0, j - drained - m)] * h[k]))
        g = h[-1] - target.item()
        losses.append(0.5 * g * g)
        for k in reversed(range(len(weights))):
            w = history[k][j]
            slope = math.cos(w * h[k]) * g
            velocity[k] = momentum * velocity[k] + slope * h[k]
            g = slope * w
            history[k].append(w - lr * decay_rate**j * velocity[k])
    return losses, history


@pytest.mark.parametrize("drains", [(), (7,), (3, 4, 15)])
@pytest.mark.parametrize("staleness", [(0, 0, 0), (2, 1, 0), (4, 2, 0), (10, 5, 0), (3, 3, 0), (2, 0, 0), (50, 1, 0)])
def test_three_trained_stages_follow_the_hand_written_recurrence(
    staleness: tuple[int, ...], drains: tuple[int, ...]
) -> None:
    start, lr, momentum, batches = [1.3, 0.8, 1.7], 0.1, 0.5, scalar_batches(24)
    layers: list[nn.Module] = [Sine(w) for w in start]
    losses, history = sines_by_hand(start, staleness, batches, lr, momentum, 0.9, drains)
    result = train_reference(
        layers,
        (1, 2),
        staleness,
        batches,
        half_square,
        lambda p: SGD(p, lr, momentum),
        lambda optimizer: ExponentialLR(optimizer, 0.9),
        drains=drains,
    )
    assert result.losses == pytest.approx(losses, rel=1e-9)
    assert [layer.weight.item() for layer in layers] == pytest.approx([w[-1] for w in history], rel=1e-11)


def test_staleness_and_drains_change_the_weights_far_above_rounding() -> None:
    """Guards the tolerance above: neighbouring settings differ by more than 1e-5 after the same batches."""
    batches = scalar_batches(24)

    def final(staleness: tuple[int, ...], drains: tuple[int, ...] = ()) -> float:
        layers: list[nn.Module] = [Sine(w) for w in (1.3, 0.8, 1.7)]
        train_reference(layers, (1, 2), staleness, batches, half_square, lambda p: SGD(p, 0.1, 0.5), drains=drains)
        return layers[0].weight.item()

    values = [
        final((0, 0, 0)),
        final((2, 1, 0)),
        final((3, 1, 0)),
        final((3, 2, 0)),
        final((3, 1, 0), (7,)),
        final((3, 1, 0), (8,)),
    ]
    assert min(abs(a - b) for i, a in enumerate(values) for b in values[:i]) > 1e-5


@pytest.mark.parametrize(
    ("staleness", "limit"),
    [((3, 0), 2 * math.sin(math.pi / 14)), ((4, 2, 0), 0.3820)],
)
def test_stability_limit_of_shifts_on_a_quadratic(staleness: tuple[int, ...], limit: float) -> None:
    """Section 5: one trained stage of delay T: 2 sin(pi / (2(2T+1))); all three of (4,2,0): 0.3820."""

    def final_error(lr: float) -> float:
        layers: list[nn.Module] = [Shift(1.0) for _ in staleness]
        if len(staleness) == 2:
            layers[1] = nn.Identity()
        zero = torch.zeros((), dtype=torch.float64)
        cuts = tuple(range(1, len(staleness)))
        result = train_reference(layers, cuts, staleness, [(zero, zero)] * 1500, half_square, lambda p: SGD(p, lr))
        return max(result.losses[-20:]) / result.losses[0]

    assert final_error(0.98 * limit) < 1e-3
    assert final_error(1.02 * limit) > 1e2


# --- what every pass sees ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("staleness", "drains"), [((4, 2, 0), ()), ((4, 2, 0), (5, 6)), ((3, 3, 0), (2,)), ((9, 0, 0), ())]
)
def test_order_of_passes_and_updates_and_batchnorm_counts(staleness: tuple[int, ...], drains: tuple[int, ...]) -> None:
    """Every pass sees the declared number of updates; each of the N updates changes every weight."""
    num_batches = 11
    layers = cnn()
    stages = [nn.Sequential(*layers[:2]), nn.Sequential(*layers[2:5]), nn.Sequential(*layers[5:])]
    weights: list[list[list[Tensor]]] = [[] for _ in stages]  # by stage, update
    events: list[list[tuple[object, ...]]] = [[] for _ in stages]

    def snapshot(k: int) -> None:
        weights[k].append([p.detach().clone() for p in stages[k].parameters()])

    def make_optimizer(params: list[nn.Parameter]) -> Optimizer:
        k = next(i for i, stage in enumerate(stages) if params[0] is next(stage.parameters()))
        assert [id(p) for p in params] == [id(p) for p in stages[k].parameters()]
        snapshot(k)
        optimizer = momentum_sgd(params)
        optimizer.register_step_post_hook(lambda *_: (snapshot(k), events[k].append(("update",))))
        return optimizer

    @contextmanager
    def record(k: int, batch: int) -> Iterator[None]:
        counts = [int(m.num_batches_tracked) for m in stages[k] if isinstance(m, nn.BatchNorm2d)]
        before = [b.clone() for b in stages[k].buffers()]
        now = list(stages[k].parameters())
        assert all(torch.equal(a, b) for a, b in zip(now, weights[k][-1], strict=True))
        grad_modes.clear()
        yield
        moved = [not torch.equal(a, b) for a, b in zip(before, stages[k].buffers(), strict=True)]
        with_graph = grad_modes == [True]
        assert len(grad_modes) == 1
        assert moved == [with_graph] * len(moved)
        events[k].append(("graph" if with_graph else "forward", batch, len(weights[k]) - 1, counts))

    grad_modes: list[bool] = []
    for stage in stages:
        stage[0].register_forward_pre_hook(lambda *_: grad_modes.append(torch.is_grad_enabled()))

    train_reference(
        layers,
        (2, 5),
        staleness,
        image_batches(num_batches),
        cross_entropy,
        make_optimizer,
        drains=drains,
        pass_context=record,
    )
    for k, (m, num_norms) in enumerate(zip(staleness, (1, 1, 0), strict=True)):
        expected: list[tuple[object, ...]] = []
        for start, end in pairwise([0, *drains, num_batches]):
            for n in range(end - start + m):
                seen = start + max(0, n - m)  # updates, and BatchNorm steps
                if n < end - start and m > 0:
                    expected.append(("forward", start + n, seen, [seen] * num_norms))
                if n >= m:
                    expected += [("graph", start + n - m, seen, [seen] * num_norms), ("update",)]
        assert events[k] == expected
        assert len(weights[k]) == 1 + num_batches
        for old, new in pairwise(weights[k]):
            assert not any(torch.equal(a, b) for a, b in zip(old, new, strict=True))


def test_batchnorm_statistics_are_one_running_mean_over_all_batches() -> None:
    torch.manual_seed(3)
    batches = [(torch.randn(6, 4, dtype=torch.float64) + i, torch.randint(3, (6,))) for i in range(9)]
    norm = nn.BatchNorm1d(4, dtype=torch.float64)
    layers = [norm, nn.Linear(4, 4, dtype=torch.float64), nn.Linear(4, 3, dtype=torch.float64)]
    mean, var = torch.zeros(4, dtype=torch.float64), torch.ones(4, dtype=torch.float64)
    for h, _ in batches:
        mean, var = 0.9 * mean + 0.1 * h.mean(0), 0.9 * var + 0.1 * h.var(0)
    train_reference(layers, (1, 2), (4, 2, 0), batches, cross_entropy, momentum_sgd, drains=(5,))
    assert norm.num_batches_tracked.item() == len(batches)
    torch.testing.assert_close(norm.running_mean, mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(norm.running_var, var, rtol=1e-12, atol=1e-12)


def test_pass_context_can_give_forward_and_recompute_the_same_random_numbers() -> None:
    """At learning rate 0 a batch's two passes agree bitwise if seeded by (stage, batch), and only then."""

    def outputs(seeded: bool) -> dict[int, list[Tensor]]:
        torch.manual_seed(4)
        layers = [nn.Linear(8, 8), nn.Dropout(0.5), nn.Linear(8, 3)]
        seen: dict[int, list[Tensor]] = {}
        current: list[int] = []
        layers[1].register_forward_hook(lambda _m, _i, z: seen.setdefault(current[-1], []).append(z.detach()))

        @contextmanager
        def context(k: int, batch: int) -> Iterator[None]:
            current.append(batch)
            if seeded:
                torch.manual_seed(1000 * k + batch)
            yield

        batches = [(torch.randn(4, 8), torch.randint(3, (4,))) for _ in range(6)]
        make_optimizer = lambda p: SGD(p, lr=0.0)  # noqa: E731
        train_reference(layers, (2,), (2, 0), batches, cross_entropy, make_optimizer, pass_context=context)
        return seen

    seeded, free = outputs(True), outputs(False)
    assert {batch: len(z) for batch, z in seeded.items()} == dict.fromkeys(range(6), 2)
    assert all(torch.equal(*z) for z in seeded.values())
    assert not torch.equal(seeded[0][0], seeded[1][0])
    assert not any(torch.equal(*z) for z in free.values())


# --- the reference leaves alone what is not its own ---------------------------------------------------------


def test_inputs_survive_an_in_place_first_layer_and_two_runs_agree_bitwise() -> None:
    batches = image_batches(8)
    before = copy.deepcopy(batches)
    for h, _ in batches:
        h.requires_grad_()  # the caller's flag, none of the reference's business
    first, second = [nn.ReLU(inplace=True), *cnn()], [nn.ReLU(inplace=True), *cnn()]
    one = train_reference(first, (3, 6), (4, 2, 0), batches, cross_entropy, momentum_sgd)
    two = train_reference(second, (3, 6), (4, 2, 0), batches, cross_entropy, momentum_sgd)
    for (h, target), (old_h, old_target) in zip(batches, before, strict=True):
        assert torch.equal(h, old_h)
        assert torch.equal(target, old_target)
        assert h.requires_grad
        assert h.grad is None
    assert one.losses == two.losses
    assert_same_layers(first, second)


@pytest.mark.parametrize(
    ("cuts", "staleness", "drains"),
    [
        ((3,), (0, 1), ()),
        ((3,), (1, 1), ()),
        ((3,), (0,), ()),
        ((2, 4), (1, 2, 0), ()),
        ((4, 2), (4, 2, 0), ()),
        ((7,), (2, 0), ()),
        ((3,), (2, 0), (9,)),
    ],
)
def test_settings_that_are_not_dsp_are_refused(
    cuts: tuple[int, ...], staleness: tuple[int, ...], drains: tuple[int, ...]
) -> None:
    with pytest.raises(ValueError, match=r"staleness|cuts"):
        train_reference(cnn(), cuts, staleness, image_batches(2), cross_entropy, momentum_sgd, drains=drains)
