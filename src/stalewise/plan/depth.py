"""How deep queues must be: the smallest staleness that loses next to nothing against queues without end.

    times of a calm step ─┐
    jitter of each stage ─┼─► the analytic model, setting by setting ─► the first within 2% of unbounded queues
    links                ─┘

With unbounded queues no stage ever waits for room, so the slowest one sets the pace by its mean step alone. Staleness
costs accuracy (docs/elastic.md), so the search begins with one batch of slack on every link, m_k = K-1-k, adds a
batch where that gains the most per batch of staleness, and in the end takes back what is not needed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stalewise.errors import PlanError
from stalewise.protocol.actions import Kind
from stalewise.protocol.program import Program
from stalewise.timing import Links, StepCosts, TimedProgram
from stalewise.timing.draws import Rows, varied

__all__ = ["WITHIN", "Depth", "Jitter", "choose_depth"]

WITHIN = 0.02
"""Part of the throughput of unbounded queues that a setting may lose."""

MOST_SLACK = 12
"""Of a link; deeper queues are stale beyond use."""

_UPDATES, _REPLICAS = 500, 6

Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Jitter:
    """How the steps of each stage vary.

    Args:
        factors: per stage, times of steps over a usual one.
        in_order: whether they are of one step after another, so that slow ones stay together; else they are drawn.
    """

    factors: tuple[tuple[float, ...], ...]
    in_order: bool = False

    def __post_init__(self) -> None:
        for stage, factors in enumerate(self.factors):
            if not factors or not all(np.isfinite(factor) and factor >= 0 for factor in factors):
                raise PlanError(
                    f"the jitter of stage {stage} is {factors[:4]}..; give the times of at least one step over a usual "
                    "one, such as (1.0, 1.2)."
                )

    @classmethod
    def of_times(cls, times: Sequence[Sequence[float]], *, in_order: bool = False) -> Jitter:
        """From times of steps per stage, in any unit, against their median."""
        factors = []
        for of_stage in times:
            usual = float(np.median(of_stage)) if len(of_stage) else 0.0
            factors.append(tuple(time / usual if usual else 1.0 for time in map(float, of_stage)))
        return cls(factors=tuple(factors), in_order=in_order)

    @property
    def spread(self) -> tuple[float, ...]:
        """Per stage, the standard deviation over the mean."""
        found = []
        for factors in self.factors:
            mean = float(np.mean(factors))
            found.append(float(np.std(factors)) / mean if mean else 0.0)
        return tuple(found)


@dataclass(frozen=True, kw_only=True)
class Depth:
    """A staleness that was chosen, and why.

    Args:
        staleness: m_k.
        ratio: its throughput over that of unbounded queues, by the model.
        tried: (staleness, ratio) of every setting that was looked at, in that order; the first is K-1-k.
        spread: of each stage's steps, as a part of their mean.
        within: the loss that was allowed.
    """

    staleness: tuple[int, ...]
    ratio: float
    tried: tuple[tuple[tuple[int, ...], float], ...]
    spread: tuple[float, ...]
    within: float = WITHIN

    @property
    def reached(self) -> bool:
        """Whether it keeps to the loss that was allowed; else it is the best of those tried."""
        return self.ratio >= 1 - self.within

    def why(self) -> str:
        """The reason in a sentence or two."""
        steps = ", ".join(f"{spread:.0%}" for spread in self.spread)
        goal = f"{1 - self.within:.0%} of the speed with unbounded queues"
        text = (
            f"staleness {_text(self.staleness)} chosen: steps vary by {steps} (standard deviation per stage), and it "
        )
        text += f"keeps {self.ratio:.1%}" if self.reached else f"keeps only {self.ratio:.1%}, the most of those tried,"
        text += f" of the speed with unbounded queues (at least {1 - self.within:.0%} wanted)"
        shallower = [each for each in self.tried if sum(each[0]) < sum(self.staleness)]
        if shallower:
            nearest, ratio = max(shallower, key=lambda each: each[1])
            text += f"; {_text(nearest)} would keep {ratio:.1%}"
        else:
            text += "; nothing shallower runs at full rate" if self.reached else f", short of {goal}"
        return text

    def as_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "staleness": list(self.staleness),
            "ratio": self.ratio,
            "within": self.within,
            "spread": list(self.spread),
            "tried": [{"staleness": list(staleness), "ratio": ratio} for staleness, ratio in self.tried],
            "why": self.why(),
        }


def choose_depth(
    program_of: Callable[[tuple[int, ...]], Program],
    times_ns: Mapping[Kind, Sequence[int]],
    jitter: Jitter,
    *,
    links: Links | None = None,
    within: float = WITHIN,
) -> Depth:
    """The smallest staleness, link by link, whose throughput is within a part of that of unbounded queues.

    The fixed setting is timed, also where staleness is a bound: an elastic stage is about as fast as its bound.

    Args:
        program_of: staleness -> the program, of as many stages as there are times.
        times_ns: of a usual step of each stage, per kind of action.
        jitter: of the stages.
        links: between them; None: messages take no time.
        within: the loss that is allowed.

    Returns:
        The choice; where no setting with `MOST_SLACK` on a link is enough, the best that was found.
    """
    num_stages = len(jitter.factors)
    model = _Model(program_of, times_ns, jitter, links or Links.equal(num_stages))
    slack = (1,) * (num_stages - 1)
    while model.ratio(slack) < 1 - within:
        wider = [_added(slack, link, 1) for link in range(num_stages - 1) if slack[link] < MOST_SLACK]
        if not wider:
            break
        slack = max(wider, key=lambda each: _gain(model, slack, each))
    for link in range(num_stages - 1):
        while slack[link] > 1 and model.ratio(narrower := _added(slack, link, -1)) >= 1 - within:
            slack = narrower
    if model.ratio(slack) < 1 - within:
        best = max(model.known.values())
        slack = min(
            (each for each, ratio in model.known.items() if ratio >= best - 1e-4), key=lambda each: sum(_depths(each))
        )
    return Depth(
        staleness=_depths(slack),
        ratio=model.ratio(slack),
        tried=tuple((_depths(each), ratio) for each, ratio in model.known.items()),
        spread=jitter.spread,
        within=within,
    )


class _Model:
    """Throughput of settings over that of unbounded queues; all of them meet the same steps."""

    def __init__(
        self,
        program_of: Callable[[tuple[int, ...]], Program],
        times_ns: Mapping[Kind, Sequence[int]],
        jitter: Jitter,
        links: Links,
    ) -> None:
        self.known: dict[tuple[int, ...], float] = {}
        self._program_of, self._times, self._links = program_of, times_ns, links
        longest = max(map(len, jitter.factors))
        self._factors = [np.resize(np.array(factors), longest).tolist() for factors in jitter.factors]
        self._jitter = jitter

    def ratio(self, slack: tuple[int, ...]) -> float:
        """1 for a setting that loses nothing."""
        if slack not in self.known:
            self.known[slack] = self._ratio(_depths(slack))
        return self.known[slack]

    def _ratio(self, staleness: tuple[int, ...]) -> float:
        program = self._program_of(staleness)
        calm = StepCosts.of_kinds(program, self._times)
        costs = varied(calm, program, self._factors)
        timed = TimedProgram(program, costs, self._links)
        rows = self._rows(timed.num_steps(_UPDATES))
        table = timed.run(_UPDATES, rows=rows)
        begin, end = table.window
        means = [
            of_stage.sum(axis=1)[drawn[begin + 1 : end + 1]].mean(axis=0)
            for of_stage, drawn in zip(costs.tables, rows, strict=True)
        ]
        carried = max((link.transfer_ns for link in (*self._links.activations, *self._links.gradients)), default=0)
        unbounded = np.maximum(np.max(means, axis=0), carried)
        return min(float(np.mean(unbounded / table.step_ns)), 1.0)

    def _rows(self, num_steps: int) -> Rows:
        """[stages, steps, replicas]; a stage's draws are the same for all settings."""
        longest = len(self._factors[0])
        if self._jitter.in_order:
            starts = np.linspace(0, longest, _REPLICAS, endpoint=False).astype(np.int32)
            one = (np.arange(num_steps)[:, None] + starts) % longest
            return np.stack([one] * len(self._factors)).astype(np.int32)
        drawn = [
            np.random.default_rng((0, stage)).integers(longest, size=(num_steps, _REPLICAS))
            for stage in range(len(self._factors))
        ]
        return np.stack(drawn).astype(np.int32)


def _gain(model: _Model, slack: tuple[int, ...], wider: tuple[int, ...]) -> tuple[float, int]:
    """Per batch of staleness that it adds; where nothing is gained, the cheapest."""
    added = sum(_depths(wider)) - sum(_depths(slack))
    return (round((model.ratio(wider) - model.ratio(slack)) / added, 6), -added)


def _added(slack: tuple[int, ...], link: int, count: int) -> tuple[int, ...]:
    return (*slack[:link], slack[link] + count, *slack[link + 1 :])


def _depths(slack: tuple[int, ...]) -> tuple[int, ...]:
    """m_k from the slack of the links."""
    return (*reversed(tuple(accumulate(reversed(slack)))), 0)


def _text(staleness: Sequence[int]) -> str:
    return f"({','.join(map(str, staleness))})"
