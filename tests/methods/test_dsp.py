"""DSP as a value: what it takes, refuses and prints."""

from __future__ import annotations

import copy
import pickle
import re
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from stalewise.errors import ConfigError
from stalewise.methods import BP, DSP, Method
from stalewise.protocol.actions import Kind
from stalewise.protocol.staleness import LinkState, Staleness

VALID = st.lists(st.integers(0, 9), max_size=4).map(lambda m: (*sorted(m, reverse=True), 0))


@st.composite
def settings_of_dsp(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """A valid staleness and a valid queue for it."""
    staleness = draw(VALID)
    slack = [here - after for here, after in pairwise(staleness)]
    return staleness, (*(draw(st.integers(0, most)) for most in slack), 0)


@st.composite
def staleness_and_any_queue(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...]]:
    staleness = draw(VALID)
    size = len(staleness)
    return staleness, tuple(draw(st.lists(st.integers(0, 9), min_size=size, max_size=size)))


# --- what follows from p and m --------------------------------------------------------------------------------


@given(settings_of_dsp())
@settings(deadline=None, derandomize=True)
def test_queues_and_slack(setting: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    staleness, queue = setting
    dsp = DSP(staleness=staleness, queue=queue)
    assert (dsp.staleness, dsp.queue, dsp.num_stages) == (staleness, queue, len(staleness))
    assert len(dsp.gradient_queue) == len(dsp.slack) == len(staleness)
    assert dsp.gradient_queue[0] == 0
    assert dsp.slack[-1] == dsp.queue[-1] == 0
    assert min(dsp.gradient_queue) >= 0
    for stage in range(len(staleness) - 1):  # q_{k+1} = m_k - m_{k+1} - p_k, and d_k = p_k + q_{k+1}
        assert dsp.gradient_queue[stage + 1] == staleness[stage] - staleness[stage + 1] - queue[stage]
        assert dsp.slack[stage] == queue[stage] + dsp.gradient_queue[stage + 1]


@pytest.mark.parametrize(
    ("staleness", "queue", "gradient_queue"),
    [
        ((0,), (0,), (0,)),
        ((0, 0), (0, 0), (0, 0)),
        ((4, 2, 0), (1, 1, 0), (0, 1, 1)),
        ((6, 3, 0), (2, 2, 0), (0, 1, 1)),
        ((10, 5, 0), (3, 3, 0), (0, 2, 2)),
        ((5, 5, 4, 0), (0, 1, 2, 0), (0, 0, 0, 2)),
    ],
)
def test_the_default_queue_is_half_of_the_slack_rounded_up(
    staleness: tuple[int, ...], queue: tuple[int, ...], gradient_queue: tuple[int, ...]
) -> None:
    assert DSP(staleness=staleness).queue == queue
    assert DSP(staleness=staleness).gradient_queue == gradient_queue


@pytest.mark.parametrize(
    ("num_stages", "expected"),
    [
        (1, DSP(queue=(0,), staleness=(0,))),
        (2, DSP(queue=(1, 0), staleness=(2, 0))),
        (3, DSP(queue=(1, 1, 0), staleness=(4, 2, 0))),
        (4, DSP(queue=(1, 1, 1, 0), staleness=(6, 4, 2, 0))),
    ],
)
def test_minimal_is_the_least_staleness_that_decouples_every_link(num_stages: int, expected: DSP) -> None:
    assert DSP.minimal(num_stages) == expected
    assert DSP.minimal(num_stages).links == (LinkState.DECOUPLED,) * (num_stages - 1)
    assert DSP.minimal(num_stages).gradient_queue == (0, *[1] * (num_stages - 1))


@pytest.mark.parametrize("num_stages", [0, -1, True, 2.0, "3", None])
def test_minimal_wants_a_number_of_stages(num_stages: object) -> None:
    with pytest.raises(ConfigError, match=rf"num_stages is {num_stages!r}; a pipeline has at least 1 stage\."):
        DSP.minimal(num_stages)  # type: ignore[arg-type]


def test_link_states() -> None:
    assert DSP(staleness=(3, 3, 2, 0)).links == (LinkState.LOCKED, LinkState.OVERLAPPED, LinkState.DECOUPLED)


# --- errors ---------------------------------------------------------------------------------------------------


@given(staleness_and_any_queue())
@example(((1, 0), (9, 1)))
@settings(deadline=None, derandomize=True)
def test_exactly_the_valid_queues_are_accepted_and_what_an_error_suggests_is_accepted(
    setting: tuple[tuple[int, ...], tuple[int, ...]],
) -> None:
    staleness, queue = setting
    bounds = [*(here - after for here, after in pairwise(staleness)), 0]
    wrong = [stage for stage, bound in enumerate(bounds) if queue[stage] > bound]
    if not wrong:
        assert DSP(staleness=staleness, queue=queue).queue == queue
        return
    with pytest.raises(ConfigError) as caught:
        DSP(staleness=staleness, queue=queue)
    message = str(caught.value)
    if suggested := re.search(r"Did you mean (\(.*\))\?$", message):
        assert message.startswith(f"queue {queue} ends with {queue[-1]}; ")
        suggestion = tuple(int(entry) for entry in re.findall(r"\d+", suggested[1]))
        assert DSP(staleness=staleness, queue=suggestion).queue == suggestion
        return
    stage = wrong[0]
    assert message.startswith(f"queue[{stage}] is {queue[stage]}, more than the slack of link {stage} -> {stage + 1}")
    use = re.search(r"Use queue\[(\d+)\] <= (\d+)", message)
    assert use is not None
    assert (int(use[1]), int(use[2])) == (stage, bounds[stage])
    mended = list(staleness)  # the other repair mends this entry on its own, whether it gives an entry or all of them
    if entry := re.search(r"or staleness\[(\d+)\] >= (\d+)\.$", message):
        mended[int(entry[1])] = int(entry[2])
    elif entries := re.search(r"or staleness (\(.*\))\.$", message):
        mended = [int(number) for number in re.findall(r"\d+", entries[1])]
    else:
        return
    lower = [min(ahead, bound) for ahead, bound in zip(queue, bounds, strict=True)]
    lower[stage] = queue[stage]
    assert DSP(staleness=mended, queue=lower).queue == tuple(lower)


@pytest.mark.parametrize(
    ("staleness", "queue", "message"),
    [
        (
            (4, 2, 0),
            (1, 1, 1),
            (
                "queue (1, 1, 1) ends with 1; the last stage sends no activation, so its queue is 0. "
                "Did you mean (1, 1, 0)?"
            ),
        ),
        (
            (4, 2, 0),
            (1, 0),
            "queue (1, 0) has 2 entries and staleness (4, 2, 0) has 3; give one of each per stage.",
        ),
        ((4, 2, 0), (1, -1, 0), "queue[1] is -1; it counts batches, so it must be an integer >= 0."),
        ((4, 2, 0), (1, 0.5, 0), "queue[1] is 0.5; it counts batches, so it must be an integer >= 0."),
        ((4, 2, 0), (), "queue is empty; give one integer per stage, such as (4, 2, 0)."),
        ((4, 2, 0), 1, "queue is 1; it must be one integer per stage, such as (4, 2, 0)."),
        (
            (2, 4, 0),
            None,
            "staleness (2, 4, 0) grows from stage 0 to stage 1; it must not grow with depth. Did you mean (4, 2, 0)?",
        ),
        (None, None, "staleness is None; it must be one integer per stage, such as (4, 2, 0)."),
    ],
)
def test_the_error_names_the_entry_and_what_to_do(staleness: object, queue: object, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        DSP(staleness=staleness, queue=queue)  # type: ignore[arg-type]
    assert str(caught.value) == message


def test_a_queue_longer_than_the_slack_is_explained() -> None:
    with pytest.raises(ConfigError) as caught:
        DSP(staleness=(4, 2, 0), queue=(3, 1, 0))
    assert str(caught.value).startswith(
        "queue[0] is 3, more than the slack of link 0 -> 1, staleness[0] - staleness[1] = 4 - 2 = 2; the gradient "
        "queue would be negative. Use queue[0] <= 2, or staleness"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"activations": "kept"},
            (
                'activations is \'kept\'; it must be "recompute", "stored", "auto", or one of the first two for each '
                "stage."
            ),
        ),
        (
            {"weights": "current"},
            (
                "weights is 'current' with activations=\"recompute\"; a recompute always uses the current weights. "
                'Leave weights out, or give activations="stored".'
            ),
        ),
        ({"activations": "stored", "weights": "old"}, 'weights is \'old\'; it must be "stashed" or "current".'),
        ({"accumulate": 0}, "accumulate is 0; it must be a whole number of at least 1."),
        ({"accumulate": True}, "accumulate is True; it must be a whole number of at least 1."),
    ],
)
def test_variants_are_checked(options: dict[str, Any], message: str) -> None:
    for make in (lambda: DSP(staleness=(2, 0), **options), lambda: DSP.minimal(2, **options)):
        with pytest.raises(ConfigError) as caught:
            make()
        assert str(caught.value) == message


