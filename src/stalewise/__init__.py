"""Train deep networks over devices of uneven speed with Diversely Stale Parameters (arXiv:1909.02625)."""

from stalewise._version import __version__
from stalewise.errors import (
    ConfigError,
    DataError,
    PeerLost,
    PlanError,
    ProgramError,
    ReceiveTimeout,
    StalewiseError,
    TransportError,
    WorkerError,
)
from stalewise.methods import BP, DSP, Method
from stalewise.pipeline import Pipeline
from stalewise.protocol.stragglers import Straggler, Stragglers
from stalewise.runtime.launch import launch

__all__ = [
    "BP",
    "DSP",
    "ConfigError",
    "DataError",
    "Method",
    "PeerLost",
    "Pipeline",
    "PlanError",
    "ProgramError",
    "ReceiveTimeout",
    "StalewiseError",
    "Straggler",
    "Stragglers",
    "TransportError",
    "WorkerError",
    "__version__",
    "launch",
]
