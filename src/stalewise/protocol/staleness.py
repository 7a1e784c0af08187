"""Layer-wise staleness and what follows from it (docs/notation.md).

    K   num_stages          m_k  staleness[k]        d_k  slack[k] = m_k - m_{k+1}

    stage      0       1       2
    m          4       2       0        batches between a forward and its backward
    d              2       2            how far stage k may run ahead of stage k+1

Source: Xu et al., arXiv:1909.02625 [S for m, D for d].
"""

from __future__ import annotations

import enum
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from stalewise.errors import ConfigError

__all__ = ["LinkState", "Staleness"]


class LinkState(enum.Enum):
    """What the slack of a link allows, in batches."""

    LOCKED = "locked"
    """Slack 0: the stage waits for the next one within every step."""
    OVERLAPPED = "overlapped, no slack"
    """Slack 1: equal stages run at full rate, but any delay is felt."""
    DECOUPLED = "decoupled"
    """Slack 2 and more: neither forward nor backward nor update of the neighbours is waited for."""

    @classmethod
    def of(cls, slack: int) -> LinkState:
        """The state of a link with this slack."""
        return (cls.LOCKED, cls.OVERLAPPED)[slack] if slack < 2 else cls.DECOUPLED


@dataclass(frozen=True)
class Staleness(Sequence[int]):
    """Layer-wise staleness m_0 .. m_{K-1}, in batches; compares and indexes like the tuple of its values.

    Args:
        values: one non-negative integer per stage, never growing with depth, the last one 0.

    Raises:
        ConfigError: where `values` break one of these rules.
    """

    values: tuple[int, ...]

    def __init__(self, values: Sequence[int]) -> None:
        checked = whole_numbers("staleness", values)
        suggestion = (*sorted(checked, reverse=True)[:-1], 0)
        for stage, (here, after) in enumerate(zip(checked, checked[1:], strict=False)):
            if after > here:
                raise ConfigError(
                    f"staleness {checked} grows from stage {stage} to stage {stage + 1}; it must not grow "
                    f"with depth. Did you mean {suggestion}?"
                )
        if checked[-1] != 0:
            raise ConfigError(
                f"staleness {checked} ends with {checked[-1]}; the last stage has the loss at hand, so its "
                f"staleness is 0. Did you mean {suggestion}?"
            )
        object.__setattr__(self, "values", checked)

    @property
    def slack(self) -> tuple[int, ...]:
        """d_k = m_k - m_{k+1} per stage, in batches; 0 for the last stage, which has no link below it."""
        return (*(here - after for here, after in zip(self.values, self.values[1:], strict=False)), 0)

    @property
    def links(self) -> tuple[LinkState, ...]:
        """The state of each of the K - 1 links."""
        return tuple(LinkState.of(slack) for slack in self.slack[:-1])

    def __getitem__(self, index):  # type: ignore[no-untyped-def]
        return self.values[index]

    def __len__(self) -> int:
        return len(self.values)

    def __iter__(self) -> Iterator[int]:
        return iter(self.values)

    def __eq__(self, other: object) -> bool:
        return tuple(other) == self.values if isinstance(other, tuple | Staleness) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.values)

    def __str__(self) -> str:
        return "(" + ",".join(map(str, self.values)) + ")"


def whole_numbers(name: str, values: Sequence[int]) -> tuple[int, ...]:
    """`values` as a tuple of at least one integer >= 0, or a `ConfigError` that names the entry."""
    try:
        entries = tuple(values)
    except TypeError:
        raise ConfigError(f"{name} is {values!r}; it must be one integer per stage, such as (4, 2, 0).") from None
    if not entries:
        raise ConfigError(f"{name} is empty; give one integer per stage, such as (4, 2, 0).")
    for stage, entry in enumerate(entries):
        if isinstance(entry, bool) or not isinstance(entry, int) or entry < 0:
            raise ConfigError(f"{name}[{stage}] is {entry!r}; it counts batches, so it must be an integer >= 0.")
    return entries
