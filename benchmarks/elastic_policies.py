"""Rules for elastic stages that were tried beside `protocol.elastic`, for `elastic_model.py` to compare."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from statistics import median_low

from stalewise.protocol.actions import Kind
from stalewise.protocol.elastic import Elastic, ElasticStage

__all__ = ["POLICIES"]


class _Variant(ElasticStage):
    """The chosen rule with its parts open to change."""

    def __init__(self, rule: Elastic, stage: int) -> None:
        super().__init__(rule, stage)
        self.stage, self.below = stage, rule.num_stages - 1 - stage
        self.deep, self.least = rule.bound[stage], rule.least_of(stage)

    @property
    def bound(self) -> int:
        return self.deep if self.slow_steps.slow else self.least

    def wants_forward_first(self) -> bool:
        return self.forwarded - self.received <= self.below

    def next_action(self, activation_ready: bool) -> Kind | None:
        may_forward = activation_ready and self.in_flight <= self.bound
        if may_forward and self.below and self.wants_forward_first():
            return Kind.FORWARD
        if may_forward and self.received == self.backwarded:
            return Kind.FORWARD
        return super().next_action(activation_ready=False)


class Greedy(_Variant):
    """Backward whatever can be backwarded, forward whatever can be forwarded, up to the bound."""

    @property
    def bound(self) -> int:
        return self.deep

    def wants_forward_first(self) -> bool:
        return False


class AlwaysDeep(Greedy):
    """Forward first while the next stage would starve, and the bound m_k always."""

    def wants_forward_first(self) -> bool:
        return self.forwarded - self.received <= self.below


class BackwardFirst(_Variant):
    """The bound as chosen, but backward always before forward."""

    def wants_forward_first(self) -> bool:
        return False


class Pull(_Variant):
    """Forward only while the next stage would starve, never because there is nothing else to do."""

    @property
    def bound(self) -> int:
        return self.deep

    def next_action(self, activation_ready: bool) -> Kind | None:
        return super().next_action(activation_ready and self.wants_forward_first())


class SingleStep(_Variant):
    """The bound for 64 updates after a single one that took more than 1.1 times the median of the 16 before it."""

    def __init__(self, rule: Elastic, stage: int) -> None:
        super().__init__(rule, stage)
        self._times: deque[int] = deque(maxlen=16)
        self._last, self._left = 0, 0

    @property
    def bound(self) -> int:
        return self.deep if self._left else self.least

    def did(self, kind: Kind, time_ns: int) -> None:
        super().did(kind, time_ns)
        if kind is not Kind.BACKWARD:
            return
        took, self._last = time_ns - self._last, time_ns
        self._left = max(self._left - 1, 0)
        if len(self._times) >= 4 and took > 1.1 * median_low(self._times):
            self._left = 64
        self._times.append(took)


def knows_next() -> Callable[[Elastic, int], ElasticStage]:
    """Starving is what the next stage itself says: no activation waits there. It costs a message per forward."""
    stages: dict[int, _Variant] = {}

    class KnowsNext(_Variant):
        def wants_forward_first(self) -> bool:
            return self.forwarded - stages[self.stage + 1].forwarded < 1

    def make(rule: Elastic, stage: int) -> ElasticStage:
        stages[stage] = KnowsNext(rule, stage)
        return stages[stage]

    return make


POLICIES: dict[str, Callable[[], Callable[[Elastic, int], ElasticStage]]] = {
    "elastic": lambda: ElasticStage,
    "greedy": lambda: Greedy,
    "always deep": lambda: AlwaysDeep,
    "backward first": lambda: BackwardFirst,
    "pull": lambda: Pull,
    "knows next": knows_next,
    "single step": lambda: SingleStep,
}
"""By name, a maker of makers: each run gets stages of its own."""
