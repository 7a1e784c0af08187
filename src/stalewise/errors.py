"""Every error that stalewise raises on purpose.

    StalewiseError
    ├── ConfigError (ValueError)      the user asked for something that cannot be
    │   ├── PlanError                 a model cannot be cut as asked
    │   ├── DataError                 a data set cannot be read
    │   └── CheckpointError           a checkpoint is damaged, or of another run
    ├── ProgramError                  a program breaks one of the numbered rules of `protocol.validate`
    ├── TransportError                what arrived over a link is not what was expected
    │   ├── PeerLost                  the process at the other end is gone
    │   └── ReceiveTimeout            nothing arrived in time
    ├── SaveError                     a checkpoint could not be written
    ├── NonFiniteLoss                 the loss of a batch is NaN or infinite
    └── WorkerError                   a worker of a launched job failed; carries the original traceback

A message says what happened, with values; the rule; and what to do.
"""

__all__ = [
    "CheckpointError",
    "ConfigError",
    "DataError",
    "NonFiniteLoss",
    "PeerLost",
    "PlanError",
    "ProgramError",
    "ReceiveTimeout",
    "SaveError",
    "StalewiseError",
    "TransportError",
    "WorkerError",
]


class StalewiseError(Exception):
    """Base of all errors of this library."""


class ConfigError(StalewiseError, ValueError):
    """An argument, an option or a combination of them is not valid."""


class PlanError(ConfigError):
    """A model cannot be cut into the stages that were asked for."""


class DataError(ConfigError):
    """A data set is missing, truncated or malformed."""


class CheckpointError(ConfigError):
    """A checkpoint is truncated or damaged, of another version or another model, or there is none."""


class ProgramError(StalewiseError):
    """A program breaks a rule of `stalewise.protocol.validate`."""


class TransportError(StalewiseError):
    """A message is not the one that the program expects."""


class PeerLost(TransportError):
    """The process at the other end of a link is gone."""


class ReceiveTimeout(TransportError):
    """A message did not arrive in time."""


class SaveError(StalewiseError):
    """A checkpoint could not be written; the ones before it are as they were."""


class NonFiniteLoss(StalewiseError):
    """The loss of a batch is NaN or infinite, and the run was to stop then."""


class WorkerError(StalewiseError):
    """A worker of a distributed job failed; the message holds its own traceback.

    Args:
        message: who failed, where, and the traceback.
        cause_type: class of the worker's own error, such as "ValueError".
        cause: the worker's own message.
    """

    def __init__(self, message: str, *, cause_type: str = "", cause: str = "") -> None:
        super().__init__(message)
        self.cause_type = cause_type
        self.cause = cause

    @property
    def wrong_input(self) -> bool:
        """Whether the worker's own error was a `ConfigError`: its message says all, and it would come again."""
        return self.cause_type in _WRONG_INPUT


_WRONG_INPUT = frozenset(kind.__name__ for kind in (ConfigError, PlanError, DataError, CheckpointError))
