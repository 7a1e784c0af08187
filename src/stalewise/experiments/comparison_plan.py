"""partition.json of a comparison: the cuts that all its rows share, and what was predicted of each."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stalewise.errors import ConfigError

__all__ = ["ComparisonPlan"]


@dataclass(frozen=True, kw_only=True)
class ComparisonPlan:
    """What all rows of a comparison share.

    Args:
        method: "profile" where the cuts were chosen from one, "fixed" where they were given.
        cuts: of the model.
        memory: by row, bytes of each stage by category as predicted.
    """

    method: str
    cuts: tuple[int, ...]
    memory: Mapping[str, tuple[Mapping[str, float], ...]]

    @classmethod
    def read(cls, file: Path) -> ComparisonPlan:
        """From a file as `experiments.cuts.plan_cuts` makes it.

        Raises:
            ConfigError: where it is missing or malformed.
        """
        try:
            values: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
            return cls(
                method=values["method"],
                cuts=tuple(map(_whole, values["cuts"])),
                memory={name: _memory(row) for name, row in values["predicted"].items()},
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(
                f"{file} is not what compare wrote there ({type(error).__name__}: {error}), so the cuts of its runs "
                "are not known. Copy it again, choose another --out, or give --overwrite to begin anew."
            ) from None


def _memory(row: Mapping[str, Any]) -> tuple[Mapping[str, float], ...]:
    return tuple({part: float(size) for part, size in stage.items()} for stage in row.get("memory") or ())


def _whole(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"a cut is {value!r}")
    return value
