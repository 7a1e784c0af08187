"""The course of an elastic stage: its actions, chosen while it runs, recorded, and repeated.

A round of the engines ends where that of a fixed program does, so that losses, pauses and drains are the same for both:

    round n    as long as the rule says so:  R, B .. U      then  F n      then B .. U while more than m_k are in flight
    drain      B .. U of batch step - m_k, if that was not done before

What was chosen is a string per cycle (from drain to drain), a letter each: F forwards the next batch, R recomputes
the next one to backward, B backwards it and updates. With the order of its letters a stage computes the same numbers
again, whatever the timing. The rule itself is `protocol.elastic`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

from stalewise.errors import ProgramError
from stalewise.protocol.actions import Action, Kind
from stalewise.protocol.elastic import ElasticStage
from stalewise.protocol.program import Program, Slot, StageProgram

__all__ = ["Course", "Orders", "courses_of", "order_actions", "realised_staleness", "streams_of"]

Orders = tuple[tuple[str, ...], ...]
"""Per stage, the letters of each cycle."""

_LETTERS = {Kind.FORWARD: "F", Kind.RECOMPUTE: "R", Kind.BACKWARD: "B"}
_KINDS = {letter: kind for kind, letter in _LETTERS.items()}
_OF_FORWARD = (Kind.LOAD, Kind.RECEIVE_ACTIVATION, Kind.FORWARD, Kind.SEND_ACTIVATION)


class _Chooser(Protocol):
    """What decides: the rule, or a record."""

    forwarded: int
    received: int
    backwarded: int

    def next_action(self, activation_ready: bool) -> Kind | None: ...

    def gradient_came(self) -> None: ...

    def did(self, kind: Kind, time_ns: int) -> None: ...

    def state(self) -> tuple[list[int], int] | None: ...

    def restore(self, letters: str, rule: tuple[Sequence[int], int] | None) -> None: ...


class Course:
    """One stage while it runs.

    Args:
        program: of all stages; elastic.
        stage: k.
        replay: the letters of each cycle, to be repeated; None: the rule decides.
    """

    def __init__(self, program: Program, stage: int, replay: Sequence[str] | None = None) -> None:
        assert program.elastic is not None, "only an elastic program leaves anything to choose"
        self._letters: list[bytearray] = []
        self._steps, self._stage = program.stages[stage], stage
        self._rule = replace(program.elastic, recompute=self._steps.recomputes)
        self._bound = int(program.staleness[stage])
        self._last = stage == program.num_stages - 1
        self._replay = None if replay is None else list(replay)
        self._recomputed = False
        self._staleness: Counter[int] = Counter()
        self._chooser: _Chooser = self._begin()

    @property
    def must_backward(self) -> bool:
        """Whether the stage has run ahead as far as it may."""
        return self._chooser.forwarded - self._chooser.backwarded > self._bound

    @property
    def has_gradient(self) -> bool:
        """Whether what the next batch to backward needs of the stage after has come."""
        return self._chooser.received > self._chooser.backwarded

    @property
    def staleness_counts(self) -> list[int]:
        """Backwards so far by realised staleness, from 0 to the largest that was allowed."""
        return [self._staleness[depth] for depth in range(self._bound + 1)]

    @property
    def orders(self) -> tuple[str, ...]:
        """The letters of each cycle so far; of one that was begun after a drain and has no batch, nothing."""
        cycles = [cycle.decode("ascii") for cycle in self._letters]
        return tuple(cycles if cycles[-1] or len(cycles) == 1 else cycles[:-1])

    def snapshot(self) -> dict[str, Any]:
        """What was chosen, and what the rule remembers, as JSON values."""
        return {"letters": list(self.orders), "rule": self._chooser.state()}

    def check(self, snapshot: Mapping[str, Any]) -> None:
        """Make sure that this course can go on where another one stood.

        Raises:
            ProgramError: where it is to repeat another record than the one that began there.
        """
        if not snapshot["letters"]:
            raise ProgramError(f"the order of stage {self._stage} has no cycle.")
        for number, letters in enumerate(snapshot["letters"]):
            if letters.strip("FRB"):
                raise ProgramError(f"the order of stage {self._stage} holds other letters than F, R and B.")
            given = "" if self._replay is None or number >= len(self._replay) else self._replay[number]
            if self._replay is not None and not given.startswith(letters):
                raise ProgramError(
                    f"the order to repeat is another one than that of the checkpoint: cycle {number} of stage "
                    f"{self._stage} begins with {given[: len(letters)]!r}, there with {letters!r}. Give the orders of "
                    "the run that was saved, or none."
                )

    def restore(self, snapshot: Mapping[str, Any]) -> None:
        """Go on where another course stood; see `check`."""
        self._letters = []
        for letters in snapshot["letters"]:
            self._chooser = self._begin()
            self._letters[-1].extend(letters.encode("ascii"))
            for depth in realised_staleness(letters):
                self._staleness[depth] += 1
        self._chooser.restore(letters, snapshot["rule"])
        self._recomputed = letters.rfind("R") > letters.rfind("B")

    def begin_cycle(self) -> None:
        """Batches count anew, after a drain."""
        if self._chooser.forwarded:
            self._chooser = self._begin()

    def begin_session(self) -> None:
        """Batches come again after a pause, whose time is no step's."""
        if isinstance(self._chooser, ElasticStage):
            self._chooser.slow_steps.pause()

    def choose(self, *, activation_ready: bool, gradients_waiting: int) -> Kind | None:
        """`FORWARD`, `RECOMPUTE`, `BACKWARD`, or None: wait for a message.

        Args:
            activation_ready: whether the next batch is there.
            gradients_waiting: that came and were not used yet; 0 on the last stage.
        """
        self._note(gradients_waiting)
        return self._chooser.next_action(activation_ready)

    def next_backward(self) -> Kind:
        """What the next batch to backward needs, its gradient apart."""
        return Kind.BACKWARD if self._recomputed or not self._steps.recomputes else Kind.RECOMPUTE

    def is_due(self, step: int, num_batches: int) -> bool:
        """Whether local step `step` of a drain has something left to backward."""
        return self._chooser.backwarded <= min(step - self._bound, num_batches - 1)

    def actions(self, kind: Kind) -> tuple[Action, ...]:
        """What `kind` means now, in the order in which it is executed."""
        batch = self._chooser.forwarded if kind is Kind.FORWARD else self._chooser.backwarded
        return tuple(
            Action(slot.kind, None if slot.kind is Kind.UPDATE else batch) for slot in _slots_of(self._steps, kind)
        )

    def did(self, kind: Kind, time_ns: int) -> None:
        """The actions of `kind` are done.

        Raises:
            ProgramError: where a replay did something else than its record.
        """
        chooser = self._chooser
        if kind is Kind.BACKWARD:
            self._staleness[chooser.forwarded - 1 - chooser.backwarded] += 1
            self._note(1 if chooser.received == chooser.backwarded and not self._last else 0)
        self._recomputed = kind is Kind.RECOMPUTE or (self._recomputed and kind is Kind.FORWARD)
        self._letters[-1].append(ord(_LETTERS[kind]))
        chooser.did(kind, time_ns)

    def _note(self, gradients_waiting: int) -> None:
        while not self._last and self._chooser.received < self._chooser.backwarded + gradients_waiting:
            self._chooser.gradient_came()

    def _begin(self) -> _Chooser:
        self._letters.append(bytearray())
        if self._replay is None:
            return ElasticStage(self._rule, self._stage)
        cycle = len(self._letters) - 1
        if cycle >= len(self._replay):
            # A run that is over has begun no further cycle.
            return _Replayed("", self._stage, self._last)
        return _Replayed(self._replay[cycle], self._stage, self._last)


