"""Times of actions, as users type them."""

from __future__ import annotations

from stalewise.errors import ConfigError
from stalewise.experiments.simulation import costs_of
from stalewise.methods import Method
from stalewise.protocol.actions import Kind
from stalewise.timing import StepCosts

__all__ = ["typed_costs"]


def typed_costs(method: Method, forward: str, recompute: str | None, backward: str | None, update: str) -> StepCosts:
    """Costs of a method from the texts of `simulate`'s options: a number of ms, or one per stage.

    Args:
        method: whose program is timed.
        forward: of a batch.
        recompute: None: as the forward.
        backward: None: twice the forward.
        update: of the weights.

    Raises:
        ConfigError: where a text is no time, or has another number of them than there are stages.
    """
    forwards = _times(forward, "--forward-ms")
    again = forwards if recompute is None else _times(recompute, "--recompute-ms")
    backwards = [2 * time for time in forwards] if backward is None else _times(backward, "--backward-ms")
    times = {Kind.FORWARD: forwards, Kind.RECOMPUTE: again, Kind.BACKWARD: backwards}
    return costs_of(method, {**times, Kind.UPDATE: _times(update, "--update-ms")})


def _times(text: str, option: str) -> list[float]:
    try:
        return [float(entry) for entry in text.split(",")]
    except ValueError:
        raise ConfigError(f"{option} {text!r} is not a time in ms, nor one per stage such as 10,12,9.") from None
