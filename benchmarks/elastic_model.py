"""Elastic staleness against fixed settings in the analytic model: throughput over mean realised staleness.

    python benchmarks/elastic_model.py
    python benchmarks/elastic_model.py --policies elastic greedy "always deep" --only calm spells 100%
    python benchmarks/elastic_model.py --constants

K stages, forward = recompute = 1, backward = 2 (the last stage has no recompute), no link cost. Situations: calm;
jitter, where half of the steps take 6% longer and one in a hundred 40%;
spells, where in each step with probability 2% a stage starts 3 steps at triple time; and each stage slow in each step
with probability 1/3 by 20, 50, 100 or 150%. All rows meet the same slow steps. Throughput is in batches per calm step
of minimal DSP, staleness the mean over batches and stages.

"above the line" compares with the fixed settings at the same mean staleness, by linear interpolation between their
points, replica by replica; the interval is 95% over replicas.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

import numpy as np
from common import table
from elastic_policies import POLICIES
from numpy.typing import NDArray

from stalewise.methods import DSP
from stalewise.protocol.actions import Kind
from stalewise.protocol.elastic import Elastic, ElasticStage
from stalewise.protocol.staleness import Staleness
from stalewise.protocol.stragglers import Straggler, Stragglers
from stalewise.timing import StepCosts, simulate
from stalewise.timing.elastic import run_elastic
from stalewise.timing.outcome import half_interval
from stalewise.timing.slow_steps import replica_of

UNIT = 1000
SITUATIONS = {
    "calm": Stragglers(),
    "jitter": Stragglers(
        (Straggler(probability=0.5, factor=1.06, seed=0), Straggler(probability=0.01, factor=1.4, seed=1))
    ),
    "spells": Stragglers((Straggler(probability=0.02, factor=3.0, duration=3),)),
    **{
        f"{percent}%": Stragglers((Straggler(probability=1 / 3, factor=1 + percent / 100),))
        for percent in (20, 50, 100, 150)
    },
}
Floats = NDArray[np.float64]


def times(stages: int) -> dict[Kind, list[int]]:
    """Nanoseconds of each action."""
    return {Kind.FORWARD: [UNIT] * stages, Kind.RECOMPUTE: [UNIT] * stages, Kind.BACKWARD: [2 * UNIT] * stages}


def depths(stages: int) -> list[tuple[int, ...]]:
    """The fixed settings of three stages, and their like for other numbers: slack 1, 2, 3, 5 on every link."""
    return [tuple(slack * (stages - 1 - stage) for stage in range(stages)) for slack in (1, 2, 3, 5)]


def fixed(staleness: Sequence[int], rules: Stragglers, batches: int, replicas: int) -> Floats:
    """[replicas], batches per calm step."""
    program = DSP(staleness=staleness).program()
    costs = StepCosts.of_kinds(program, times(len(staleness)))
    found = simulate(program, costs, num_batches=batches, stragglers=rules, replicas=replicas)
    return np.asarray(4 * UNIT / found.timetable.step_ns, np.float64)


def elastic(
    rule: Elastic,
    rules: Stragglers,
    batches: int,
    replicas: int,
    policy: Callable[[], Callable[[Elastic, int], ElasticStage]] = POLICIES["elastic"],
) -> tuple[Floats, Floats]:
    """[replicas] batches per calm step, [replicas, stages] mean staleness."""
    runs = [
        run_elastic(
            rule,
            times(rule.num_stages),
            num_batches=batches,
            stragglers=replica_of(rules, replica),
            make_stage=policy(),
        )
        for replica in range(replicas)
    ]
    return np.array([4 * UNIT / run.step_ns for run in runs]), np.stack([run.mean_staleness for run in runs])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", type=int, default=3)
    parser.add_argument("--batches", type=int, default=1500)
    parser.add_argument("--replicas", type=int, default=16)
    parser.add_argument("--policies", nargs="+", default=["elastic"], choices=list(POLICIES))
    parser.add_argument("--only", nargs="+", default=list(SITUATIONS), choices=list(SITUATIONS))
    parser.add_argument("--also", nargs="+", default=[], metavar="M", help="more fixed settings, such as 4,1,0")
    parser.add_argument(
        "--constants", action="store_true", help="vary how slow a slow update is, and how long it counts"
    )
    options = parser.parse_args()
    settings = depths(options.stages)
    bounds = settings[1:]
    kinds: list[tuple[str, str, dict[str, float]]] = [(name, name, {}) for name in options.policies]
    if options.constants:
        kinds += [(f"slow_share {value}", "elastic", {"slow_share": value}) for value in (0.02, 0.1, 0.2)]
        kinds += [(f"memory {value}", "elastic", {"memory": value}) for value in (16, 32, 128, 256)]
    for situation in options.only:
        rules = SITUATIONS[situation]
        replicas = options.replicas if rules else 1
        line = [fixed(setting, rules, options.batches, replicas) for setting in settings]
        places = [float(np.mean(setting)) for setting in settings]
        rows = [
            ["fixed", str(Staleness(setting)), f"{speed.mean():.4f}", f"{place:.2f}", str(Staleness(setting))[1:-1], ""]
            for setting, speed, place in zip(settings, line, places, strict=True)
        ]
        for text in options.also:
            setting = tuple(map(int, text.split(",")))
            speed, place = fixed(setting, rules, options.batches, replicas), float(np.mean(setting))
            rows.append(["fixed", str(Staleness(setting)), f"{speed.mean():.4f}", f"{place:.2f}", text, ""])
        for title, name, constants in kinds:
            for bound in bounds:
                rule = Elastic(bound=Staleness(bound), **constants)  # type: ignore[arg-type]
                speed, stale = elastic(rule, rules, options.batches, replicas, POLICIES[name])
                means = stale.mean(axis=1)
                at = [np.interp(mean, places, [each[replica] for each in line]) for replica, mean in enumerate(means)]
                above = 100 * (speed / np.array(at) - 1)
                half = half_interval(above)
                rows.append(
                    [
                        title,
                        str(Staleness(bound)),
                        f"{speed.mean():.4f}",
                        f"{means.mean():.2f}",
                        ",".join(f"{value:.2f}" for value in stale.mean(axis=0)),
                        f"{above.mean():+.2f}%" + ("" if half is None else f" +- {half:.2f}"),
                    ]
                )
        print(f"{situation}, {options.stages} stages, {options.batches} batches, {replicas} replicas")
        print(table(["setting", "bound", "throughput", "staleness", "per stage", "above the line"], rows), end="\n\n")


if __name__ == "__main__":
    main()
