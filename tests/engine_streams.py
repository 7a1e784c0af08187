"""Streams of actions as text, and an independent statement of the order that one stage has to keep.

`order_violations` knows the order of docs/methods.md, and nothing of the validator: it lists which of a stage's own
actions come before one that they have to follow.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from stalewise.protocol.actions import Action, Kind
from stalewise.protocol.program import Program

Stream = list[Action]


def streams_of(program: Program, num_batches: int) -> list[Stream]:
    """All actions of every stage for a run that ends with a drain."""
    return [list(stage.actions(num_batches)) for stage in program.stages]


def stream(text: str) -> Stream:
    """`"F0 B0 U"` as actions."""
    return [Action.parse(word) for word in text.split()]


def order_violations(actions: Sequence[Action], staleness: int, num_batches: int, accumulate: int = 1) -> Iterator[str]:
    """What a stage with this staleness does in the wrong order; empty for every order that gives DSP's numbers.

    Each of `actions` is there once, and the U's count from 0 in the order in which they appear: U i uses the
    gradients of the i-th group of `accumulate` batches.
    """
    place: dict[tuple[Kind, int], int] = {}
    updates = 0
    for position, action in enumerate(actions):
        number = updates if action.batch is None else action.batch
        updates += action.batch is None
        place[action.kind, number] = position

    def before(first: Kind, i: int, then: Kind, j: int) -> Iterator[str]:
        if (first, i) in place and (then, j) in place and place[first, i] > place[then, j]:
            yield f"{first.value}{i} after {then.value}{j}"

    forward, backward, update = Kind.FORWARD, Kind.BACKWARD, Kind.UPDATE
    for n in range(num_batches):
        # what an action needs
        yield from before(Kind.LOAD, n, forward, n)
        yield from before(Kind.RECEIVE_ACTIVATION, n, forward, n)
        yield from before(forward, n, Kind.SEND_ACTIVATION, n)
        yield from before(forward, n, Kind.RECOMPUTE, n)
        yield from before(forward, n, backward, n)
        yield from before(Kind.RECOMPUTE, n, backward, n)
        yield from before(Kind.RECEIVE_GRADIENT, n, backward, n)
        yield from before(backward, n, Kind.SEND_GRADIENT, n)
        yield from before(backward, n, update, n // accumulate)
        # first in, first out
        for kind in Kind:
            yield from before(kind, n, kind, n + 1)
        # staleness: batch n is backwarded between the forwards of n + m and n + m + 1
        yield from before(forward, min(n + staleness, num_batches - 1), backward, n)
        yield from before(backward, n, forward, n + staleness + 1)
        # weights: forward n sees the updates of max(0, n - m) batches, recompute and backward n those of n
        seen = max(0, n - staleness) // accumulate
        yield from before(update, seen - 1, forward, n)
        yield from before(forward, n, update, seen)
        yield from before(update, n // accumulate - 1, Kind.RECOMPUTE, n)
        yield from before(update, n // accumulate - 1, backward, n)
