"""`--straggler` as a value."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any

from stalewise.errors import ConfigError
from stalewise.protocol.stragglers import Straggler

__all__ = ["STRAGGLER_HELP", "parse_stragglers"]

STRAGGLER_HELP = (
    "Slow steps on purpose, such as probability=1/3,factor=1.5 or stages=1,factor=2; also duration (steps), pause (s), "
    "how=busy|sleep, seed, first, last. Repeat it."
)

_ALIASES = {"ranks": "stages", "pause": "pause_s"}


def parse_stragglers(texts: Sequence[str]) -> tuple[Straggler, ...]:
    """`["stages=0,2,probability=1/3,factor=1.5,duration=3", "pause=0.2,probability=1%"]` as stragglers.

    The seed of each is its place in the sequence where it names none, so that they do not draw the same steps.

    Raises:
        ConfigError: naming the entry that is not valid.
    """
    return tuple(_parse(text, seed) for seed, text in enumerate(texts))


def _parse(text: str, seed: int) -> Straggler:
    values: dict[str, Any] = {"seed": seed}
    for name, value in _entries(text):
        if name not in _READERS:
            raise ConfigError(
                f"--straggler {text!r} has the entry {name!r}; there are {', '.join(_READERS)}. Example: "
                "probability=1/3,factor=1.5."
            )
        try:
            values[name] = _READERS[name](value)
        except (ValueError, ZeroDivisionError):
            raise ConfigError(f"--straggler {text!r}: {name} is {value!r}; give a number, such as {name}=1.") from None
    return Straggler(**values)


def _entries(text: str) -> list[tuple[str, str]]:
    """Names and values; a part without a name goes on with the list of stages."""
    entries: list[tuple[str, str]] = []
    for part in text.split(","):
        name, equals, value = part.partition("=")
        if equals:
            entries.append((_ALIASES.get(name.strip(), name.strip()), value.strip()))
        elif entries and entries[-1][0] == "stages":
            entries[-1] = ("stages", f"{entries[-1][1]},{part.strip()}")
        else:
            raise ConfigError(f"--straggler {text!r} has the entry {part!r}; give name=value, such as factor=1.5.")
    return entries


def _fraction(text: str) -> float:
    """`"1/3"`, `"0.5"` or `"50%"`."""
    number = Fraction(text.removesuffix("%"))
    return float(number / 100 if text.endswith("%") else number)


def _stages(text: str) -> tuple[int, ...]:
    return tuple(int(stage) for stage in text.split(","))


_READERS: Mapping[str, Callable[[str], Any]] = {
    "stages": _stages,
    "probability": _fraction,
    "factor": _fraction,
    "duration": int,
    "pause_s": lambda text: float(text.removesuffix("s")),
    "how": str,
    "seed": int,
    "first": int,
    "last": int,
}
