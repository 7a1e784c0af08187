"""The cuts that methods share are those with which the worst-off method loses the least."""

from __future__ import annotations

from stalewise.experiments.cuts import common_cuts
from stalewise.plan.partition import LayerCost, partition


def layers(count: int) -> list[LayerCost]:
    return [LayerCost(forward_s=1.0, backward_s=2.0, parameters=1, name=str(at), type="L") for at in range(count)]


def test_the_worst_off_method_loses_the_least() -> None:
    """14 equal layers: (6,) costs PipeDream 24 instead of 21 (14%), (7,) costs DSP 28 instead of 24 (17%)."""
    dsp, pipedream = (partition(layers(14), recompute=recompute) for recompute in ([True, False], [False, False]))
    assert (dsp.cuts, dsp.predicted_step_s) == ((6,), 24.0)
    assert (pipedream.cuts, pipedream.predicted_step_s) == ((7,), 21.0)
    assert common_cuts({"pipedream": pipedream, "dsp": dsp}) == (6,)
    assert common_cuts({"pipedream": pipedream}) == (7,)


def test_of_equals_the_first_is_taken() -> None:
    plan = partition(layers(4), recompute=[False, False])
    assert common_cuts({"a": plan, "b": plan}) == (2,)
