"""Rows of pictures are told apart, and a method looks the same in all of them."""

from __future__ import annotations

from stalewise.methods import METHOD_NAMES
from stalewise.report.method_colours import method_colours


def test_all_methods_and_baselines_differ() -> None:
    names = [*METHOD_NAMES, "one-process", "data-parallel", "m2.1.0", "m4.2.0", "m6.3.0", "m10.5.0"]
    assert len(set(method_colours(names).values())) == len(names)


def test_a_method_keeps_its_colour() -> None:
    few, many = method_colours(["own", "fr"]), method_colours(["dsp", "fr", "own", "fr", "another"])
    assert list(many) == ["dsp", "fr", "own", "another"]
    assert (many["fr"], many["own"]) == (few["fr"], few["own"])
