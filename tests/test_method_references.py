"""The references of the other methods are held to simpler truths: plain loops, hand-written recurrences, autograd."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import pairwise

import pytest
import torch
from method_references import (
    Trained,
    dni,
    dsp,
    features_replay,
    gpipe,
    manual_backward,
    one_f_one_b,
    pipemare,
    stored_stale,
    tape_forward,
)
from reference import train_reference
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import ExponentialLR, LRScheduler

Batches = list[tuple[Tensor, Tensor]]
MakeOptimizer = Callable[[list[nn.Parameter]], Optimizer]
Method = Callable[..., Trained]


# --- nets, batches, plain loops -----------------------------------------------------------------------------------


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
        nn.Sequential(nn.Flatten(), nn.Linear(128, 5)),
    ]


def mlp() -> list[nn.Module]:
    """Double, without BatchNorm."""
    torch.manual_seed(0)
    layers = [nn.Flatten(), nn.Linear(192, 8), nn.Tanh(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 5)]
    return [layer.double() for layer in layers]


def image_batches(count: int, samples: int = 6, dtype: torch.dtype = torch.float32) -> Batches:
    torch.manual_seed(1)
    return [(torch.randn(samples, 3, 8, 8, dtype=dtype), torch.randint(5, (samples,))) for _ in range(count)]


def momentum_sgd(params: list[nn.Parameter]) -> Optimizer:
    return SGD(params, lr=0.05, momentum=0.9, nesterov=True, weight_decay=5e-4)


def fade(optimizer: Optimizer) -> LRScheduler:
    return ExponentialLR(optimizer, 0.8)


def train_plain(
    layers: list[nn.Module],
    cuts: tuple[int, ...],
    batches: Batches,
    make_optimizer: MakeOptimizer = momentum_sgd,
    num_micro_batches: int = 1,
    groups: list[list[int]] | None = None,
) -> tuple[list[float], list[Optimizer]]:
    """The loop everybody writes, with both kinds of gradient accumulation; cuts only part the optimizers."""
    net, losses = nn.Sequential(*layers), []
    parts = [nn.Sequential(*layers[low:high]) for low, high in pairwise([0, *cuts, len(layers)])]
    optimizers = [make_optimizer([p for p in part.parameters() if p.requires_grad]) for part in parts]
    schedulers = [fade(optimizer) for optimizer in optimizers]
    for group in groups or [[n] for n in range(len(batches))]:
        net.zero_grad()
        for n in group:
            inputs, target = batches[n]
            losses.append(0.0)
            for x, t in zip(*(v.tensor_split(num_micro_batches) for v in (inputs, target)), strict=True):
                loss = cross_entropy(net(x), t)
                loss.backward(torch.tensor(len(x) / len(inputs), dtype=loss.dtype))
                losses[-1] += loss.item() * (len(x) / len(inputs))
        for p in net.parameters():
            if p.grad is not None:
                p.grad /= len(group)
        for optimizer, scheduler in zip(optimizers, schedulers, strict=True):
            optimizer.step()
            scheduler.step()
    return losses, optimizers


def assert_same_layers(layers: list[nn.Module], expected: list[nn.Module], tolerance: float = 0.0) -> None:
    """Every parameter and buffer; bitwise unless told."""
    state, truth = nn.Sequential(*layers).state_dict(), nn.Sequential(*expected).state_dict()
    assert list(state) == list(truth)
    for name, value in truth.items():
        torch.testing.assert_close(
            state[name], value, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


def assert_same_optimizers(optimizers: list[Optimizer | None], expected: list[Optimizer]) -> None:
    """Bitwise, every entry of the states, and the learning rate."""
    for optimizer, truth in zip(optimizers, expected, strict=True):
        assert optimizer.param_groups[0]["lr"] == truth.param_groups[0]["lr"]
        state, true_state = optimizer.state_dict()["state"], truth.state_dict()["state"]
        assert len(true_state) > 0
        torch.testing.assert_close(state, true_state, rtol=0, atol=0)


def assert_trains_like(
    method: Method, make_layers: Callable[[], list[nn.Module]], cuts: tuple[int, ...], batches: Batches, **plain: object
) -> None:
    """Bitwise the plain loop: losses, layers, optimizers."""
    layers, expected = make_layers(), make_layers()
    losses, optimizers = train_plain(expected, cuts, batches, **plain)
    result = method(layers, cuts, batches, cross_entropy, momentum_sgd, fade)
    assert result.losses == losses
    assert_same_layers(layers, expected)
    assert_same_optimizers(result.optimizers, optimizers)
    with pytest.raises(AssertionError):  # the comparison sees that training changed something
        assert_same_layers(layers, make_layers())


class Recorder:
    """Makes an optimizer per stage; keeps the gradients and the learning rate of each of its steps."""

    def __init__(self, *rates: float) -> None:
        self.rates = list(rates)
        self.gradients: list[list[list[Tensor]]] = []  # by stage, step
        self.used_rates: list[list[float]] = []

    def __call__(self, params: list[nn.Parameter]) -> Optimizer:
        k = len(self.gradients)
        self.gradients.append([])
        self.used_rates.append([])
        optimizer = SGD(params, lr=self.rates[k])

        def keep(*_: object) -> None:
            self.gradients[k].append([p.grad.clone() for p in params])
            self.used_rates[k].append(optimizer.param_groups[0]["lr"])

        optimizer.register_step_pre_hook(keep)
        return optimizer


# --- without staleness: plain backpropagation ---------------------------------------------------------------------

DRAINED = {"staleness": (4, 2, 0), "drains": tuple(range(9))}


@pytest.mark.parametrize(
    "method",
    [
        partial(gpipe, num_micro_batches=1),
        partial(gpipe, num_micro_batches=1, recompute=False),
        partial(one_f_one_b, num_micro_batches=1),
        partial(dsp, staleness=(0, 0, 0)),
        partial(dsp, **DRAINED),
        partial(features_replay, drains=tuple(range(9))),
        partial(stored_stale, staleness=(0, 0, 0)),
        partial(stored_stale, staleness=(0, 0, 0), weights="current"),
        partial(stored_stale, **DRAINED),
        partial(pipemare, staleness=(0, 0, 0), annealing_updates=5),
    ],
)
@pytest.mark.parametrize("cuts", [(2, 5), (3, 4)])
def test_without_staleness_it_is_plain_backpropagation_bitwise(method: Method, cuts: tuple[int, ...]) -> None:
    assert_trains_like(method, cnn, cuts, image_batches(8))


@pytest.mark.parametrize("staleness", [(3, 0), (4, 2, 0)])
def test_current_weights_drained_after_every_batch_are_plain_backpropagation(staleness: tuple[int, ...]) -> None:
    """Manual formulas, hence to rounding."""
    layers, expected = [[layer.double() for layer in cnn()] for _ in range(2)]
    batches, cuts = image_batches(8, dtype=torch.float64), (2, 5)[: len(staleness) - 1]
    losses, _ = train_plain(expected, cuts, batches)
    how = {"staleness": staleness, "weights": "current", "drains": tuple(range(9))}
    result = stored_stale(layers, cuts, batches, cross_entropy, momentum_sgd, fade, **how)
    assert result.losses == pytest.approx(losses, rel=1e-9)
    assert_same_layers(layers, expected, 1e-9)


@pytest.mark.parametrize(
    "method",
    [
        partial(dsp, staleness=(4, 2, 0)),
        features_replay,
        partial(stored_stale, staleness=(4, 2, 0)),
        partial(stored_stale, staleness=(2, 2, 0), weights="current"),
        partial(pipemare, annealing_updates=3),
    ],
)
def test_where_weights_rest_every_gradient_is_backpropagations(method: Method) -> None:
    """Learning rate 0; the gradients of each stage, one per batch and in order."""
    batches, seen, truth = image_batches(9, dtype=torch.float64), Recorder(0, 0, 0), Recorder(0, 0, 0)
    layers, expected = [[layer.double() for layer in cnn()] for _ in range(2)]
    losses, _ = train_plain(expected, (2, 4), batches, truth)
    result = method(layers, (2, 4), batches, cross_entropy, seen)
    assert result.losses == pytest.approx(losses, rel=1e-12)
    torch.testing.assert_close(seen.gradients, truth.gradients, rtol=1e-10, atol=1e-10)


# --- micro-batches ------------------------------------------------------------------------------------------------

MICRO_BATCHED = [gpipe, partial(gpipe, recompute=False), one_f_one_b]


@pytest.mark.parametrize("num_micro_batches", [2, 3, 4, 7])
@pytest.mark.parametrize("method", MICRO_BATCHED)
def test_micro_batches_of_unequal_sizes_make_the_gradient_of_the_batch(method: Method, num_micro_batches: int) -> None:
    batches, layers, expected = image_batches(6, samples=7, dtype=torch.float64), mlp(), mlp()
    losses, _ = train_plain(expected, (2, 4), batches)
    how = {"num_micro_batches": num_micro_batches}
    result = method(layers, (2, 4), batches, cross_entropy, momentum_sgd, fade, **how)
    assert result.losses == pytest.approx(losses, rel=1e-11)
    assert_same_layers(layers, expected, 1e-10)


@pytest.mark.parametrize("num_micro_batches", [2, 3, 4])
@pytest.mark.parametrize("method", MICRO_BATCHED)
def test_micro_batches_with_batchnorm_are_a_loop_of_forward_and_backward_bitwise(
    method: Method, num_micro_batches: int
) -> None:
    """Depth first, one micro-batch after another: the order that 1F1B has on its last stage."""
    how = {"num_micro_batches": num_micro_batches}
    assert_trains_like(partial(method, **how), cnn, (2, 5), image_batches(5, samples=9), **how)


def test_more_micro_batches_than_samples_are_refused() -> None:
    with pytest.raises(ValueError, match="6 samples, 7 micro-batches"):
        gpipe(cnn(), (2,), image_batches(1), cross_entropy, momentum_sgd, num_micro_batches=7)


def test_recompute_with_the_random_numbers_of_the_forward_changes_nothing() -> None:
    """Dropout seeded by (stage, batch, micro-batch); unseeded it does."""

    def train(recompute: bool, seeded: bool) -> list[nn.Module]:
        torch.manual_seed(3)
        layers = [nn.Flatten(), nn.Linear(192, 8), nn.Dropout(0.5), nn.Linear(8, 5)]

        @contextmanager
        def context(k: int, key: tuple[int, int]) -> Iterator[None]:
            if seeded:
                torch.manual_seed(100 * k + 10 * key[0] + key[1])
            yield

        how = {"num_micro_batches": 2, "recompute": recompute, "pass_context": context}
        gpipe(layers, (3,), image_batches(4), cross_entropy, momentum_sgd, **how)
        return layers

    assert_same_layers(train(True, True), train(False, True))
    with pytest.raises(AssertionError):
        assert_same_layers(train(True, False), train(False, False))


# --- the delayed methods on a chain of scalars: a truth without a pipeline ----------------------------------------


def chain(weights: list[float]) -> list[nn.Module]:
    """tanh(w_k h), a stage each."""
    layers = [nn.Sequential(nn.Linear(1, 1, bias=False, dtype=torch.float64), nn.Tanh()) for _ in weights]
    for layer, w in zip(layers, weights, strict=True):
        nn.init.constant_(layer[0].weight, w)
    return layers


def scalar_batches(*sizes: int) -> Batches:
    generator = torch.Generator().manual_seed(2)
    return [tuple(torch.rand(2, size, 1, dtype=torch.float64, generator=generator) + 0.5) for size in sizes]


def half_square(output: Tensor, target: Tensor) -> Tensor:
    return 0.5 * ((output - target) ** 2).mean()


def groups_of(count: int, accumulate: int, drains: tuple[int, ...]) -> list[list[int]]:
    """Batches that share an update: same index // accumulate, no drain between."""
    groups: dict[tuple[int, int], list[int]] = {}
    for j in range(count):
        groups.setdefault((j // accumulate, sum(d <= j for d in drains)), []).append(j)
    return list(groups.values())


def chain_by_hand(
    weights: list[float],
    staleness: tuple[int, ...],
    batches: Batches,
    lr: float,
    momentum: float,
    backward: str,
    *,
    beta: float = 1.0,
    decay: float | None = None,
    annealing_updates: int | None = None,
    accumulate: int = 1,
    drains: tuple[int, ...] = (),
) -> tuple[list[float], list[list[float]]]:
    """Losses, and history[k][u], stage k's weight after u updates; no steps and no queues.

    Batch j is forwarded in step n of its span, when b = start + max(0, n - m_k) batches have been backwarded, so
    with the updates of all groups that end before b. It is backwarded after the updates of all groups before its.
    """
    groups = groups_of(len(batches), accumulate, drains)
    history, velocity, delta = [[w] for w in weights], [0.0] * len(weights), [0.0] * len(weights)
    losses = []
    for u, group in enumerate(groups):
        gradients = [0.0] * len(weights)
        for j in group:
            start = max(d for d in (0, *drains) if d <= j)
            h, old = [batches[j][0].item()], []
            for k, m in enumerate(staleness):
                backwarded = start + max(0, j - start - m)
                old.append(history[k][sum(g[-1] < backwarded for g in groups)])
                h.append(math.tanh(old[k] * h[k]))
            g = h[-1] - batches[j][1].item()
            losses.append(0.5 * g * g)
            for k in reversed(range(len(weights))):
                now = history[k][u]
                y = math.tanh(now * h[k]) if backward == "recompute" else h[k + 1]
                slope = (1 - y * y) * g
                gradients[k] += slope * h[k] / len(group)
                w = old[k] if backward == "stashed" else now
                g = beta * slope * (w - staleness[k] * delta[k])
        for k, m in enumerate(staleness):
            velocity[k] = momentum * velocity[k] + gradients[k]
            rate = lr * 0.9**u
            if annealing_updates is not None:
                rate *= (m + 1.0) ** -max(0.0, 1 - u / annealing_updates)
            history[k].append(history[k][u] - rate * velocity[k])
            if decay is not None and m > 0:
                gamma = math.exp(math.log(decay) / m)
                delta[k] += (1 - gamma) * (history[k][-1] - history[k][-2] - delta[k])
    return losses, history


SETTINGS: dict[str, tuple[Method, dict[str, object]]] = {
    "stashed": (partial(stored_stale, weights="stashed"), {"backward": "stashed"}),
    "current": (partial(stored_stale, weights="current"), {"backward": "current"}),
    "recompute": (dsp, {"backward": "recompute"}),
    "fdg": (partial(stored_stale, gradient_scale=0.5), {"backward": "stashed", "beta": 0.5}),
    "current, beta": (
        partial(stored_stale, weights="current", gradient_scale=0.7),
        {"backward": "current", "beta": 0.7},
    ),
    "pipemare": (
        partial(pipemare, annealing_updates=10),
        {"backward": "current", "decay": 0.135, "annealing_updates": 10},
    ),
    "pipemare T1": (
        partial(pipemare, annealing_updates=7, decay=None),
        {"backward": "current", "annealing_updates": 7},
    ),
    "pipemare T2": (partial(pipemare, annealing_updates=None, decay=0.5), {"backward": "current", "decay": 0.5}),
    "accumulate 2": (partial(dsp, accumulate=2), {"backward": "recompute", "accumulate": 2}),
    "accumulate 5": (partial(dsp, accumulate=5), {"backward": "recompute", "accumulate": 5}),
}
CHAIN = ([1.3, 0.8, 1.7], 0.2, 0.5)  # weights, learning rate, momentum


def chain_by_method(
    method: Method, staleness: tuple[int, ...], drains: tuple[int, ...] = ()
) -> tuple[list[float], list[float]]:
    weights, lr, momentum = CHAIN
    layers, batches = chain(weights), scalar_batches(*[1] * 24)
    result = method(
        layers, (1, 2), batches, half_square, lambda p: SGD(p, lr, momentum), lambda o: ExponentialLR(o, 0.9),
        staleness=staleness, drains=drains,
    )  # fmt: skip
    return result.losses, [layer[0].weight.item() for layer in layers]


@pytest.mark.parametrize("drains", [(), (7,), (3, 4, 15)])
@pytest.mark.parametrize("staleness", [(0, 0, 0), (2, 1, 0), (4, 2, 0), (10, 5, 0), (3, 3, 0), (50, 1, 0)])
@pytest.mark.parametrize("name", SETTINGS)
def test_chain_follows_the_hand_written_recurrence(
    name: str, staleness: tuple[int, ...], drains: tuple[int, ...]
) -> None:
    method, how = SETTINGS[name]
    weights, lr, momentum = CHAIN
    batches = scalar_batches(*[1] * 24)
    expected, history = chain_by_hand(weights, staleness, batches, lr, momentum, **how, drains=drains)
    losses, final = chain_by_method(method, staleness, drains)
    assert losses == pytest.approx(expected, rel=1e-9)
    assert final == pytest.approx([w[-1] for w in history], rel=1e-11)


@pytest.mark.parametrize("staleness", [(2, 1, 0), (4, 2, 0)])
def test_settings_differ_far_above_rounding_on_the_chain(staleness: tuple[int, ...]) -> None:
    """Guards the tolerance above."""
    finals = [chain_by_method(method, staleness)[1][0] for method, _ in SETTINGS.values()]
    finals += [chain_by_method(SETTINGS["stashed"][0], (3, 1, 0), drains)[1][0] for drains in [(), (7,)]]
    assert min(abs(a - b) for i, a in enumerate(finals) for b in finals[:i]) > 1e-6


def test_one_stored_product_of_two_scalars_step_by_step() -> None:
    """y = b a x, loss y, all steps of m = (1, 0) written out; x = 1, learning rate r.

    Stage 1 sends b before its update; a's backward of batch 0 comes in step 1, after a's forward of batch 1.
    With loss y stage 0's own weight is in no formula, so a third weight below, c, shows stashed from current.
    """
    c, a, b, r = 0.5, 2.0, 3.0, 0.25
    c1 = c - r * b * a  # batch 0 with a, b of the start
    a1 = a - r * b * c
    b1 = b - r * a * c
    # batch 1: stage 0 (m = 1) and stage 1 (m = 1) forwarded it in step 1 with c, a; stage 2 with b1
    stashed_c2, current_c2 = c1 - r * b1 * a, c1 - r * b1 * a1
    a2 = a1 - r * b1 * c
    b2 = b1 - r * a * c
    for weights, c2 in (("stashed", stashed_c2), ("current", current_c2)):
        layers = [nn.Linear(1, 1, bias=False) for _ in range(3)]
        for layer, w in zip(layers, (c, a, b), strict=True):
            nn.init.constant_(layer.weight, w)
        batches = [(torch.ones(1, 1), torch.zeros(1, 1))] * 2
        how = {"staleness": (1, 1, 0), "weights": weights}
        result = stored_stale(layers, (1, 2), batches, lambda y, _: y.mean(), partial(SGD, lr=r), **how)
        assert [layer.weight.item() for layer in layers] == [c2, a2, b2]
        assert result.losses == [b * a * c, b1 * a * c]
    assert stashed_c2 != current_c2


def test_delays_default_to_those_of_the_papers() -> None:
    batches = image_batches(8)
    one, two, three = cnn(), cnn(), cnn()
    features_replay(one, (2, 4, 6), batches, cross_entropy, momentum_sgd, fade)
    result = train_reference(two, (2, 4, 6), (3, 2, 1, 0), batches, cross_entropy, momentum_sgd, fade)
    assert_same_layers(one, two)
    one = cnn()
    how = {"annealing_updates": 4}
    pipemare(one, (2, 5), batches, cross_entropy, momentum_sgd, **how)
    pipemare(three, (2, 5), batches, cross_entropy, momentum_sgd, **how, staleness=(4, 2, 0))
    assert_same_layers(one, three)
    assert len(result.losses) == 8


# --- the two corrections of PipeMare ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("annealing_updates", "powers"),
    [
        (4, [1, 0.75, 0.5, 0.25, 0, 0]),
        (1, [1, 0, 0, 0, 0, 0]),
        (0, [0, 0, 0, 0, 0, 0]),
        (None, [0, 0, 0, 0, 0, 0]),
    ],
)
def test_learning_rates_by_delay(annealing_updates: int | None, powers: list[float]) -> None:
    seen = Recorder(0.3, 0.2, 0.1)
    result = pipemare(
        chain([1.0, 1.0, 1.0]), (1, 2), scalar_batches(*[1] * 6), half_square, seen, fade,
        annealing_updates=annealing_updates,
    )  # fmt: skip
    for k, (lr, delay) in enumerate([(0.3, 5), (0.2, 3), (0.1, 1)]):
        expected = [lr * 0.8**i / delay**power for i, power in enumerate(powers)]
        assert seen.used_rates[k] == pytest.approx(expected, rel=1e-12)
        assert result.optimizers[k].param_groups[0]["lr"] == pytest.approx(lr * 0.8**6, rel=1e-12)


def test_annealing_over_and_no_discrepancy_correction_is_stored_current_bitwise() -> None:
    one, two, batches = cnn(), cnn(), image_batches(10)
    pipemare(one, (2, 5), batches, cross_entropy, momentum_sgd, fade, annealing_updates=0, decay=None)
    how = {"staleness": (4, 2, 0), "weights": "current"}
    stored_stale(two, (2, 5), batches, cross_entropy, momentum_sgd, fade, **how)
    assert_same_layers(one, two)
    three = cnn()
    pipemare(three, (2, 5), batches, cross_entropy, momentum_sgd, fade, annealing_updates=0)
    with pytest.raises(AssertionError):
        assert_same_layers(one, three)


@pytest.mark.parametrize(("decay", "exact_from", "tolerance"), [(1e-300, 2, 1e-12), (0.135, 30, 1e-8)])
def test_discrepancy_correction_finds_the_forward_weights_where_they_drift(
    decay: float, exact_from: int, tolerance: float
) -> None:
    """y = b a x with x = 1, loss y and a at rest: b moves by a constant, and a's gradient is b as the backward saw it.

    With D -> 0 delta is the last change, so w - m delta is the weight of m updates ago: the stashed one.
    """

    def seen_by_backward(method: Method, **how: object) -> list[float]:
        seen, layers = Recorder(0.0, 0.01), [*(nn.Linear(1, 1, bias=False, dtype=torch.float64) for _ in "ab")]
        nn.init.constant_(layers[0].weight, 0.5)
        nn.init.constant_(layers[1].weight, 2.0)
        one = torch.ones(1, 1, dtype=torch.float64)
        method([*layers, nn.Identity()], (1, 2), [(one, one)] * 40, lambda y, _: y.mean(), seen, **how)
        return [gradients[0].item() for gradients in seen.gradients[0]]

    forward = [2 - 0.005 * max(0, j - 2) for j in range(40)]
    assert seen_by_backward(stored_stale, staleness=(4, 2, 0)) == pytest.approx(forward, rel=1e-12)
    current = seen_by_backward(stored_stale, staleness=(4, 2, 0), weights="current")
    assert current == pytest.approx([2 - 0.005 * j for j in range(40)], rel=1e-12)
    corrected = seen_by_backward(pipemare, annealing_updates=None, decay=decay)
    assert corrected[0] == 2
    assert abs(corrected[1] - forward[1]) > 1e-3  # one update, but m = 2 of them are taken back
    assert corrected[exact_from:] == pytest.approx(forward[exact_from:], rel=tolerance)


# --- manual backward formulas are autograd's ----------------------------------------------------------------------


@pytest.mark.parametrize("changed", [False, True], ids=["weight unchanged", "weight changed since"])
@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(4, 3), (5, 4)),
        (nn.Linear(4, 3, bias=False), (2, 5, 4)),
        (nn.Conv2d(3, 4, 3), (2, 3, 6, 5)),
        (nn.Conv2d(4, 6, (3, 2), stride=2, padding=(1, 0), dilation=(1, 2), groups=2, bias=False), (2, 4, 8, 7)),
        (nn.BatchNorm2d(3, eps=0.1), (4, 3, 5, 5)),
        (nn.BatchNorm2d(3, affine=False), (4, 3, 5, 5)),
        (nn.ReLU(), (4, 3)),
        (nn.ReLU(inplace=True), (4, 3)),
        (nn.Tanh(), (4, 3)),
        (nn.Flatten(), (4, 3, 2)),
    ],
    ids=str,
)
def test_formula_is_autograds_with_the_weight_given(layer: nn.Module, shape: tuple[int, ...], changed: bool) -> None:
    """None of these layers' parameter gradients depends on the weight; the input's does, and takes the one given."""
    torch.manual_seed(5)
    layer = copy.deepcopy(layer).double()
    for p in layer.parameters():
        nn.init.normal_(p)
    x = torch.randn(shape, dtype=torch.float64)
    ((_, _, y),) = tape_forward(layer, x)
    g, now = torch.randn_like(y), copy.deepcopy(layer)
    if changed and getattr(layer, "weight", None) is not None:
        nn.init.normal_(now.weight)
    leaf = x.clone().requires_grad_()
    z = now(leaf.clone())
    expected = torch.autograd.grad(z, [leaf, *now.parameters()], g)
    grad_x, gradients = manual_backward(layer, x, y, g, lambda p: now.weight.detach())
    assert [id(p) for p, _ in gradients] == [id(p) for p in layer.parameters()]
    for gradient, truth in zip([grad_x, *(gradient for _, gradient in gradients)], expected, strict=True):
        torch.testing.assert_close(gradient, truth, rtol=1e-10, atol=1e-10)


