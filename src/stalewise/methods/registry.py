"""From the name of a method and what a user gave of its depths to the method."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from stalewise.errors import ConfigError
from stalewise.methods.bp import BP
from stalewise.methods.dsp import DSP
from stalewise.methods.method import Method

__all__ = ["METHOD_NAMES", "build_method"]

METHOD_NAMES = ("dsp", "bp")


def build_method(
    name: str,
    *,
    num_stages: int,
    staleness: Sequence[int] | None = None,
    queue: Sequence[int] | None = None,
) -> Method:
    """The method of that name.

    Args:
        name: one of `METHOD_NAMES`.
        num_stages: K.
        staleness: m_k of DSP; None: minimal.
        queue: p_k of DSP; None: half of each link's slack, rounded up.

    Raises:
        ConfigError: where the name is unknown, or an option does not fit.
    """
    if name not in METHOD_NAMES:
        nearest = difflib.get_close_matches(name, METHOD_NAMES, n=1)
        repair = f" Did you mean {nearest[0]!r}?" if nearest else ""
        raise ConfigError(f"there is no method {name!r}; there are {', '.join(METHOD_NAMES)}.{repair}")
    for option, values in (("staleness", staleness), ("queue", queue)):
        if values is not None and name != "dsp":
            raise ConfigError(f"{option} is an option of dsp; the staleness of {name} is fixed. Leave it out.")
        if values is not None and len(values) != num_stages:
            raise ConfigError(
                f"{option} {tuple(values)} has {len(values)} entries for {num_stages} stages; give one per stage, or "
                f"use --stages {len(values)}."
            )
    if name == "bp":
        return BP(num_stages)
    return DSP(staleness=DSP.minimal(num_stages).staleness if staleness is None else staleness, queue=queue)
