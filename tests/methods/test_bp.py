"""BP as a value: backpropagation over stages, and DSP without staleness."""

from __future__ import annotations

import pytest

from stalewise.errors import ConfigError
from stalewise.methods import BP, DSP, Method


@pytest.mark.parametrize("stages", [1, 2, 3, 8])
def test_it_is_the_program_of_dsp_without_staleness(stages: int) -> None:
    assert BP(stages).program() == DSP(staleness=(0,) * stages).program()
    assert BP(stages, accumulate=3).program() == DSP(staleness=(0,) * stages, accumulate=3).program()
    assert BP(stages).staleness == (0,) * stages
    assert BP(stages).num_stages == stages


def test_it_keeps_its_graph_and_never_recomputes() -> None:
    assert not any(stage.recomputes for stage in BP(3).program().stages)
    assert not any(stage.stores_graphs_over_updates for stage in BP(3).program().stages)
    assert BP(3).program().max_lag == 0


def test_it_is_a_value() -> None:
    assert BP(2) == BP(stages=2)
    assert BP(2) != BP(3)
    assert hash(BP(2)) == hash(BP(2))
    assert eval(repr(BP(2, accumulate=3))) == BP(2, accumulate=3) != BP(2)
    assert BP.name == "bp"
    assert isinstance(BP(2), Method)
    with pytest.raises(AttributeError):
        BP(2).stages = 3  # type: ignore[misc]


@pytest.mark.parametrize("stages", [0, -1, True, 1.0, "2", None])
def test_it_has_at_least_one_stage(stages: object) -> None:
    with pytest.raises(ConfigError, match=rf"stages is {stages!r}; a pipeline has at least 1 stage\."):
        BP(stages)  # type: ignore[arg-type]


@pytest.mark.parametrize("accumulate", [0, -1, True, 1.5, "2"])
def test_it_accumulates_at_least_one_batch(accumulate: object) -> None:
    with pytest.raises(ConfigError, match=rf"accumulate is {accumulate!r}; it must be a whole number of at least 1\."):
        BP(2, accumulate=accumulate)  # type: ignore[arg-type]