def test_tape_opens_sequentials_and_keeps_what_in_place_layers_overwrite() -> None:
    torch.manual_seed(6)
    net = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True)), nn.Tanh(), nn.ReLU(inplace=True))
    h = torch.randn(5, 4)
    kept = h.clone()
    tape = tape_forward(net, h)
    assert [type(layer) for layer, _, _ in tape] == [nn.Linear, nn.ReLU, nn.Tanh, nn.ReLU]
    assert torch.equal(h, kept)
    for layer, x, y in tape:
        assert torch.equal(layer(x.clone()), y)
    assert torch.equal(tape[-1][2], net(h))
    assert (tape[1][1] < 0).any()


@pytest.mark.parametrize(
    "layer",
    [
        nn.Dropout(),
        nn.BatchNorm2d(3).eval(),
        nn.Conv2d(3, 3, 3, padding="same"),
        nn.Conv2d(3, 3, 3, padding=1, padding_mode="circular"),
    ],
    ids=str,
)
def test_layers_without_a_formula_are_refused(layer: nn.Module) -> None:
    x = torch.randn(2, 3, 5, 5)
    with pytest.raises(TypeError, match="no backward formula"):
        manual_backward(layer, x, x, x, lambda p: p)


# --- accumulation -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("drains", [(), (6,), (3, 4)])
@pytest.mark.parametrize("accumulate", [1, 3, 4, 20])
def test_accumulation_without_staleness_is_the_plain_accumulation_loop_bitwise(
    accumulate: int, drains: tuple[int, ...]
) -> None:
    method = partial(dsp, staleness=(0, 0, 0), accumulate=accumulate, drains=drains)
    assert_trains_like(method, cnn, (2, 5), image_batches(10), groups=groups_of(10, accumulate, drains))


