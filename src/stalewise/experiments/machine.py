"""What the times of all runs depend on."""

from __future__ import annotations

import os
from typing import Any

import torch

from stalewise._version import __version__
from stalewise.experiments.environment import processor_name

__all__ = ["machine"]


def machine() -> dict[str, Any]:
    """The hardware and the versions, as JSON values."""
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "processor": processor_name(),
        "cores": os.cpu_count(),
        "gpus": gpus,
        "torch": torch.__version__,
        "stalewise": __version__,
    }
