"""What slow steps cost each method: slow-down against itself, absolute speed, the floor, and what the model predicts.

    python benchmarks/stragglers.py --out docs/results/stragglers.json
    python benchmarks/stragglers.py --only dsp "torch 1F1B" --rounds 1 --updates 20
    python docs/make_straggler_image.py docs/results/stragglers.json

In each step each stage is slow with probability 1/3, and then takes 20, 50, 100 or 150% longer (busy, not asleep);
`--spells` adds spells, where in each step with probability 2% a stage starts 3 steps at triple time. Which steps are
slow depends on (seed, stage, local update) alone, so all rows meet the same ones; see `straggler_rounds`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import machine, spread, table
from straggler_rounds import CALM, SPELLS, race, rows_of

LEGEND = """
slow-down: step time over that of the same row in the calm run of the same round; median (min .. max) over rounds.
floor: mean slow-down of the steps of all stages in the same windows, which no method avoids.
model: the slow-down that the analytic model gives for the very same slow steps, in points; torch's schedules have none.
staleness: realised, in batches; the mean over stages and updates.
Rows are ranked by samples/s: relative slow-down alone flatters the slowest method."""


def slow_downs(windows_s: Sequence[float], runs: Sequence[str], name: str) -> list[float]:
    """Of each round: the step time over that of the calm run of the same round, minus 1."""
    per_round = len(dict.fromkeys(runs))
    place = runs.index(name)
    return [windows_s[start + place] / windows_s[start] - 1 for start in range(0, len(runs), per_round)]


def print_results(results: dict[str, Any], batch_size: int) -> None:
    """A table per situation, and how far off the model is."""
    runs = results["runs"]
    errors: list[float] = []
    for name in dict.fromkeys(runs):
        of_name = [run for run, other in enumerate(runs) if other == name]
        speeds = {row["label"]: [batch_size / row["windows_s"][run] for run in of_name] for row in results["rows"]}
        of_torch = [statistics.median(speeds[row["label"]]) for row in results["rows"] if row["torch"]]
        best_torch = max(of_torch, default=0.0)
        lines = []
        for row in sorted(results["rows"], key=lambda row: -statistics.median(speeds[row["label"]])):
            own = speeds[row["label"]]
            line = [row["label"], spread(own, 0), f"{statistics.median(own) / best_torch:.2f}" if best_torch else "-"]
            if name != CALM:
                measured = slow_downs(row["windows_s"], runs, name)
                stale = [(row["staleness"] or [])[run] for run in of_name] if row["staleness"] else []
                line.append(f"{statistics.fmean(stale):.2f}" if stale else "-")
                line.append(spread([100 * value for value in measured], 1))
                line += _model_columns(row, runs, name, measured, errors)
            lines.append(line)
        head = ["row", "samples/s", "/ best torch"]
        if name == CALM:
            print("\ncalm")
        else:
            head += ["staleness", "slow-down %", "model %", "model - measured"]
            what = "spells of 3 steps at triple time" if name == SPELLS else f"slow steps take {name} longer"
            print(f"\n{what}; floor {100 * statistics.median(results['floors'][run] for run in of_name):.1f}%")
        print(table(head, lines))
    if errors:
        within = sum(abs(error) <= 5 for error in errors)
        print(
            f"\nthe model is within 5 points in {within} of {len(errors)} cases, at worst {max(errors, key=abs):+.1f}"
        )


def _model_columns(
    row: dict[str, Any], runs: Sequence[str], name: str, measured: Sequence[float], errors: list[float]
) -> list[str]:
    if row["model_s"] is None:
        return ["-", "-"]
    model = slow_downs(row["model_s"], runs, name)
    error = statistics.median(100 * (ours - theirs) for ours, theirs in zip(model, measured, strict=True))
    errors.append(error)
    return [f"{100 * statistics.median(model):.1f}", f"{error:+.1f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet20")
    parser.add_argument("--stages", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--slow", type=float, nargs="*", default=[20, 50, 100, 150], help="slow-downs in percent")
    parser.add_argument("--spells", action="store_true", help="also spells of 3 steps at triple time")
    parser.add_argument("--probability", type=float, default=1 / 3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--updates", type=int, default=40, help="timed per row, round and slow-down")
    parser.add_argument("--micro-batches", type=int, default=4)
    parser.add_argument("--split", choices=["stored", "recompute", "own"], default="own", help="see sides.Task")
    parser.add_argument("--only", nargs="+", default=[], metavar="TEXT", help="rows whose name contains one of these")
    parser.add_argument("--out", type=Path, help="also write the results as JSON")
    options = vars(parser.parse_args())
    out = options.pop("out")
    options["rows"] = [row.label for row in rows_of(options.pop("only"), options["stages"])]
    if not options["rows"]:
        known = ", ".join(row.label for row in rows_of([], options["stages"]))
        parser.error(f"no row is called so; there are {known}")
    options["situations"] = [CALM, *(f"{percent:g}%" for percent in options["slow"])]
    options["situations"] += [SPELLS] * options.pop("spells")
    options["settle"] = 4
    print(f"{machine()}; load {os.getloadavg()[0]:.1f} before the start")
    results = race(options)
    print(
        f"{options['model']}, batch {options['batch_size']}, K = {options['stages']}, a step is slow with probability "
        f"{options['probability']:.3g}, {options['rounds']} rounds of {options['updates']} updates: median (min .. max)"
    )
    print_results(results, options["batch_size"])
    print(f"load {os.getloadavg()[0]:.1f} at the end; much above {options['stages']} says that others worked too")
    print(LEGEND)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps({"machine": machine(), "options": options, **results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