def test_groups_are_by_batch_index_and_flushed_at_drains() -> None:
    """Of the helper that the tests around take for true, and of the number of updates."""
    groups = groups_of(11, 4, (6,))
    assert groups == [[0, 1, 2, 3], [4, 5], [6, 7], [8, 9, 10]]
    seen = Recorder(0.1, 0.1, 0.1)
    how = {"staleness": (4, 2, 0), "accumulate": 4, "drains": (6,)}
    result = dsp(cnn(), (2, 5), image_batches(11), cross_entropy, seen, fade, **how)
    assert [len(steps) for steps in seen.gradients] == [4, 4, 4]
    assert len(result.losses) == 11
    assert [o.param_groups[0]["lr"] for o in result.optimizers] == pytest.approx([0.1 * 0.8**4] * 3)


@pytest.mark.parametrize("drains", [(), (5, 6)])
def test_dsp_is_the_older_reference_bitwise(drains: tuple[int, ...]) -> None:
    one, two, batches = cnn(), cnn(), image_batches(12)
    result = dsp(one, (2, 5), batches, cross_entropy, momentum_sgd, fade, staleness=(4, 2, 0), drains=drains)
    truth = train_reference(two, (2, 5), (4, 2, 0), batches, cross_entropy, momentum_sgd, fade, drains=drains)
    assert result.losses == truth.losses
    assert_same_layers(one, two)
    assert_same_optimizers(result.optimizers, truth.optimizers)


