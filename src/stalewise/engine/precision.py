"""In which precision passes compute.

Under autocast, torch runs convolutions and matrix products in the lower precision and keeps what is delicate (losses,
normalisations) in float32. Weights, their gradients and the optimizer stay in float32; activations and their
gradients, so what crosses a cut, too, are in the lower precision where a layer leaves them so.

Autocast is around forward, recompute and loss. It is not around the backward, which runs every operation in the
precision of its forward.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from stalewise.errors import ConfigError
from stalewise.protocol.program import StageProgram

__all__ = ["FULL_PRECISION", "Precision"]


@dataclass(frozen=True)
class Precision:
    """What passes compute in.

    Args:
        autocast: "bfloat16"; None: what the tensors are of, or what an autocast of the caller's says.

    Raises:
        ConfigError: where it is neither.
    """

    autocast: str | None = None

    def __post_init__(self) -> None:
        if self.autocast == "float16":
            raise ConfigError(
                'autocast is "float16", whose small gradients vanish unless the loss is scaled, and a step whose scale '
                "was too large is left out; stages that update at different times cannot leave out the same one. Use "
                '"bfloat16", which needs no scale.'
            )
        if self.autocast not in (None, "bfloat16"):
            raise ConfigError(f'autocast is {self.autocast!r}; it must be "bfloat16" or None.')

    def region(self, device: torch.device) -> AbstractContextManager[Any]:
        """What a pass on `device` runs in.

        Torch would keep the casted weights as long as an autocast of the caller's lasts, over updates; so nothing is
        kept.
        """
        if self.autocast is None and not torch.is_autocast_enabled(device.type):
            return nullcontext()
        dtype = torch.get_autocast_dtype(device.type) if self.autocast is None else torch.bfloat16
        return torch.autocast(device.type, dtype=dtype, cache_enabled=False)

    def check(self, program: StageProgram) -> None:
        """Refuse stored graphs that are to be backwarded with other weights than those of their forward.

        Raises:
            ConfigError: where this is an autocast and the program of such a kind.
        """
        if self.autocast is not None and program.stores_graphs_over_updates and program.policy.weights == "current":
            raise ConfigError(
                f'weights="current" cannot work under autocast={self.autocast!r}: the graph keeps casted copies of the '
                'weights of the forward. Use weights="stashed" or activations="recompute".'
            )


FULL_PRECISION = Precision()
"""As the tensors are."""
