"""A method keeps its colour from one picture to the next."""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["method_colours"]

_FIXED = {
    "bp": "#1f2937",
    "dsp": "#2f6fc0",
    "gpipe": "#e08a1e",
    "1f1b": "#a8861a",
    "ddg": "#2f9e6e",
    "fr": "#8b55b0",
    "pipedream": "#cf4b3f",
    "dsp-stored": "#17a2c0",
    "dni": "#d873a7",
    "pipemare": "#7a8b2e",
    "fdg": "#5b5fc7",
    "one-process": "#6b7280",
    "data-parallel": "#a1a8b3",
}
_OTHERS = ("#b0673c", "#4d7f8c", "#9c3f6b", "#3f6b46", "#c2a83e", "#7d5ba6")


def method_colours(names: Iterable[str]) -> dict[str, str]:
    """A colour for each row of a picture, by its name; rows that are called otherwise than a method share few others.

    Args:
        names: of the rows, in their order, each as often as it comes.
    """
    unique = list(dict.fromkeys(names))
    strangers = [name for name in unique if name not in _FIXED]
    others = {name: _OTHERS[place % len(_OTHERS)] for place, name in enumerate(strangers)}
    return {name: _FIXED.get(name) or others[name] for name in unique}