# --- buffers, frozen stages, inputs -------------------------------------------------------------------------------

EVERY: dict[str, Method] = {
    "gpipe": partial(gpipe, num_micro_batches=2),
    "one_f_one_b": partial(one_f_one_b, num_micro_batches=2),
    "dsp": partial(dsp, staleness=(4, 2, 0)),
    "accumulate": partial(dsp, staleness=(4, 2, 0), accumulate=3),
    "stashed": partial(stored_stale, staleness=(4, 2, 0)),
    "current": partial(stored_stale, staleness=(4, 2, 0), weights="current"),
    "pipemare": partial(pipemare, annealing_updates=3),
    "dni": partial(
        dni,
        target_delay=2,
        make_synthesizer=lambda k: Scale(0.1),
        make_synthesizer_optimizer=partial(SGD, lr=0.01),
    ),
}


class Scale(nn.Module):
    """w h."""

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weight))

    def forward(self, h: Tensor) -> Tensor:
        return h * self.weight


@pytest.mark.parametrize("name", EVERY)
def test_batchnorm_statistics_are_one_running_mean_over_all_batches_or_micro_batches(name: str) -> None:
    norm, batches = nn.BatchNorm2d(3, dtype=torch.float64), image_batches(9, dtype=torch.float64)
    parts = [part for x, _ in batches for part in x.tensor_split(2 if name in ("gpipe", "one_f_one_b") else 1)]
    mean, var = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    for x in parts:
        mean, var = 0.9 * mean + 0.1 * x.mean((0, 2, 3)), 0.9 * var + 0.1 * x.var((0, 2, 3))
    layers = [norm, nn.Flatten(), nn.Linear(192, 5, dtype=torch.float64)]
    EVERY[name](layers, (1, 2), batches, cross_entropy, momentum_sgd)
    assert norm.num_batches_tracked.item() == len(parts)
    torch.testing.assert_close(norm.running_mean, mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(norm.running_var, var, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("gpipe", "0.0- 0.1- 0.0+ 0.1+ 1.0- 1.1- 1.0+ 1.1+ 2.0- 2.1- 2.0+ 2.1+ 3.0- 3.1- 3.0+ 3.1+"),
        ("one_f_one_b", "0.0+ 0.1+ 1.0+ 1.1+ 2.0+ 2.1+ 3.0+ 3.1+"),
        ("dsp", "0- 1- 2- 0+ 3- 1+ 2+ 3+"),
        ("accumulate", "0- 1- 2- 0+ 3- 1+ 2+ 3+"),
        ("stashed", "0+ 1+ 2+ 3+"),
        ("current", "0+ 1+ 2+ 3+"),
        ("pipemare", "0+ 1+ 2+ 3+"),
        ("dni", "0+ 1+ 2+ 3+"),
    ],
)
def test_passes_of_stage_1_and_whether_they_change_the_statistics(name: str, expected: str) -> None:
    layers, passes = cnn(), []

    @contextmanager
    def record(k: int, key: Hashable) -> Iterator[None]:
        before = layers[4].running_mean.clone()
        yield
        if k == 1:
            label = ".".join(map(str, key)) if isinstance(key, tuple) else str(key)
            passes.append(label + "-+"[not torch.equal(before, layers[4].running_mean)])

    EVERY[name](layers, (2, 5), image_batches(4), cross_entropy, momentum_sgd, pass_context=record)
    assert " ".join(passes) == expected