def courses_of(program: Program, replay: Orders | None) -> list[Course]:
    """Of all stages; none where the program is fixed.

    Raises:
        ProgramError: where there is a record to repeat and nothing to choose, or a record of other stages.
    """
    if program.elastic is None:
        if replay is not None:
            raise ProgramError("there is an order to repeat, and the method is not elastic: leave it out.")
        return []
    if replay is not None and len(replay) != program.num_stages:
        raise ProgramError(f"the order to repeat is of {len(replay)} stages, and the method has {program.num_stages}.")
    return [Course(program, stage, None if replay is None else replay[stage]) for stage in range(program.num_stages)]


class _Replayed:
    """Decides as recorded."""

    def __init__(self, letters: str, stage: int, last: bool) -> None:
        self.forwarded = self.received = self.backwarded = 0
        self._letters, self._stage, self._last = letters, stage, last
        self._place = 0

    def next_action(self, activation_ready: bool) -> Kind | None:
        if self._place == len(self._letters):
            # Whether there really is another batch the caller finds out.
            return Kind.FORWARD if activation_ready else None
        kind = _KINDS[self._letters[self._place]]
        if kind is Kind.FORWARD:
            return kind if activation_ready else None
        return kind if kind is Kind.RECOMPUTE or self.received > self.backwarded else None

    def gradient_came(self) -> None:
        self.received += 1

    def state(self) -> None:
        """A record remembers nothing."""

    def restore(self, letters: str, rule: tuple[Sequence[int], int] | None) -> None:
        self._place = len(letters)
        self.forwarded, self.backwarded = letters.count("F"), letters.count("B")
        self.received = self.forwarded if self._last else self.backwarded

    def did(self, kind: Kind, time_ns: int) -> None:
        recorded = self._letters[self._place : self._place + 1]
        if recorded != _LETTERS[kind]:
            raise ProgramError(
                f"stage {self._stage} was to do {recorded or 'nothing'!r} as number {self._place} of a cycle, and did "
                f"{_LETTERS[kind]!r}. Replay with the batches and the drains of the run that was recorded."
            )
        self._place += 1
        if kind is Kind.FORWARD:
            self.forwarded += 1
            self.received += self._last
        elif kind is Kind.BACKWARD:
            self.backwarded += 1


