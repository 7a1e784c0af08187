"""The columns of a comparison's table: which there are, and how a cell reads.

The terminal, the Markdown file and the page show the same columns with the same words. A cell is the mean over seeds
and, where the runs differ, the range from the lowest to the highest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from stalewise.report.comparison_data import Comparison, Spread, TableRow
from stalewise.report.wording import NOT_RECORDED, count, duration, percent, size, span

__all__ = ["Cell", "Column", "columns", "percent_target", "sizes", "unit_of"]


@dataclass(frozen=True)
class Cell:
    """What stands in a cell.

    Args:
        text: the mean, with its unit.
        spread: the range over seeds; empty where there is none.
    """

    text: str
    spread: str = ""

    def __str__(self) -> str:
        return f"{self.text} ({self.spread})" if self.spread else self.text


@dataclass(frozen=True, kw_only=True)
class Column:
    """A column.

    Args:
        key: of the number in JSON and CSV.
        head: the heading.
        cell: what a row shows in it.
        importance: columns with a smaller number are kept longer where there is little room.
    """

    key: str
    head: str
    cell: Callable[[TableRow], Cell]
    importance: int


def columns(comparison: Comparison) -> tuple[Column, ...]:
    """All columns but the name, in their order; those that no row has a number for are left out."""
    target = comparison.target_accuracy
    every = (
        Column(key="test_accuracy", head="Test accuracy", importance=0, cell=lambda row: _accuracy(row.test_accuracy)),
        Column(key="best_accuracy", head="Best accuracy", importance=6, cell=lambda row: _accuracy(row.best_accuracy)),
        Column(key="samples_per_s", head="Samples/s", importance=1, cell=lambda row: _spread(row.samples_per_s, count)),
        Column(key="speed_up", head="Speed-up over bp", importance=2, cell=lambda row: _spread(row.speed_up, _times)),
        Column(
            key="slow_down",
            head="Slow-down" if comparison.floor is None else f"Slow-down (floor {percent(comparison.floor)})",
            importance=2,
            cell=lambda row: _share(row.slow_down),
        ),
        Column(key="slow_down_model", head="by the model", importance=3, cell=lambda row: _share(row.slow_down_model)),
        Column(key="epoch_s", head="Time per epoch", importance=5, cell=lambda row: _time(row.epoch_s)),
        Column(
            key="target_s",
            head=f"Time to {percent_target(target)}",
            importance=4,
            cell=lambda row: _target(row),
        ),
        Column(key="memory_total", head="Peak memory", importance=3, cell=lambda row: _spread(row.memory_total, size)),
        Column(key="memory", head="per stage", importance=10, cell=_memory),
        Column(key="memory_predicted", head="predicted", importance=11, cell=_predicted),
        Column(key="resident", head="Resident per process", importance=12, cell=_resident),
        Column(key="utilisation", head="Utilisation per stage", importance=7, cell=_utilisation),
        Column(key="staleness_first", head="Staleness of stage 0", importance=8, cell=_staleness_first),
        Column(key="staleness_all", head="of all stages", importance=13, cell=_staleness_all),
        Column(key="gradient_difference", head="Gradient difference", importance=9, cell=_difference),
        Column(
            key="bytes_per_batch",
            head="Sent per batch",
            importance=14,
            cell=lambda row: _spread(row.bytes_per_batch, size),
        ),
    )
    return tuple(column for column in every if any(column.cell(row).text != NOT_RECORDED for row in comparison.rows))


def percent_target(target: float | None) -> str:
    """0.92 as 92%, 0.925 as 92.5%."""
    return "target" if target is None else f"{100 * target:.6g}%"


def sizes(values: Sequence[float | None]) -> str:
    """Sizes of stages in the unit of the largest: 81.2 / 40.1 / 20.3 MiB."""
    known = [value for value in values if value is not None]
    if not known:
        return NOT_RECORDED
    unit, scale = unit_of(max(known))
    return f"{_joined([None if value is None else f'{value / scale:.3g}' for value in values])} {unit}"


def unit_of(num_bytes: float) -> tuple[str, int]:
    """The unit for a size, and its bytes."""
    units = (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10))
    return next(((unit, scale) for unit, scale in units if num_bytes >= scale), ("B", 1))


def _spread(value: Spread | None, text: Callable[[float], str]) -> Cell:
    if value is None:
        return Cell(NOT_RECORDED)
    low, high = text(value.low), text(value.high)
    if low == high:
        return Cell(text(value.mean))
    unit = high.partition(" ")[2]
    if unit and low.partition(" ")[2] == unit:
        low = low.partition(" ")[0]
    for sign in ("%", "×"):
        if high.endswith(sign):
            low = low.removesuffix(sign)
    return Cell(text(value.mean), f"{low}–{high}")


def _accuracy(value: Spread | None) -> Cell:
    return _spread(value, lambda fraction: percent(fraction, 2))


def _share(value: Spread | None) -> Cell:
    return _spread(value, percent)


def _times(ratio: float) -> str:
    return f"{ratio:.2f}×"


def _time(value: Spread | None) -> Cell:
    if value is None:
        return Cell(NOT_RECORDED)
    same = duration(value.low) == duration(value.high)
    return Cell(duration(value.mean), "" if same else span(value.low, value.high).replace(" to ", "–"))


def _target(row: TableRow) -> Cell:
    if row.target_s is None:
        return Cell("not reached" if row.done else NOT_RECORDED)
    cell = _time(row.target_s)
    if row.target_reached == row.done:
        return cell
    return Cell(cell.text, f"{row.target_reached} of {row.done} runs")


def _memory(row: TableRow) -> Cell:
    totals = [stage.measured.get("total") for stage in row.memory]
    return Cell(sizes([None if total is None else total.mean for total in totals]))


def _predicted(row: TableRow) -> Cell:
    return Cell(sizes([stage.predicted.get("total") for stage in row.memory]))


def _resident(row: TableRow) -> Cell:
    known = [stage.resident.mean for stage in row.memory if stage.resident is not None]
    return Cell(sizes(known))


def _utilisation(row: TableRow) -> Cell:
    if not any(row.utilisation):
        return Cell(NOT_RECORDED)
    shares = [None if stage is None else f"{100 * stage.mean:.0f}" for stage in row.utilisation]
    return Cell(f"{_joined(shares)}%")


def _staleness_first(row: TableRow) -> Cell:
    if not row.staleness_mean or row.staleness_mean[0] is None:
        return Cell(NOT_RECORDED)
    return _staleness(row.staleness_mean[0], row.staleness_max[0])


def _staleness_all(row: TableRow) -> Cell:
    known = [value for value in row.staleness_max if value is not None]
    return _staleness(row.realised_mean, max(known, default=None))


def _staleness(mean: Spread | None, largest: int | None) -> Cell:
    if mean is None or largest is None:
        return Cell(NOT_RECORDED)
    value = count(mean.mean) if mean.mean.is_integer() else f"{mean.mean:.2f}"
    return Cell(value, f"at most {largest}" if largest else "")


def _difference(row: TableRow) -> Cell:
    if not any(row.gradient_difference):
        return Cell(NOT_RECORDED)
    return Cell(_joined([None if stage is None else f"{stage.mean:.2g}" for stage in row.gradient_difference]))


def _joined(values: Sequence[str | None]) -> str:
    return " / ".join(NOT_RECORDED if value is None else value for value in values)
