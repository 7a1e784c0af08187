"""The folder of a comparison: new, the same one again, or refused.

Runs of two comparisons must not mix in one table. The same one with more seeds is the same one: it goes on.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from stalewise.errors import ConfigError
from stalewise.experiments.run_lock import empty_folder, is_empty
from stalewise.experiments.run_writer import write_json

__all__ = ["open_comparison"]


def open_comparison(path: Path, wanted: dict[str, Any], *, overwrite: bool) -> None:
    """Make the folder, or find in it the same comparison; one of fewer seeds grows.

    Args:
        path: of the folder.
        wanted: what tells the comparison from others, as JSON values.
        overwrite: delete what is there of another one.

    Raises:
        ConfigError: where the folder holds something else, or cannot be written.
    """
    file = path / "comparison.json"
    if not is_empty(path):
        if not file.is_file():
            raise ConfigError(
                f"{path} holds something else than a comparison (it has no comparison.json); nothing there is touched. "
                "Choose another --out."
            )
        if not overwrite:
            found = _read(file)
            _check_same(file, found, wanted)
            if found == wanted:
                return
        else:
            empty_folder(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        write_json(file, wanted)
    except OSError as error:
        raise ConfigError(f"cannot write to {path}: {error.strerror}. Choose another --out.") from None


def _read(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{file} cannot be read ({error}), so it is not known what was compared there. Choose another --out, or "
            "give --overwrite to delete what is there."
        ) from None


def _check_same(file: Path, found: Any, wanted: dict[str, Any]) -> None:
    differences = list(_differences(found, wanted))
    if differences:
        raise ConfigError(
            f"{file.parent} holds another comparison: {'; '.join(differences)}. Runs of two must not mix in one table. "
            "Give the same options to go on with that one, choose another --out, or give --overwrite to delete it."
        )


def _differences(found: Any, wanted: Mapping[str, Any]) -> Iterator[str]:
    """What is not the same, in words."""
    found = found if isinstance(found, dict) else {}
    for name in wanted:
        before, after = found.get(name), wanted[name]
        if name in ("shared", "machine"):
            yield from _differences(before, after)
        elif name == "rows" and before != after:
            yield f"its rows are {_row_names(before)} and would be {_row_names(after)}"
        elif name == "seeds" and isinstance(before, int) and before < after:
            continue
        elif before != after:
            yield f"its {name.replace('_', ' ')} is {json.dumps(before)} and would be {json.dumps(after)}"


def _row_names(rows: Any) -> str:
    if not isinstance(rows, list):
        return "unknown"
    described = []
    for row in rows:
        if not isinstance(row, dict) or not isinstance(row.get("options", {}), dict):
            return "unknown"
        options = ", ".join(f"{name}={value}" for name, value in row.get("options", {}).items())
        described.append(f"{row.get('name')}{f' ({options})' if options else ''}")
    return ", ".join(described)
