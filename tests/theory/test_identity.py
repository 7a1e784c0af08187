"""What the theory rests on: the DSP gradient is the true gradient where the last m_0 updates were zero, and at m = 0.

Every stage records its weights and the gradient it applies; plain autograd on the unsplit model at the weights that all
stages had after t updates is the truth for update t.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from engine_nets import Batches, classification, mlp
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from stalewise import DSP, Pipeline

CUTS = {1: (), 2: (4,), 3: (2, 6), 4: (1, 4, 6)}
RESTS_FROM = 9


class Recorder:
    """Makes optimizers that note, per stage and update, the weights and the gradients they get."""

    def __init__(self, lr: float) -> None:
        self.lr = lr
        self.stages: list[list[list[tuple[Tensor, Tensor]]]] = []

    def optimizer(self, params: Any) -> Optimizer:
        params = list(params)
        optimizer, notes = SGD(params, lr=self.lr), []
        optimizer.register_step_pre_hook(
            lambda *_: notes.append([(p.detach().clone(), p.grad.detach().clone()) for p in params])
        )
        self.stages.append(notes)
        return optimizer

    def update(self, index: int) -> tuple[list[Tensor], list[Tensor]]:
        """Weights of the whole model before update `index` of every stage, and the gradients applied in it."""
        pairs = [pair for notes in self.stages for pair in notes[index]]
        return [weights for weights, _ in pairs], [gradient for _, gradient in pairs]


def double_mlp() -> tuple[list[nn.Module], Batches]:
    layers = [layer.double() for layer in mlp(dropout=0.0)]
    return layers, [(inputs.double(), labels) for inputs, labels in classification("mlp", 30)]


def differences(staleness: tuple[int, ...], lr: float, rests: range) -> tuple[list[float], list[float]]:
    """Per update ||G - true gradient|| / ||true gradient||, and ||true gradient||."""
    layers, batches = double_mlp()
    recorder = Recorder(lr)
    pipeline = Pipeline(
        layers,
        method=DSP(staleness=staleness),
        loss_fn=cross_entropy,
        optimizer=recorder.optimizer,
        lr_scheduler=lambda optimizer: LambdaLR(optimizer, lambda update: 0.0 if update in rests else 1.0),
        partition=CUTS[len(staleness)],
        engine="sequential",
        device="cpu",
        seed=0,
    )
    assert len(list(pipeline.train(batches))) == len(batches)
    model = nn.Sequential(*double_mlp()[0])
    distances, norms = [], []
    for index, (inputs, labels) in enumerate(batches):
        weights, applied = recorder.update(index)
        with torch.no_grad():
            for parameter, value in zip(model.parameters(), weights, strict=True):
                parameter.copy_(value)
        truth = torch.autograd.grad(cross_entropy(model(inputs.clone()), labels), list(model.parameters()))
        norm = sum(float(part.square().sum()) for part in truth) ** 0.5
        distance = sum(float((a - b).square().sum()) for a, b in zip(applied, truth, strict=True)) ** 0.5
        distances.append(distance / norm)
        norms.append(norm)
    return distances, norms


@pytest.mark.parametrize("staleness", [(1, 0), (2, 0), (5, 5, 0), (4, 2, 0), (3, 0, 0), (6, 4, 2, 0)])
def test_the_gradient_is_true_once_the_last_m0_updates_were_zero(staleness: tuple[int, ...]) -> None:
    rests = range(RESTS_FROM, 22)
    found, norms = differences(staleness, 0.3, rests)
    exact_from = RESTS_FROM + staleness[0]
    assert min(norms) > 0.05, "a critical point, where the identity says nothing"
    assert max(found[exact_from : rests.stop + 1]) < 1e-12
    # One zero update less, and the input of some stage is still that of other weights.
    assert found[exact_from - 1] > 1e-6
    assert min(found[rests.stop + 1 :]) > 1e-6
    # In the beginning no update has been made: the first batches see the initial weights everywhere.
    assert found[0] < 1e-12
    assert found[1] > 1e-6


@pytest.mark.parametrize("num_stages", [1, 2, 3, 4])
def test_the_gradient_is_true_everywhere_without_staleness(num_stages: int) -> None:
    found, norms = differences((0,) * num_stages, 0.3, range(0))
    assert max(found) < 1e-12
    assert min(norms) > 0.05
