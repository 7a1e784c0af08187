"""Repeats an elastic run from its folder: its configuration, its cuts, and the order of each stage.

order/stage0.txt    a line per cycle (from drain to drain), a letter per choice; see `protocol.course`
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from stalewise.errors import ConfigError, ProgramError
from stalewise.experiments.config import TrainConfig
from stalewise.protocol.course import Orders, realised_staleness, streams_of
from stalewise.protocol.program import Program
from stalewise.protocol.validate import run_streams
from stalewise.report.record import read_json, read_text

__all__ = ["order_summary", "read_orders", "replayed_config", "write_orders"]


def write_orders(path: Path, orders: Orders) -> None:
    """Leave the order of each stage in a run folder; nothing where staleness is fixed."""
    if not orders:
        return
    folder = path / "order"
    folder.mkdir(exist_ok=True)
    for stage, cycles in enumerate(orders):
        (folder / f"stage{stage}.txt").write_text("".join(f"{letters}\n" for letters in cycles), encoding="ascii")


def read_orders(path: Path, program: Program) -> Orders:
    """The order of each stage of a run, held to the rules of its program.

    Raises:
        ConfigError: where the folder has none, or what it has breaks a rule.
    """
    orders = []
    for stage in range(program.num_stages):
        file = path / "order" / f"stage{stage}.txt"
        try:
            orders.append(tuple(file.read_text(encoding="ascii").split("\n")[:-1]))
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"{file} cannot be read ({error}); only a finished elastic run leaves an order."
            ) from None
    if len({len(cycles) for cycles in orders}) != 1:
        raise ConfigError(
            f"the orders in {path / 'order'} have different numbers of lines; copy them from the run again."
        )
    for cycle in range(len(orders[0])):
        num_batches = orders[0][cycle].count("F")
        try:
            violations = list(run_streams(program, streams_of(program, tuple(orders), cycle), num_batches))
        except ProgramError as error:
            raise ConfigError(
                f"line {cycle + 1} of the orders in {path / 'order'}: {error} Copy them from the run again."
            ) from None
        for violation in violations:
            raise ConfigError(
                f"line {cycle + 1} of the orders in {path / 'order'} breaks {violation} Copy them from the run again."
            )
    return tuple(orders)


def replayed_config(path: Path, *, engine: str, display: str) -> TrainConfig:
    """The configuration that repeats a run, with its cuts and its threads.

    Args:
        path: folder of the run.
        engine: on which to repeat it.
        display: see `TrainConfig`.

    Raises:
        ConfigError: where the folder is not that of a finished elastic run.
    """
    config = TrainConfig.read(path / "config.json")
    if config.build_method().elastic_rule is None:
        raise ConfigError(
            f"{path} is of a run with fixed staleness, whose numbers do not depend on timing. "
            "Train again with its command."
        )
    _check_exact(path)
    cuts = read_json(path / "partition.json", required=False).integers("cuts")
    threads = read_json(path / "environment.json", required=False).integer("threads_per_stage")
    if cuts is None or threads is None:
        raise ConfigError(f"{path} holds no finished run; give the folder of one that has ended.")
    return replace(
        config,
        partition=cuts,
        threads=threads,
        engine=engine,
        display=display,
        stragglers=(),
        replay=str(path.resolve()),
    )


def _check_exact(path: Path) -> None:
    """Refuse a run whose record does not repeat it, because it went on as another pipeline."""
    file = path / "resumed.jsonl"
    if file.is_file() and not all(map(_is_exact, read_text(file).splitlines())):
        raise ConfigError(
            f"{path} went on from a checkpoint otherwise than it was begun ({file} says how), so its record does not "
            "repeat it from the first batch on. Replay a run that was never resumed, or as it was."
        )


def _is_exact(line: str) -> bool:
    try:
        return json.loads(line).get("exact", True) is not False
    except (ValueError, AttributeError):
        return True


def order_summary(orders: Orders) -> dict[str, Any]:
    """Realised staleness for the summary: per stage the backwards by staleness, from 0 on, and their mean."""
    if not orders:
        return {}
    found = [[depth for letters in cycles for depth in realised_staleness(letters)] for cycles in orders]
    return {
        "staleness_counts": [_counts(depths) for depths in found],
        "staleness_mean": [sum(depths) / max(len(depths), 1) for depths in found],
    }


def _counts(depths: Iterable[int]) -> list[int]:
    depths = list(depths)
    return [depths.count(depth) for depth in range(max(depths, default=0) + 1)]
