"""Stragglers on purpose: which steps of which stages are slow, and by how much.

A step of a stage is everything between two of its updates: the forward, recompute and backward that belong to local
update u, all of its micro-batches, and the update itself. Whether it is slow depends on (seed, stage, u) alone,

    a spell begins at u     where  blake2b("seed/stage/u", 8 bytes, little endian) / 2^64 < probability
    step u is slow          where a spell began at one of u - duration + 1 .. u

so every method, every engine and the analytic model meet the same slow steps, whatever the timing, and no draw touches
another random stream. A slow step takes longer and changes no number.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, Literal

from stalewise.errors import ConfigError

__all__ = ["NO_STRAGGLERS", "Slowing", "Straggler", "Stragglers"]

How = Literal["busy", "sleep"]
"""What a slow stage does with the additional time: it computes, or it leaves its core to others."""


@dataclass(frozen=True, slots=True)
class Slowing:
    """What a slow step adds to the time that its actions take.

    Args:
        busy: additional computing, as a share of the time of each action.
        sleep: additional sleep, as a share of the time of each action.
        pause_s: sleep once, beside the first action of the step, in seconds.
    """

    busy: float = 0.0
    sleep: float = 0.0
    pause_s: float = 0.0

    @property
    def factor(self) -> float:
        """How many times as long each action takes."""
        return 1.0 + self.busy + self.sleep


@dataclass(frozen=True, kw_only=True)
class Straggler:
    """A reason why steps are slow.

    Args:
        stages: which stages (a stage is a rank); None: each, drawn for itself.
        probability: that a slow spell begins in a step; 1 is a device that is always slow.
        factor: how many times as long a slow step takes.
        duration: steps of a spell. Spells that overlap are one longer spell.
        pause_s: seconds that a stage sleeps in each slow step, beside its first action.
        how: "busy" computes for the additional time, "sleep" leaves the core to others.
        seed: of the draws. Two stragglers with one seed draw the same numbers.
        first: first local update at which a spell may begin.
        last: last one, or None.

    Raises:
        ConfigError: where a value is not valid.
    """

    stages: tuple[int, ...] | None = None
    probability: float = 1.0
    factor: float = 1.0
    duration: int = 1
    pause_s: float = 0.0
    how: How = "busy"
    seed: int = 0
    first: int = 0
    last: int | None = None

    def __post_init__(self) -> None:
        for name, value, least, most in (
            ("probability", self.probability, 0.0, 1.0),
            ("factor", self.factor, 1.0, math.inf),
            ("pause_s", self.pause_s, 0.0, math.inf),
        ):
            number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
            if not number or not least <= value <= most:
                bound = f"at least {least:g}" if most == math.inf else f"between {least:g} and {most:g}"
                raise ConfigError(f"the {name} of a straggler is {value!r}; it must be a number {bound}.")
        for name, count, least_int in (
            ("duration", self.duration, 1),
            ("seed", self.seed, 0),
            ("first", self.first, 0),
            ("last", self.first if self.last is None else self.last, self.first),
        ):
            if isinstance(count, bool) or not isinstance(count, int) or count < least_int:
                raise ConfigError(
                    f"the {name} of a straggler is {count!r}; it must be a whole number of at least {least_int}."
                )
        if self.how not in ("busy", "sleep"):
            raise ConfigError(f'the how of a straggler is {self.how!r}; it must be "busy" or "sleep".')
        if self.stages is not None:
            stages = tuple(self.stages) if isinstance(self.stages, Sequence) else ()
            if not stages or any(type(stage) is not int or stage < 0 for stage in stages):
                raise ConfigError(f"the stages of a straggler are {self.stages!r}; list some, from 0 on, or none.")
            object.__setattr__(self, "stages", tuple(sorted(set(stages))))
        if self.factor == 1 and self.pause_s == 0:
            raise ConfigError("a straggler with factor 1 and no pause slows nothing; give factor=1.5, or pause=0.1.")

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Straggler:
        """From its fields as JSON values."""
        stages = values.get("stages")
        return cls(**{**values, "stages": None if stages is None else tuple(stages)})

    def is_slow(self, stage: int, update: int) -> bool:
        """Whether the step of local update `update` of a stage is slow."""
        if self.stages is not None and stage not in self.stages:
            return False
        earliest = max(self.first, update - self.duration + 1)
        latest = update if self.last is None else min(update, self.last)
        return any(self._begins(stage, begin) for begin in range(earliest, latest + 1))

    def _begins(self, stage: int, update: int) -> bool:
        if self.probability >= 1:
            return True
        digest = blake2b(f"{self.seed}/{stage}/{update}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "little") < self.probability * 2**64


@dataclass(frozen=True)
class Stragglers:
    """All stragglers of a run; their factors multiply where they meet.

    Args:
        rules: any number of them; none: nothing is slowed.
    """

    rules: tuple[Straggler, ...] = ()

    @classmethod
    def of(cls, given: Stragglers | Straggler | Sequence[Straggler] | None) -> Stragglers:
        """One, several or none as `Stragglers`.

        Raises:
            ConfigError: where something else is given.
        """
        if isinstance(given, Stragglers):
            return given
        rules = (given,) if isinstance(given, Straggler) else () if given is None else given
        if not isinstance(rules, Sequence) or not all(isinstance(rule, Straggler) for rule in rules):
            raise ConfigError(f"stragglers is {given!r}; it must be a Straggler, or several in a list.")
        return cls(tuple(rules))

    def __bool__(self) -> bool:
        return bool(self.rules)

    def slowing(self, stage: int, update: int) -> Slowing | None:
        """What happens to a step; None where it is as quick as ever."""
        slow = [rule for rule in self.rules if rule.is_slow(stage, update)]
        if not slow:
            return None
        return Slowing(
            busy=math.prod(rule.factor for rule in slow if rule.how == "busy") - 1,
            sleep=math.prod(rule.factor for rule in slow if rule.how == "sleep") - 1,
            pause_s=sum(rule.pause_s for rule in slow),
        )

    def factors(self, stage: int, num_updates: int) -> Iterator[float]:
        """How many times as long each of the first steps of a stage takes; pauses do not count."""
        for update in range(num_updates):
            slowing = self.slowing(stage, update)
            yield 1.0 if slowing is None else slowing.factor

    def check_stages(self, num_stages: int) -> None:
        """Refuse stragglers on stages that do not exist.

        Raises:
            ConfigError: naming the stage.
        """
        for rule in self.rules:
            for stage in rule.stages or ():
                if stage >= num_stages:
                    raise ConfigError(
                        f"a straggler is on stage {stage}, and there are {num_stages}, counted from 0. Name others, or "
                        "none for all."
                    )


NO_STRAGGLERS = Stragglers()
