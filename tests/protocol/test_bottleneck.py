"""The watch names the stage or link that sets the pace, and only that."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest

from stalewise.protocol.bottleneck import WINDOW, Bottleneck, BottleneckWatch, StepRecord

MS = 1_000_000


def records(compute_ms: Sequence[float], *, step_ms: float, wait: str = "activation") -> list[StepRecord]:
    """A stage's steps, all of one length; what it does not compute it waits."""
    made = []
    for index, own in enumerate(compute_ms):
        idle = round((step_ms - own) * MS)
        waits = {name: idle if name == wait else 0 for name in ("load", "activation", "gradient")}
        made.append(
            StepRecord(
                index,
                round(own * MS),
                waits["load"],
                waits["activation"],
                waits["gradient"],
                round((index + 1) * step_ms * MS),
            )
        )
    return made


def statuses(stages: Sequence[Sequence[StepRecord]], upto: int) -> list[dict[str, Any]]:
    """What the stages publish after that many updates, as JSON gives it."""
    return [
        {"stage": stage, "steps": [list(step) for step in steps[:upto]][-64:]} for stage, steps in enumerate(stages)
    ]


def told(
    stages: Sequence[Sequence[StepRecord]], *, locked: bool = False, every: int = 1
) -> list[tuple[int, Bottleneck | None]]:
    """All that a watch tells in a run, with the number of updates made by then."""
    watch = BottleneckWatch(len(stages), locked=locked)
    heard = []
    for upto in range(1, len(stages[0]) + 1):
        if upto % every == 0 and watch.update(statuses(stages, upto)):
            heard.append((upto, watch.current))
    return heard


def test_a_device_that_becomes_slow_is_named_with_its_beginning() -> None:
    """From update 40 on stage 1 takes twice as long; it is told before update 52, and not again."""
    slow = [*[9.0] * 40, *[20.0] * 60]
    steps = [records([10.0] * 100, step_ms=20), records(slow, step_ms=20), records([10.0] * 100, step_ms=20)]
    ((upto, found),) = told(steps, locked=True)
    assert upto <= 40 + WINDOW + 4
    assert found is not None
    assert (found.kind, found.stage, found.where) == ("compute", 1, "stage 1")
    assert found.factor == pytest.approx(2.0)
    assert found.since_update == 40
    assert found.update == upto - 1
    assert found.step_s == pytest.approx(0.020)
    assert found.waits == pytest.approx((0.5, 0.0, 0.5))
    text = found.sentence()
    assert text == (
        "stage 1 limits the pace since update 40: it computes 2.00 times as long as the next slowest stage; waiting: "
        "stage 0 50%, stage 2 50%"
    )
    assert Bottleneck.from_record({"event": "bottleneck", "batch": 3, **found.as_dict()}) == found


def test_how_often_it_looks_does_not_matter_to_what_it_sees() -> None:
    slow = [*[9.0] * 40, *[20.0] * 60]
    steps = [records([10.0] * 100, step_ms=20), records(slow, step_ms=20)]
    ((_, found),) = told(steps, locked=True, every=23)
    assert found is not None
    assert (found.stage, found.since_update) == (1, 40)


def test_a_spell_of_three_steps_is_not_told() -> None:
    spell = [*[10.0] * 30, *[30.0] * 3, *[10.0] * 30]
    assert told([records(spell, step_ms=30), records([10.0] * 63, step_ms=30)], locked=True) == []


def test_even_stages_are_not_told() -> None:
    """Nor are those whose steps vary by a few percent."""
    noise = random.Random(1)
    steps = [records([10 + noise.random() / 2 for _ in range(200)], step_ms=10.6) for _ in range(3)]
    assert told(steps) == []


def test_a_device_that_recovers_is_told_too() -> None:
    course = [*[20.0] * 40, *[10.0] * 40]
    heard = told([records(course, step_ms=20), records([10.0] * 80, step_ms=20)], locked=True)
    assert [found and found.stage for _, found in heard] == [0, None]
    assert heard[0][1] is not None
    assert heard[0][1].since_update == 0


@pytest.mark.parametrize(
    ("waits", "kind", "stage", "where"),
    [
        (("gradient", "activation", "activation"), "link", 0, "link 0 -> 1"),
        (("load", "activation", "activation"), "loader", 0, "the data loader"),
    ],
)
def test_messages_and_data_that_come_late(waits: tuple[str, ...], kind: str, stage: int, where: str) -> None:
    """No stage computes for more than half of its step, and no link is locked."""
    compute = (8.0, 10.0, 19.0 if kind == "link" else 9.0)
    steps = [records([own] * 40, step_ms=30.0, wait=wait) for own, wait in zip(compute, waits, strict=True)]
    ((_, found),) = told(steps)
    assert found is not None
    assert (found.kind, found.stage, found.where) == (kind, stage, where)
    assert found.factor == pytest.approx(30 / max(compute))
    assert "times as long as any stage computes" in found.sentence()


def test_a_bottleneck_that_gets_worse_is_told_again() -> None:
    course = [*[15.0] * 30, *[30.0] * 30]
    heard = told([records([10.0] * 60, step_ms=30), records(course, step_ms=30)], locked=True)
    assert [round(found.factor, 1) for _, found in heard if found] == [1.5, 3.0]
    assert [found.since_update for _, found in heard if found] == [0, 30]


def test_nothing_is_told_of_what_is_not_known() -> None:
    watch = BottleneckWatch(2, locked=False)
    assert not watch.update([])
    assert not watch.update([{"stage": 0, "batch": 3}])
    assert not watch.update(statuses([records([10.0] * 40, step_ms=10.0), []], 40))
    assert watch.current is None
