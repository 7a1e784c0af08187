"""Train deep networks over devices of uneven speed with Diversely Stale Parameters (arXiv:1909.02625)."""

from stalewise._version import __version__
from stalewise.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    NonFiniteLoss,
    PeerLost,
    PlanError,
    ProgramError,
    ReceiveTimeout,
    SaveError,
    StalewiseError,
    TransportError,
    WorkerError,
)
from stalewise.methods import BP, DSP, Method
from stalewise.pipeline import Pipeline
from stalewise.protocol.stragglers import Straggler, Stragglers
from stalewise.runtime.launch import launch
from stalewise.runtime.resuming import ResumePoint

__all__ = [
    "BP",
    "DSP",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "Method",
    "NonFiniteLoss",
    "PeerLost",
    "Pipeline",
    "PlanError",
    "ProgramError",
    "ReceiveTimeout",
    "ResumePoint",
    "SaveError",
    "StalewiseError",
    "Straggler",
    "Stragglers",
    "TransportError",
    "WorkerError",
    "__version__",
    "launch",
]
