"""What a try of `bad_input.py` is, and how good values are spoilt."""

from __future__ import annotations

import math
import string
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

__all__ = ["Case", "damaged_bytes", "damaged_json", "misspelt", "wrong_count", "wrong_number", "wrong_value"]


@dataclass(frozen=True)
class Case:
    """One try.

    Args:
        what: to try it again by hand.
        act: ends in an error of stalewise.
        must_fail: whether it is certain that the input is bad; damage at random may leave it good.
    """

    what: str
    act: Callable[[], object]
    must_fail: bool = True


def wrong_value(random: Random) -> Any:
    """Something of a type that no argument has."""
    values: list[Any] = [object(), b"bytes", 1j, {"a": 1}, {1, 2}, [[]], [None], (1, "a"), ..., Random, range(-3, 0)]
    return random.choice(values)


def wrong_count(random: Random, least: int = 1) -> Any:
    """No whole number of at least `least`."""
    below = [least - 1, least - random.randint(1, 10**6), -(10**30)]
    return random.choice([*below, True, False, 1.5, math.nan, math.inf, "", "3", None, wrong_value(random)])


def wrong_number(random: Random, *, zero: bool = False) -> Any:
    """No finite number above 0; with `zero`, none of at least 0."""
    numbers = [-1, -1e-9, -(10**30), math.nan, math.inf, -math.inf, True, "1", wrong_value(random)]
    return random.choice(numbers if zero else [*numbers, 0, 0.0])


def misspelt(random: Random, name: str) -> str:
    """The name with one to three slips of the hand."""
    letters = list(name)
    for _ in range(random.randint(1, 3)):
        place = random.randrange(len(letters) + 1)
        match random.randrange(4):
            case 0:
                letters.insert(place, random.choice(string.ascii_letters + string.digits + string.punctuation + " é\0"))
            case 1 if letters:
                del letters[min(place, len(letters) - 1)]
            case 2 if letters:
                letters[min(place, len(letters) - 1)] = random.choice(string.printable)
            case _ if len(letters) > 1:
                place = min(place, len(letters) - 2)
                letters[place : place + 2] = reversed(letters[place : place + 2])
    return "".join(letters)


def damaged_bytes(random: Random, content: bytes) -> bytes:
    """Cut short, with other bytes in it, swollen, empty, or something else altogether."""
    if not content:
        return random.randbytes(random.randint(1, 300))
    data = bytearray(content)
    match random.randrange(6):
        case 0:
            return bytes(data[: random.randrange(len(data) or 1)])
        case 1:
            for _ in range(random.randint(1, 20)):
                data[random.randrange(len(data))] ^= 1 << random.randrange(8)
        case 2:
            start = random.randrange(len(data))
            data[start : start + random.randint(1, 400)] = random.randbytes(random.randint(0, 400))
        case 3:
            return b""
        case 4:
            return random.randbytes(random.randint(1, 3000))
        case 5:
            data += random.randbytes(random.randint(1, 100))
    return bytes(data)


def damaged_json(random: Random, value: Any, depth: int = 0) -> Any:
    """JSON with one entry, at any depth, of another type, out of its range, missing, or added."""
    if isinstance(value, dict) and value and (depth == 0 or random.random() < 0.7):
        name = random.choice(list(value))
        if random.random() < 0.1:
            return {other: entry for other, entry in value.items() if other != name}
        return {**value, name: damaged_json(random, value[name], depth + 1)}
    if isinstance(value, list) and value and random.random() < 0.7:
        place = random.randrange(len(value))
        if random.random() < 0.2:
            return [*value[:place], *value[place + random.randint(0, 1) :], *random.choice([[], [None], value])]
        return [*value[:place], damaged_json(random, value[place], depth + 1), *value[place + 1 :]]
    others: list[Any] = [None, True, -1, 0, 1, 10**30, -0.5, 1e308, math.nan, math.inf, "", "x", [], {}, [[]], [None]]
    return random.choice([*others, {"a": 1}, "dsp", [1, 2], ["a"], [-1], "\0", "../..", 1 << 62, 5, "9" * 50])
