"""Checks of single numbers, with one wording for all of them."""

from __future__ import annotations

import math
from typing import Any

from stalewise.errors import ConfigError

__all__ = ["check_count", "check_real"]


def check_count(name: str, value: Any, least: int = 1, *, most: int = 2**63 - 1) -> None:
    """Refuse what is no whole number of `least` .. `most`.

    Raises:
        ConfigError: naming it.
    """
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        bound = "" if most >= 2**63 - 1 else f" and at most {most}"
        raise ConfigError(f"{name} is {value!r}; it must be a whole number of at least {least}{bound}.")


def check_real(name: str, value: Any, rule: str = "a finite number") -> None:
    """Refuse what is no finite real number.

    Args:
        name: of the value.
        value: to check.
        rule: what it must be, in words.

    Raises:
        ConfigError: naming it.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ConfigError(f"{name} is {value!r}; it must be {rule}.")
