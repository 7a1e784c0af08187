"""Elastic staleness against fixed settings in the engine: throughput over mean realised staleness, as it was measured.

    python benchmarks/elastic_engine.py --calm --out docs/results/elastic_calm.json
    python benchmarks/elastic_engine.py --out docs/results/elastic.json
    python benchmarks/elastic_engine.py --only spells --rounds 2 --updates 30
    python docs/make_elastic_image.py docs/results/elastic.json

Situations as in `elastic_model.py`: spells, where in each step with probability 2% a stage starts 3 steps at triple
time, and each stage slow in each step with probability 1/3 by 20, 50, 100 or 150% (busy, not asleep). All rows meet the
same slow steps; rounds meet different ones; see `straggler_rounds`.

"above the line" compares with the fixed settings at the same mean staleness, by linear interpolation between their
points of the same round; the interval is 95% over rounds. `--calm` injects nothing, and compares the bounds with
minimal DSP's throughput and with a mean staleness of K-1-k.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from common import machine, table
from numpy.typing import NDArray
from straggler_rounds import CALM, SPELLS, race, rows_of

from stalewise.protocol.elastic import Elastic
from stalewise.protocol.staleness import Staleness
from stalewise.timing.outcome import half_interval

SLOW = (20.0, 50.0, 100.0, 150.0)
NAMES = (SPELLS, *(f"{percent:g}%" for percent in SLOW))
SPEED_WITHIN, STALENESS_WITHIN = 0.98, 1.25
"""What a calm elastic run is held to."""

Floats = NDArray[np.float64]


def analyse(results: dict[str, Any], batch_size: int) -> list[dict[str, Any]]:
    """Per situation and row: mean throughput and staleness with their intervals, and the place above the line.

    Intervals are half of the 95% interval over rounds, None for fewer than two.
    """
    runs = results["runs"]
    found = []
    for name in dict.fromkeys(runs):
        of_name = [run for run, other in enumerate(runs) if other == name]
        speed = {row["label"]: batch_size / np.array(row["windows_s"])[of_name] for row in results["rows"]}
        stale = {row["label"]: np.array(row["staleness"])[of_name] for row in results["rows"]}
        line = [row["label"] for row in results["rows"] if not row["elastic"]]
        line.sort(key=lambda label: float(stale[label].mean()))
        for row in results["rows"]:
            label = row["label"]
            point: dict[str, Any] = {
                "situation": name,
                "label": label,
                "setting": row["setting"],
                "elastic": row["elastic"],
                "samples_per_s": float(speed[label].mean()),
                "samples_per_s_half": half_interval(speed[label]),
                "staleness": float(stale[label].mean()),
                "staleness_half": half_interval(stale[label]),
                "above_percent": None,
                "above_half": None,
                "above_of_rounds": [],
            }
            if row["elastic"] and line:
                at = _on_the_line(stale[label], [stale[other] for other in line], [speed[other] for other in line])
                above = 100 * (speed[label] / at - 1)
                point["above_percent"], point["above_half"] = float(above.mean()), half_interval(above)
                point["above_of_rounds"] = above.tolist()
            found.append(point)
    return found


def _on_the_line(stale: Floats, places: list[Floats], speeds: list[Floats]) -> Floats:
    """Throughput of the fixed settings at each round's staleness; beyond the ends that of the end."""
    return np.array(
        [
            np.interp(mean, [place[round_] for place in places], [speed[round_] for speed in speeds])
            for round_, mean in enumerate(stale)
        ]
    )


def print_line(points: list[dict[str, Any]]) -> None:
    """A table per situation, and a verdict per bound."""
    for name in dict.fromkeys(point["situation"] for point in points):
        here = [point for point in points if point["situation"] == name]
        rows = [
            [
                point["label"],
                _with(point["samples_per_s"], point["samples_per_s_half"], 0),
                _with(point["staleness"], point["staleness_half"], 2),
                "" if point["above_percent"] is None else f"{_with(point['above_percent'], point['above_half'], 2)} %",
            ]
            for point in here
        ]
        print(f"\n{name}")
        print(table(["row", "samples/s", "mean staleness", "above the line"], rows))
        for point in here:
            if point["above_percent"] is None:
                continue
            verdict = _place(point["above_percent"], point["above_half"])
            print(f"verdict {name}, bound {Staleness(point['setting'])}: {verdict}")
    print()
    for label in dict.fromkeys(point["label"] for point in points if point["elastic"]):
        above = np.array([value for point in points if point["label"] == label for value in point["above_of_rounds"]])
        mean, half = float(above.mean()), half_interval(above)
        print(f"all situations, {label}: {_with(mean, half, 2)} %, {_place(mean, half)}")


