"""From the name of a method, and what a user gave of its options, to the method.

An option is a field of the method's class, so a new method or option needs nothing here but its name.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from stalewise.errors import ConfigError
from stalewise.methods.bp import BP
from stalewise.methods.ddg import DDG
from stalewise.methods.dni import DNI
from stalewise.methods.dsp import DSP
from stalewise.methods.fdg import FDG
from stalewise.methods.features_replay import FeaturesReplay
from stalewise.methods.gpipe import GPipe
from stalewise.methods.method import Method
from stalewise.methods.one_f_one_b import OneFOneB
from stalewise.methods.pipedream import PipeDream
from stalewise.methods.pipemare import PipeMare
from stalewise.protocol.numbers import check_count
from stalewise.protocol.staleness import Staleness, whole_numbers

__all__ = ["METHOD_NAMES", "build_method", "describe_method", "method_options", "rebuild_method"]

_CLASSES: dict[str, type[Method]] = {
    kind.name: kind for kind in (DSP, BP, GPipe, OneFOneB, DNI, DDG, FeaturesReplay, PipeDream, PipeMare, FDG)
}
_VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {"dsp-stored": ("dsp", {"activations": "stored"})}

MOST_STAGES = 10**5
"""More is a slip of the hand, and would fill the memory."""

METHOD_NAMES = (*_CLASSES, *_VARIANTS)


def method_options(name: str) -> tuple[str, ...]:
    """The options that a method takes, beside the number of stages."""
    kind, _ = _lookup(name)
    return tuple(option for option in inspect.signature(kind).parameters if option not in ("stages", "num_stages"))


def build_method(name: str, *, num_stages: int, **options: Any) -> Method:
    """The method of that name.

    Args:
        name: one of `METHOD_NAMES`.
        num_stages: K.
        options: of the method; those that are None are left to it. DSP without staleness is minimal.

    Raises:
        ConfigError: where the name is unknown, or an option does not fit.
    """
    kind, preset = _lookup(name)
    check_count("stages", num_stages, most=MOST_STAGES)
    given = {option: value for option, value in options.items() if value is not None}
    known = method_options(name)
    for option in given:
        if option not in known:
            takes = f"it takes {', '.join(known)}" if known else "it takes none"
            raise ConfigError(f"{option} is not an option of {name}; {takes}. Leave {option} out.")
    given = {**preset, **given}
    if kind is DSP:
        return _build_dsp(num_stages, given)
    build: Callable[..., Method] = kind
    return build(num_stages, **given)


def describe_method(method: Method) -> tuple[str, dict[str, Any]] | None:
    """Name and options, JSON values, from which `rebuild_method` makes it; None for a class of the user's."""
    if type(method) is not _CLASSES.get(method.name):
        return None
    options = {option: getattr(method, option) for option in method_options(method.name)}
    return method.name, {
        option: list(value) if isinstance(value, Staleness) else value for option, value in options.items()
    }


def rebuild_method(name: str, options: Mapping[str, Any], *, num_stages: int) -> Method:
    """The inverse of `describe_method`; unlike `build_method` it takes every option as it is given.

    Raises:
        ConfigError: where the name is unknown, or an option does not fit.
    """
    kind, _ = _lookup(name)
    build: Callable[..., Method] = kind
    return build(**options) if kind is DSP else build(num_stages, **options)


def _build_dsp(num_stages: int, options: Mapping[str, Any]) -> DSP:
    if options.get("staleness") == "auto":
        return DSP(**{**options, "num_stages": num_stages})
    for option in ("staleness", "queue"):
        values = options.get(option)
        if values is not None and len(whole_numbers(option, values)) != num_stages:
            raise ConfigError(
                f"{option} {tuple(values)} has {len(values)} entries for {num_stages} stages; give one per stage, or "
                f"use --stages {len(values)}."
            )
    return DSP(**{"staleness": DSP.minimal(num_stages).staleness, **options})


def _lookup(name: str) -> tuple[type[Method], dict[str, Any]]:
    if not isinstance(name, str):
        raise ConfigError(f"the method is {name!r}; it must be a name, one of {', '.join(METHOD_NAMES)}.")
    base, preset = _VARIANTS.get(name, (name, {}))
    if base not in _CLASSES:
        nearest = difflib.get_close_matches(name, METHOD_NAMES, n=1)
        repair = f" Did you mean {nearest[0]!r}?" if nearest else ""
        raise ConfigError(f"there is no method {name!r}; there are {', '.join(METHOD_NAMES)}.{repair}")
    return _CLASSES[base], preset
