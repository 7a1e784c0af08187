"""What becomes of a batch whose loss is NaN or infinite.

The last stage sees the loss first, the others with the gradient message of the batch:

    last stage     F j   loss is nan   B j: drops the batch, sends no gradient, but the loss
    stage k               ..           B j: the loss that came says so: drops the batch, passes it on
    first stage           ..           B j: the same; under "stop" the batch is saved, and the run ends here

So no stage's update uses the batch, whenever that update is due, and every engine does the same at the same step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, cast, get_args

import torch
from torch import Tensor

from stalewise.engine.messages import Activation
from stalewise.errors import ConfigError, NonFiniteLoss
from stalewise.protocol.program import Program

__all__ = ["GO_ON", "LossGuard", "NonFinitePolicy", "nonfinite_policy"]

NonFinitePolicy = Literal["stop", "skip", "go-on"]

KeepBatch = Callable[[int, float, Activation], str]
"""(global index, loss, the batch as it came from the loader) -> where it is now, in words."""


@dataclass(frozen=True, kw_only=True)
class LossGuard:
    """Of one run.

    Args:
        policy: "stop" raises where the first stage learns of the loss; "skip" drops the batch; "go-on" does nothing.
        keep: saves the batch before "stop" raises; None: it is not saved.
    """

    policy: NonFinitePolicy = "go-on"
    keep: KeepBatch | None = None

    @property
    def keeps_batches(self) -> bool:
        """Whether the first stage holds every batch until its loss is known."""
        return self.policy == "stop" and self.keep is not None

    def drops(self, loss: Tensor | None) -> bool:
        """Whether a batch of this loss is not trained on. Waits for the loss where it is computed on a GPU."""
        return self.policy != "go-on" and loss is not None and not bool(torch.isfinite(loss).all())

    def stop(self, loss: Tensor, batch: int, last_stage: int, loaded: Activation | None) -> None:
        """End the run where that is due (first stage).

        Raises:
            NonFiniteLoss: naming the batch, the stage, the loss, and where the batch was saved.
        """
        if self.policy != "stop" or not self.drops(loss):
            return
        value = loss.item()
        if self.keep is None:
            saved = ""
        elif loaded is None:
            saved = " It was loaded before this run was resumed, so it could not be saved."
        else:
            saved = f" {self.keep(batch, value, loaded)}"
        raise NonFiniteLoss(
            f"the loss of batch {batch} is {value} (stage {last_stage} computed it).{saved} "
            "Look at the batch, or lower the learning rate or clip gradients; to train on without such "
            'batches use nonfinite_loss="skip" (--on-nan skip), to ignore it "go-on".'
        )


GO_ON = LossGuard()
"""Losses are not looked at."""


def nonfinite_policy(policy: object, program: Program) -> NonFinitePolicy:
    """The policy of that name, where the program can keep to it.

    Raises:
        ConfigError: where there is none, or stages update before they know the loss.
    """
    if policy not in get_args(NonFinitePolicy):
        raise ConfigError(f'nonfinite_loss is {policy!r}; it must be "stop", "skip" or "go-on".')
    if policy == "skip" and any(stage.policy.synthesizer is not None for stage in program.stages):
        raise ConfigError(
            'nonfinite_loss is "skip" and the method updates with predicted gradients, before a stage knows the loss; '
            'use "stop" or "go-on".'
        )
    return cast("NonFinitePolicy", policy)