def _place(above: float, half: float | None) -> str:
    if half is None:
        return "not known: one round has no interval"
    if abs(above) <= half:
        return "within the interval of the line"
    return f"{'above' if above > 0 else 'below'} the line by more than the interval"


def print_calm(results: dict[str, Any], points: list[dict[str, Any]], batch_size: int) -> None:
    """Each bound against minimal DSP's throughput and against K-1-k."""
    minimal = _row_of(results, slack=2)
    calm_s = np.array(minimal["windows_s"])
    rows = []
    for point, row in zip(points, results["rows"], strict=True):
        ratio = calm_s / np.array(row["windows_s"])
        least = float(
            np.mean([Elastic(bound=Staleness(row["setting"])).least_of(k) for k in range(len(row["setting"]))])
        )
        line = [row["label"], _with(point["samples_per_s"], point["samples_per_s_half"], 0)]
        line += [
            _with(float(ratio.mean()), half_interval(ratio), 3),
            _with(point["staleness"], point["staleness_half"], 2),
        ]
        if row["elastic"]:
            line += [f"{point['staleness'] / least:.2f}", _verdict(float(ratio.mean()), point["staleness"] / least)]
        rows.append(line + [""] * (6 - len(line)))
    print("\ncalm")
    head = ["row", "samples/s", "/ dsp minimal", "mean staleness", "/ mean of K-1-k", "verdict"]
    print(table(head, rows))


def _row_of(results: dict[str, Any], slack: int) -> dict[str, Any]:
    for row in results["rows"]:
        stages = len(row["setting"])
        if not row["elastic"] and row["setting"] == [slack * (stages - 1 - stage) for stage in range(stages)]:
            return row
    raise SystemExit("minimal DSP is not among the rows; leave --rows out, or name it")


def _verdict(ratio: float, stale: float) -> str:
    fast = f"{'at least' if ratio >= SPEED_WITHIN else 'below'} {SPEED_WITHIN:g}"
    return f"speed {fast}, staleness {'at most' if stale <= STALENESS_WITHIN else 'above'} {STALENESS_WITHIN:g}"


def _with(mean: float, half: float | None, digits: int) -> str:
    return f"{mean:.{digits}f}" + ("" if half is None else f" +- {half:.{digits}f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calm", action="store_true", help="nothing is slow on purpose")
    parser.add_argument("--only", nargs="+", default=list(NAMES), choices=list(NAMES), help="situations")
    parser.add_argument("--model", default="resnet20")
    parser.add_argument("--stages", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--updates", type=int, default=64, help="timed per row, round and situation")
    parser.add_argument("--settle", type=int, default=16, help="updates of each run that are not timed")
    parser.add_argument("--rows", nargs="+", default=[], metavar="TEXT", help="whose name contains one of these")
    parser.add_argument("--out", type=Path, help="also write the results as JSON")
    options = vars(parser.parse_args())
    out, calm = options.pop("out"), options.pop("calm")
    options["situations"] = [CALM] if calm else options.pop("only")
    names = options["rows"] or ["stalewise dsp", "stalewise elastic"]
    options["rows"] = [
        row.label for row in rows_of(names, options["stages"]) if "stored" not in row.label and "(" in row.label
    ]
    # A stage that ran ahead while the pipeline filled has come back before anything is timed.
    options |= {"slow": SLOW, "probability": 1 / 3, "micro_batches": 1, "split": "own", "warm_up": 96}
    print(f"{machine()}; load {os.getloadavg()[0]:.1f} before the start")
    results = race(options)
    print(
        f"{options['model']}, batch {options['batch_size']}, K = {options['stages']}, {options['rounds']} rounds of "
        f"{options['updates']} updates: mean +- half of the 95% interval over rounds"
    )
    points = analyse(results, options["batch_size"])
    if calm:
        print_calm(results, points, options["batch_size"])
    else:
        print_line(points)
    print(f"load {os.getloadavg()[0]:.1f} at the end; much above {options['stages']} says that others worked too")
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        written = {"machine": machine(), "options": options, **results, "points": points}
        out.write_text(json.dumps(written, indent=1) + "\n")


if __name__ == "__main__":
    main()
