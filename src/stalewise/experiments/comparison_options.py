"""What a user types for a comparison, as values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from stalewise.errors import ConfigError
from stalewise.experiments.config import parse_options

__all__ = ["parse_accuracy", "parse_names", "parse_row_options"]


def parse_names(text: str) -> tuple[str, ...]:
    """`"bp, dsp"` as ("bp", "dsp"); `"none"` as ()."""
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    return () if names == ("none",) else names


def parse_row_options(texts: Sequence[str]) -> dict[str, dict[str, Any]]:
    """`["gpipe:micro_batches=8"]` as {"gpipe": {"micro_batches": 8}}.

    Raises:
        ConfigError: naming what is not of the form row:key=value.
    """
    options: dict[str, dict[str, Any]] = {}
    for text in texts:
        row, colon, option = text.partition(":")
        if not colon or not row:
            raise ConfigError(
                f"--option {text!r} does not say of which row it is; write row:key=value, such as "
                "gpipe:micro_batches=8."
            )
        options.setdefault(row.strip(), {}).update(parse_options([option]))
    return options


def parse_accuracy(text: str | None) -> float | None:
    """`"92%"` or `"0.92"` as 0.92; None stays None.

    Raises:
        ConfigError: where it is no number, or not above 0 and at most 1.
    """
    if text is None:
        return None
    try:
        accuracy = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        accuracy = float("nan")
    if not 0 < accuracy <= 1:
        hint = f" Did you mean {text}%?" if 1 < accuracy <= 100 else ""
        raise ConfigError(f"--target-accuracy is {text!r}; give a fraction such as 0.92, or 92%.{hint}")
    return accuracy
