"""DSP: Diversely Stale Parameters.

Local step n of stage k (docs/methods.md), with j = n - m_k:

    RECV_A n   F n   SEND_A n   R j   RECV_G j   B j   SEND_G j   U

Forward and recompute use the weights of the moment; there is one copy of them. A stage with m_k = 0 has the graph
of its forward still at hand and does not recompute: with m = (0, .., 0) this is plain backpropagation.

Variants (ours, beyond the paper), on any staleness:

    activations="stored"   F keeps the graph and R falls away: a quarter of the work saved, m_k + 1 graphs held.
      weights="stashed"    B differentiates exactly what F computed; the weights of up to m_k versions are kept.
      weights="current"    B puts today's weights into yesterday's graph; one copy of the weights.
    activations=(.., ..)   one of the two for each stage; "auto" leaves it to a plan (`plan.planner`), which stores
                           where that makes a step shorter and the memory allows it.
    accumulate=M           one U per M batches, with the mean of their gradients.
    staleness="auto"       a plan chooses the smallest m that its measured jitter allows (`plan.depth`).
    elastic=True           m_k is a bound: a stage backwards as soon as it can, and runs ahead only while something is
                           slow (`protocol.elastic`). Its order depends on timing; it is recorded and can be replayed.

Source: Xu, Huo, Huang, On the Acceleration of Deep Learning Model Parallelism with Staleness, CVPR 2020,
arXiv:1909.02625 [S for the ideas, D for the order of the actions].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from stalewise.errors import ConfigError
from stalewise.methods.method import Activations, Method, check_activations, stale_slots
from stalewise.protocol.elastic import Elastic
from stalewise.protocol.policy import BackwardWeights, StagePolicy
from stalewise.protocol.program import StageProgram
from stalewise.protocol.staleness import LinkState, Staleness, whole_numbers

__all__ = ["DSP"]


@dataclass(frozen=True, init=False)
class DSP(Method):
    """Diversely Stale Parameters, DSP(p_0..p_{K-1}; m_0..m_{K-1}) in the paper's notation.

    Args:
        staleness: m_k, local steps between a batch's forward and its backward on stage k; or "auto", which leaves it
            to a plan from measured times (`Pipeline(partition="profile")`) and needs `num_stages`. Until then the
            method has the minimal staleness.
        queue: p_k, slack of the activation link k -> k+1 in batches. It labels how the slack of a link is split
            between its two directions; no engine blocks on it and no number depends on it. None: half of each
            link's slack, rounded up.
        activations: "recompute" (the paper's) or "stored", for all stages or one for each; or "auto".
        weights: which the backward of a stored graph uses, "stashed" or "current"; None: "stashed".
        accumulate: batches per update.
        elastic: whether staleness is a bound that is used only while something is slow; then m_k >= K-1-k.
        num_stages: K, for staleness="auto"; elsewhere the number of entries of staleness says it.

    Raises:
        ConfigError: where the two break the rules m_{K-1} = p_{K-1} = 0, m_k >= m_{k+1}, q_{k+1} >= 0.
    """

    name: ClassVar[str] = "dsp"

    queue: tuple[int, ...]
    activations: Activations | Literal["auto"] | tuple[Activations, ...]
    weights: BackwardWeights | None
    accumulate: int
    elastic: bool
    _staleness: Staleness
    _auto: bool

    def __init__(
        self,
        *,
        staleness: Sequence[int] | Literal["auto"],
        queue: Sequence[int] | None = None,
        activations: Activations | Literal["auto"] | Sequence[Activations] = "recompute",
        weights: BackwardWeights | None = None,
        accumulate: int = 1,
        elastic: bool = False,
        num_stages: int | None = None,
    ) -> None:
        depths = _provisional(num_stages, queue) if staleness == "auto" else _depths(staleness)
        if num_stages is not None and num_stages != len(depths):
            raise ConfigError(
                f"num_stages is {num_stages} and staleness {depths} has {len(depths)} entries; give one per stage, or "
                'staleness="auto".'
            )
        object.__setattr__(self, "_auto", staleness == "auto")
        if queue is None:
            queue = tuple((slack + 1) // 2 for slack in depths.slack)
        object.__setattr__(self, "_staleness", depths)
        object.__setattr__(self, "queue", _checked_queue(queue, depths))
        activations = _checked_activations(activations, depths)
        if weights is not None and activations == "recompute":
            raise ConfigError(
                f'weights is {weights!r} with activations="recompute"; a recompute always uses the current weights. '
                'Leave weights out, or give activations="stored".'
            )
        object.__setattr__(self, "activations", activations)
        object.__setattr__(self, "weights", weights or (None if activations == "recompute" else "stashed"))
        object.__setattr__(self, "accumulate", accumulate)
        object.__setattr__(self, "elastic", elastic)
        self._policy()
        if elastic is not False:
            _check_elastic(elastic, depths, accumulate)

    @classmethod
    def minimal(
        cls,
        num_stages: int,
        *,
        activations: Activations | Literal["auto"] | Sequence[Activations] = "recompute",
        weights: BackwardWeights | None = None,
        accumulate: int = 1,
        elastic: bool = False,
    ) -> DSP:
        """The least staleness that decouples every stage: p_k = 1, m_k = 2(K-1-k) [D].

        Args:
            num_stages: K >= 1.
            activations: see the class.
            weights: see the class.
            accumulate: see the class.
            elastic: see the class.
        """
        if isinstance(num_stages, bool) or not isinstance(num_stages, int) or num_stages < 1:
            raise ConfigError(f"num_stages is {num_stages!r}; a pipeline has at least 1 stage.")
        return cls(
            queue=(*[1] * (num_stages - 1), 0),
            staleness=[2 * (num_stages - 1 - stage) for stage in range(num_stages)],
            activations=activations,
            weights=weights,
            accumulate=accumulate,
            elastic=elastic,
        )

    @property
    def elastic_rule(self) -> Elastic | None:
        """How an elastic stage decides; None where m_k is fixed."""
        return Elastic(bound=self._staleness) if self.elastic else None

    @property
    def staleness(self) -> Staleness:
        """m_k per stage, in batches; the minimal one where a plan is yet to choose it."""
        return self._staleness

    @property
    def slack(self) -> tuple[int, ...]:
        """d_k = m_k - m_{k+1}: batches that stage k may run ahead of stage k+1; 0 for the last."""
        return self._staleness.slack

    @property
    def gradient_queue(self) -> tuple[int, ...]:
        """q_k, slack of the gradient link k -> k-1: q_{k+1} = m_k - m_{k+1} - p_k [D]; q_0 = 0."""
        return (0, *(slack - ahead for slack, ahead in zip(self.slack[:-1], self.queue[:-1], strict=True)))

    @property
    def links(self) -> tuple[LinkState, ...]:
        """What each link allows: locked, overlapped without slack, or decoupled."""
        return self._staleness.links

    def stage_program(self, stage: int) -> StageProgram:
        """The local step of stage `stage`."""
        lag = self._staleness[stage]
        if self.activations == "auto":
            raise ConfigError(
                'activations is "auto", which a plan decides for each stage from measured times and memory. Use '
                'Pipeline(partition="profile"), or give "recompute", "stored", or one of them for each stage.'
            )
        kept = self.activations if isinstance(self.activations, str) else self.activations[stage]
        recompute = lag > 0 and kept == "recompute"
        return StageProgram(stale_slots(stage, self.num_stages, lag=lag, recompute=recompute), self._policy())

    @property
    def is_decided(self) -> bool:
        """Whether it is known what every stage keeps: all but "auto"."""
        return self.activations != "auto"

    @property
    def knows_staleness(self) -> bool:
        """Whether staleness is given, or was chosen: all but "auto"."""
        return not self._auto

    def with_activations(self, activations: Activations | Sequence[Activations]) -> DSP:
        """The same with these activations."""
        return DSP(
            staleness="auto" if self._auto else self._staleness,
            queue=None if self._auto else self.queue,
            activations=activations,
            weights=self.weights if "stored" in activations or activations == "auto" else None,
            accumulate=self.accumulate,
            elastic=self.elastic,
            num_stages=self.num_stages,
        )

    def with_staleness(self, staleness: Sequence[int]) -> DSP:
        """The same with this staleness, and the queues that go with it."""
        return DSP(
            staleness=staleness,
            activations=self.activations,
            weights=self.weights,
            accumulate=self.accumulate,
            elastic=self.elastic,
        )

    def __repr__(self) -> str:
        variants = (
            "" if self.activations == "recompute" else f", activations={self.activations!r}, weights={self.weights!r}"
        )
        variants += "" if self.accumulate == 1 else f", accumulate={self.accumulate}"
        variants += ", elastic=True" if self.elastic else ""
        if self._auto:
            return f"DSP(staleness='auto', num_stages={self.num_stages}{variants})"
        return f"DSP(queue={self.queue}, staleness={self._staleness.values}{variants})"

    def _policy(self) -> StagePolicy:
        return StagePolicy(weights=self.weights or "stashed", accumulate=self.accumulate)


def _depths(staleness: Sequence[int]) -> Staleness:
    return staleness if isinstance(staleness, Staleness) else Staleness(staleness)


def _provisional(num_stages: int | None, queue: Sequence[int] | None) -> Staleness:
    """The staleness of a method until a plan has chosen one."""
    if num_stages is None:
        raise ConfigError('staleness is "auto" and num_stages is not given; say how many stages there are.')
    if queue is not None:
        raise ConfigError(
            f'queue is {queue!r} and staleness is "auto"; queues follow from the staleness that is chosen. Leave queue '
            "out, or give both."
        )
    return DSP.minimal(num_stages).staleness


def _check_elastic(elastic: object, staleness: Staleness, accumulate: int) -> None:
    if elastic is not True:
        raise ConfigError(f"elastic is {elastic!r}; it must be True or False.")
    least = Staleness(range(len(staleness) - 1, -1, -1))
    if any(bound < depth for bound, depth in zip(staleness, least, strict=True)):
        enough = tuple(map(max, staleness, least))
        raise ConfigError(
            f"staleness {staleness} as a bound is less than {least}, with which a calm pipeline is just full. Use "
            f"{enough} or more, or elastic=False."
        )
    if accumulate > 1:
        raise ConfigError(
            f"elastic is on and accumulate is {accumulate}; a stage decides after every update, and so needs one per "
            "batch. Use accumulate=1."
        )


def _checked_activations(
    activations: Activations | Literal["auto"] | Sequence[Activations], staleness: Staleness
) -> Activations | Literal["auto"] | tuple[Activations, ...]:
    """One for all stages where they are equal."""
    if activations == "auto" or activations == "recompute" or activations == "stored":
        return activations
    if isinstance(activations, str) or not isinstance(activations, (list, tuple)):
        raise ConfigError(
            f'activations is {activations!r}; it must be "recompute", "stored", "auto", or one of the first two for '
            "each stage."
        )
    each: tuple[Activations, ...] = tuple(activations)
    for entry in each:
        check_activations(entry)
    if len(each) != len(staleness):
        raise ConfigError(
            f"activations {each} has {len(each)} entries and staleness {staleness.values} has {len(staleness)}; give "
            "one of each per stage, or one for all."
        )
    return each[0] if len(set(each)) == 1 else each


def _checked_queue(queue: Sequence[int], staleness: Staleness) -> tuple[int, ...]:
    checked = whole_numbers("queue", queue)
    if len(checked) != len(staleness):
        raise ConfigError(
            f"queue {checked} has {len(checked)} entries and staleness {staleness.values} has {len(staleness)}; "
            "give one of each per stage."
        )
    if checked[-1] != 0:
        raise ConfigError(
            f"queue {checked} ends with {checked[-1]}; the last stage sends no activation, so its queue is 0. "
            f"Did you mean {tuple(map(min, checked, staleness.slack))}?"
        )
    for stage, (ahead, slack) in enumerate(zip(checked, staleness.slack, strict=True)):
        if ahead > slack:
            here, after = staleness[stage], staleness[stage + 1]
            enough = tuple(depth + (ahead - slack) * (k <= stage) for k, depth in enumerate(staleness))
            raise ConfigError(
                f"queue[{stage}] is {ahead}, more than the slack of link {stage} -> {stage + 1}, "
                f"staleness[{stage}] - staleness[{stage + 1}] = {here} - {after} = {slack}; the gradient queue "
                f"would be negative. Use queue[{stage}] <= {slack}, or staleness {enough}."
            )
    return checked
