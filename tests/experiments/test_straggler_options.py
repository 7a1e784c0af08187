"""`--straggler`, as a person types it."""

from __future__ import annotations

import re

import pytest

from stalewise.errors import ConfigError
from stalewise.experiments.straggler_options import parse_stragglers
from stalewise.protocol.stragglers import Straggler


def test_text() -> None:
    first, second, third = parse_stragglers(
        ["probability=1/3,factor=1.5", "stages=0,2,factor=200%,duration=3,how=sleep", "ranks=1,pause=0.2s,seed=9"]
    )
    assert first == Straggler(probability=1 / 3, factor=1.5, seed=0)
    assert second == Straggler(stages=(0, 2), factor=2, duration=3, how="sleep", seed=1)
    assert third == Straggler(stages=(1,), pause_s=0.2, seed=9)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("factor", "the entry 'factor'"),
        ("speed=3", "the entry 'speed'; there are stages, probability, factor"),
        ("factor=fast", "factor is 'fast'"),
        ("probability=1/0,factor=2", "probability is '1/0'"),
        ("probability=2,factor=2", "between 0 and 1"),
        ("factor=0.5", "at least 1"),
        ("probability=0.5", "slows nothing"),
        ("factor=2,stages=-1", "list some, from 0 on"),
        ("factor=2,how=idle", '"busy" or "sleep"'),
        ("factor=2,first=5,last=4", "the last of a straggler is 4"),
    ],
)
def test_mistakes_are_told(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        parse_stragglers([text])