@pytest.mark.parametrize("name", EVERY)
def test_frozen_stages_pass_gradients_and_have_no_optimizer(name: str) -> None:
    """Stages 0 and 2 are frozen, stage 1 is trained, stage 3 too; inputs and their flags stay."""
    layers, batches = cnn(), image_batches(6)
    for layer in (*layers[:2], *layers[4:5]):
        layer.requires_grad_(False)
    before, old = copy.deepcopy(batches), copy.deepcopy(layers)
    more = {"staleness": (4, 3, 2, 0)} if name in ("dsp", "accumulate", "stashed", "current", "pipemare") else {}
    result = EVERY[name](layers, (2, 4, 5), batches, cross_entropy, momentum_sgd, **more)
    assert [optimizer is None for optimizer in result.optimizers] == [True, False, True, False]
    pairs = zip(nn.Sequential(*layers).parameters(), nn.Sequential(*old).parameters(), strict=True)
    assert [not torch.equal(p, q) for p, q in pairs] == [False] * 4 + [True] * 2 + [False] * 2 + [True] * 2
    assert all(p.grad is None for p in nn.Sequential(*layers).parameters())
    for (x, t), (old_x, old_t) in zip(batches, before, strict=True):
        assert torch.equal(x, old_x)
        assert torch.equal(t, old_t)
        assert not x.requires_grad


