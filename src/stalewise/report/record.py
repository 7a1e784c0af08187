"""A JSON object that somebody may have edited: what is there has the right type, or the error names file and line."""

from __future__ import annotations

import json
import re
import reprlib
from collections.abc import Mapping
from pathlib import Path

from stalewise.errors import ConfigError

__all__ = ["Record", "read_json", "read_text"]


class Record:
    """A JSON object and the place it was read from.

    Args:
        values: the object.
        path: its file.
        line: its line in the file, where the file has one object a line.
        text: the text of the file, to find the line of a field.
        inside: what leads to the object within its file, such as `layers[3].`.
    """

    def __init__(
        self,
        values: Mapping[str, object],
        path: Path,
        *,
        line: int | None = None,
        text: str = "",
        inside: str = "",
    ) -> None:
        self.values = values
        self._path, self._line, self._text, self._inside = path, line, text, inside

    def __bool__(self) -> bool:
        return bool(self.values)

    def number(self, name: str) -> float | None:
        """A number, NaN and infinity included."""
        value = self.values.get(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.error(name, "a number or null")
        return float(value)

    def integer(self, name: str) -> int | None:
        """A whole number >= 0."""
        value = self.values.get(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise self.error(name, "a whole number >= 0 or null")
        return value

    def text(self, name: str) -> str | None:
        """A text that is not empty."""
        value = self.values.get(name)
        if value is None or value == "":
            return None
        if not isinstance(value, str):
            raise self.error(name, "a text or null")
        return value

    def integers(self, name: str) -> tuple[int, ...] | None:
        """A list of whole numbers >= 0."""
        value = self.values.get(name)
        if value is None:
            return None
        if not isinstance(value, list) or not all(type(entry) is int and entry >= 0 for entry in value):
            raise self.error(name, "a list of whole numbers >= 0 or null")
        return tuple(value)

    def texts(self, name: str) -> tuple[str, ...]:
        """A list of texts, empty where it is missing."""
        value = self.values.get(name)
        if value is None:
            return ()
        if not isinstance(value, list) or not all(isinstance(entry, str) for entry in value):
            raise self.error(name, "a list of texts or null")
        return tuple(value)

    def records(self, name: str) -> list[Record]:
        """A list of objects, empty where it is missing."""
        value = self.values.get(name)
        if value is None:
            return []
        if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
            raise self.error(name, "a list of objects or null")
        return [
            Record(entry, self._path, inside=f"{self._inside}{name}[{index}].") for index, entry in enumerate(value)
        ]

    def error(self, name: str, rule: str) -> ConfigError:
        """The error for a field that is not what `rule` says."""
        line = self._line
        if line is None and (match := re.search(rf'"{re.escape(name)}"\s*:', self._text)):
            line = self._text.count("\n", 0, match.start()) + 1
        where = str(self._path) if line is None else f"{self._path}, line {line}"
        return ConfigError(
            f"{where}: {self._inside}{name} is {reprlib.repr(self.values.get(name))}; it must be {rule}. "
            "Correct the value, or remove it: the report then says that it is not recorded."
        )


def read_text(path: Path) -> str:
    """The text of a file of a run folder; a ConfigError names the file where it is missing or unreadable."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(
            f"{path} does not exist; a run folder holds config.json and metrics.jsonl at least. "
            "Give the folder that a training run wrote."
        ) from None
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise ConfigError(
            f"{path}, line {line}: byte {error.start} is not UTF-8; save the file as UTF-8, or copy it again "
            "from the run."
        ) from error
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error}); make it a readable file.") from error


def read_json(path: Path, *, required: bool) -> Record:
    """The object that a file of a run folder holds; an empty one where it may be missing, and is."""
    if not required and not path.exists():
        return Record({}, path)
    text = read_text(path)
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"{path}, line {error.lineno}: not JSON ({error.msg}). Correct the line, or copy the file again "
            "from the run."
        ) from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path}, line 1: holds {type(values).__name__}; it must hold one object, {{...}}.")
    return Record(values, path, text=text)
