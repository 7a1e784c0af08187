"""Random runs of the rule of elastic stages, without tensors."""

from __future__ import annotations

from hypothesis import strategies as st

from stalewise.methods import DSP
from stalewise.protocol.actions import Kind
from stalewise.protocol.course import courses_of


def play(
    method: DSP, count: int, data: st.DataObject, replay: tuple[tuple[str, ...], ...] | None
) -> tuple[tuple[str, ...], ...]:
    """A run in which any stage that can go on may be the next."""
    courses = courses_of(method.program(), replay)
    last = len(courses) - 1
    activations, gradients, clock = [count, *[0] * last], [0] * (last + 1), 0
    while True:
        able = [
            (stage, kind)
            for stage, course in enumerate(courses)
            if (kind := course.choose(activation_ready=activations[stage] > 0, gradients_waiting=gradients[stage]))
        ]
        if not able:
            break
        stage, kind = data.draw(st.sampled_from(able))
        course = courses[stage]
        clock += data.draw(st.sampled_from([1, 10, 100]))
        if kind is Kind.FORWARD:
            activations[stage] -= 1
            if stage < last:
                activations[stage + 1] += 1
        elif kind is Kind.BACKWARD:
            gradients[stage] -= stage < last
            if stage > 0:
                gradients[stage - 1] += 1
        course.did(kind, clock)
    assert all(letters[0].count("B") == count for letters in (course.orders for course in courses))
    return tuple(course.orders for course in courses)