class Doubled(nn.Module):
    """2 h, in place if told."""

    def __init__(self, inplace: bool) -> None:
        super().__init__()
        self.inplace = inplace

    def forward(self, h: Tensor) -> Tensor:
        return h.mul_(2) if self.inplace else h * 2


@pytest.mark.parametrize("name", [name for name in EVERY if name not in ("current", "pipemare")])
def test_first_layers_in_place_and_gradients_left_by_the_caller_change_nothing(name: str) -> None:
    """In place at the start of every stage; twice would be seen."""

    def train(inplace: bool) -> list[nn.Module]:
        first, second = cnn()[:2], cnn()[3:]
        layers = [Doubled(inplace), *first, Doubled(inplace), *second[:3], Doubled(inplace), *second[3:]]
        if inplace:
            for p in nn.Sequential(*layers).parameters():
                p.grad = torch.ones_like(p)
        EVERY[name](layers, (3, 7), image_batches(6), cross_entropy, momentum_sgd)
        return layers

    assert_same_layers(train(True), train(False))


@pytest.mark.parametrize("staleness", [(0, 1, 0), (2, 2, 1), (2, 0)])
def test_settings_that_are_no_staleness_are_refused(staleness: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"staleness|zip"):
        stored_stale(cnn(), (2, 5), image_batches(2), cross_entropy, momentum_sgd, staleness=staleness)