# --- a value --------------------------------------------------------------------------------------------------


def test_equality_and_hash_count_staleness_and_queue() -> None:
    minimal = DSP.minimal(3)
    assert DSP(staleness=[4, 2, 0]) == DSP(staleness=Staleness((4, 2, 0)), queue=(1, 1, 0)) == minimal
    assert hash(DSP(staleness=(4, 2, 0))) == hash(minimal)
    others: list[object] = [
        DSP(staleness=(4, 2, 0), queue=(2, 1, 0)),
        DSP(staleness=(5, 2, 0), queue=(1, 1, 0)),
        DSP.minimal(2),
        DSP.minimal(3, accumulate=2),
        DSP.minimal(3, activations="stored"),
        (4, 2, 0),
    ]
    assert all(other != minimal for other in others)
    assert DSP(staleness=(0, 0)) != BP(2)
    assert len({minimal, DSP(staleness=(4, 2, 0)), DSP.minimal(2)}) == 2


VARIANTS: list[dict[str, Any]] = [
    {},
    {"accumulate": 3},
    {"activations": "stored"},
    {"activations": "stored", "weights": "stashed", "accumulate": 2},
    {"activations": "stored", "weights": "current"},
]


@given(settings_of_dsp(), st.sampled_from(VARIANTS))
@settings(deadline=None, derandomize=True)
def test_repr_builds_an_equal_one(setting: tuple[tuple[int, ...], tuple[int, ...]], variant: dict[str, Any]) -> None:
    dsp = DSP(staleness=setting[0], queue=setting[1], **variant)
    assert eval(repr(dsp)) == dsp
    assert copy.deepcopy(dsp) == dsp
    assert pickle.loads(pickle.dumps(dsp)) == dsp