def order_actions(steps: StageProgram, letters: str) -> Iterator[Action]:
    """The actions of a cycle of a stage, from its letters.

    Raises:
        ProgramError: where there is another letter.
    """
    forwarded = backwarded = 0
    for letter in letters:
        kind = _KINDS.get(letter)
        if kind is None:
            raise ProgramError(f"{letter!r} is not a letter of an order; they are {', '.join(_KINDS)}.")
        batch = forwarded if kind is Kind.FORWARD else backwarded
        for slot in _slots_of(steps, kind):
            yield Action(slot.kind, None if slot.kind is Kind.UPDATE else batch)
        forwarded += kind is Kind.FORWARD
        backwarded += kind is Kind.BACKWARD


def streams_of(program: Program, orders: Orders, cycle: int) -> list[list[Action]]:
    """The actions of all stages in a cycle, for `validate.run_streams`."""
    return [list(order_actions(steps, letters[cycle])) for steps, letters in zip(program.stages, orders, strict=True)]


def realised_staleness(letters: str) -> list[int]:
    """Of each batch of a cycle: forwards between its own and its backward."""
    found: list[int] = []
    forwarded = 0
    for letter in letters:
        forwarded += letter == "F"
        if letter == "B":
            found.append(forwarded - 1 - len(found))
    return found


def _slots_of(steps: StageProgram, kind: Kind) -> Iterator[Slot]:
    """The slots of a local step that a letter stands for."""
    for slot in steps.slots:
        if slot.kind in _OF_FORWARD:
            mine = kind is Kind.FORWARD
        elif slot.kind is Kind.RECOMPUTE:
            mine = kind is Kind.RECOMPUTE
        else:
            mine = kind is Kind.BACKWARD
        if mine:
            yield slot