# --- DNI ----------------------------------------------------------------------------------------------------------


def test_without_cuts_dni_is_plain_backpropagation_bitwise() -> None:
    how = {"target_delay": 3, "make_synthesizer": Scale, "make_synthesizer_optimizer": momentum_sgd}
    assert_trains_like(partial(dni, **how), cnn, (), image_batches(6))


def test_synthesizers_that_return_0_train_only_the_last_stage() -> None:
    layers, expected, batches = cnn(), cnn(), image_batches(8)
    for layer in expected[:5]:
        layer.requires_grad_(False)
    frozen = copy.deepcopy(expected[:5])
    plain_sgd = partial(SGD, lr=0.1, momentum=0.9)
    how = {
        "target_delay": 1,
        "make_synthesizer": lambda k: Scale(0.0),
        "make_synthesizer_optimizer": partial(SGD, lr=0.0),
    }
    result = dni(layers, (2, 5), batches, cross_entropy, plain_sgd, **how)
    losses, optimizer = [], plain_sgd(expected[6].parameters())
    for x, t in batches:
        loss = cross_entropy(nn.Sequential(*expected)(x), t)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert result.losses == losses
    assert_same_layers(layers, expected)  # the lower stages' BatchNorm statistics moved, their weights did not
    for p, q in zip(nn.Sequential(*layers[:5]).parameters(), nn.Sequential(*frozen).parameters(), strict=True):
        assert torch.equal(p, q)