def test_stashed_is_what_stored_graphs_use_unless_told() -> None:
    stored = DSP.minimal(3, activations="stored")
    assert stored == DSP.minimal(3, activations="stored", weights="stashed")
    assert stored.weights == "stashed"
    assert DSP.minimal(3).weights is None
    assert stored != DSP.minimal(3, activations="stored", weights="current")


def test_repr() -> None:
    assert repr(DSP.minimal(3)) == "DSP(queue=(1, 1, 0), staleness=(4, 2, 0))"


def test_it_is_frozen_and_takes_names_only() -> None:
    dsp = DSP.minimal(3)
    with pytest.raises(AttributeError):
        dsp.queue = (0, 0, 0)  # type: ignore[misc]
    with pytest.raises(TypeError):
        DSP((1, 1, 0), (4, 2, 0))  # type: ignore[misc]


# --- the program ----------------------------------------------------------------------------------------------


def test_a_stage_recomputes_exactly_where_it_is_stale() -> None:
    program = DSP(staleness=(3, 1, 0, 0)).program()
    assert [stage.recomputes for stage in program.stages] == [True, True, False, False]
    assert program.staleness == (3, 1, 0, 0)
    stored = DSP(staleness=(3, 1, 0, 0), activations="stored").program()
    assert not any(stage.recomputes for stage in stored.stages)
    assert [stage.stores_graphs_over_updates for stage in stored.stages] == [True, True, False, False]
    assert not any(stage.stores_graphs_over_updates for stage in program.stages)
    for stage, kept in zip(program.stages, stored.stages, strict=True):
        assert [slot for slot in stage.slots if slot.kind is not Kind.RECOMPUTE] == list(kept.slots)


@given(VALID)
@settings(deadline=None, derandomize=True)
def test_the_program_does_not_depend_on_the_queue(staleness: tuple[int, ...]) -> None:
    none = DSP(staleness=staleness, queue=(0,) * len(staleness))
    assert none.program() == DSP(staleness=staleness).program()


@given(VALID)
@settings(deadline=None, derandomize=True)
def test_forward_slots_have_lag_0_and_backward_slots_that_of_their_stage(staleness: tuple[int, ...]) -> None:
    forward = {Kind.LOAD, Kind.RECEIVE_ACTIVATION, Kind.FORWARD, Kind.SEND_ACTIVATION}
    for stage, lag in zip(DSP(staleness=staleness).program().stages, staleness, strict=True):
        assert all(slot.lag == (0 if slot.kind in forward else lag) for slot in stage.slots)
        assert all(slot.micro_batch is None for slot in stage.slots)


def test_a_method_is_abstract_and_dsp_has_its_name() -> None:
    with pytest.raises(TypeError):
        Method()  # type: ignore[abstract]
    assert DSP.name == "dsp"
    assert isinstance(DSP.minimal(2), Method)