def dni_by_hand(
    weights: list[float], synthesizers: list[float], batches: Batches, target_delay: int, drains: tuple[int, ...]
) -> list[float]:
    """w_k h in three stages, synthesizers s_k h, learning rates 0.1 and 0.2; final weights, then synthesizers."""
    w, s, losses = list(weights), list(synthesizers), []
    waiting: list[list[tuple[list[float], list[float]]]] = []  # (output, gradient sent by the stage above), by stage

    def train_synthesizers() -> None:
        for k, (h, sent) in enumerate(waiting.pop(0)):
            size = len(h)
            slope = sum(2 * (s[k] * h_i - size * g_i) * h_i for h_i, g_i in zip(h, sent, strict=True)) / size
            s[k] -= 0.2 * slope

    for n, (x, t) in enumerate(batches):
        size = len(x)
        h0 = x.flatten().tolist()
        h1 = [w[0] * v for v in h0]
        h2 = [w[1] * v for v in h1]
        y = [w[2] * v for v in h2]
        errors = [a - b for a, b in zip(y, t.flatten().tolist(), strict=True)]
        losses.append(sum(e * e for e in errors) / (2 * size))
        g = [[s[0] * v / size for v in h1], [s[1] * v / size for v in h2], [e / size for e in errors]]
        waiting.append([(h1, [w[1] * v for v in g[1]]), (h2, [w[2] * v for v in g[2]])])
        for k, h in enumerate((h0, h1, h2)):
            w[k] -= 0.1 * sum(a * b for a, b in zip(g[k], h, strict=True))
        if len(waiting) > target_delay:
            train_synthesizers()
        while waiting and (n + 1 in drains or n + 1 == len(batches)):
            train_synthesizers()
    return [*losses, *w, *s]


def dni_by_method(batches: Batches, target_delay: int, drains: tuple[int, ...]) -> list[float]:
    layers = [Scale(w).double() for w in (1.3, 0.8, 1.7)]
    result = dni(
        layers, (1, 2), batches, half_square, partial(SGD, lr=0.1),
        target_delay=target_delay, drains=drains,
        make_synthesizer=lambda k: Scale((0.4, -0.3)[k]).double(),
        make_synthesizer_optimizer=partial(SGD, lr=0.2),
    )  # fmt: skip
    assert [len(o.param_groups[0]["params"]) for o in result.synthesizer_optimizers] == [1, 1]
    return [*result.losses, *(m.weight.item() for m in (*layers, *result.synthesizers))]


@pytest.mark.parametrize("drains", [(), (5,), (1, 2, 9)])
@pytest.mark.parametrize("target_delay", [0, 1, 3, 30])
def test_dni_follows_the_hand_written_recurrence(target_delay: int, drains: tuple[int, ...]) -> None:
    """Batches of 2 and 3 samples in turn, for the factor N."""
    batches = scalar_batches(*[2, 3] * 6)
    start = [float(torch.tensor(v)) for v in (1.3, 0.8, 1.7, 0.4, -0.3)]  # as single precision has them
    expected = dni_by_hand(start[:3], start[3:], batches, target_delay, drains)
    result = dni_by_method(batches, target_delay, drains)
    assert result == pytest.approx(expected, rel=1e-10)
    others = [dni_by_method(batches, target_delay + 1, drains)]
    if target_delay > 0:
        others.append(dni_by_method(batches, target_delay, (*drains, 6)))
    if target_delay < 12:
        assert all(abs(other[-5] - result[-5]) > 1e-6 for other in others)


def test_statistics_of_a_synthesizer_change_when_it_is_trained_only() -> None:
    how = {
        "target_delay": 2,
        "make_synthesizer": lambda k: nn.BatchNorm2d(8),
        "make_synthesizer_optimizer": momentum_sgd,
    }
    result = dni(cnn(), (2, 5), image_batches(7), cross_entropy, momentum_sgd, **how)
    assert [s.num_batches_tracked.item() for s in result.synthesizers] == [7, 7]
