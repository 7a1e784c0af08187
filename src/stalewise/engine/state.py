"""The state of a stage by parameter name, as copies on the CPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from stalewise.engine.stage import Stage
from stalewise.errors import ConfigError

__all__ = [
    "check_stage_state",
    "load_optimizer_state",
    "load_stage_state",
    "merge_optimizer_states",
    "named_optimizer_state",
    "optimizer_state",
    "stage_state",
]


def stage_state(stage: Stage) -> dict[str, Tensor]:
    """Parameters and persistent buffers of a stage, with the names of the unsplit model."""
    return {name: value.detach().to("cpu", copy=True) for name, value in stage.module.state_dict().items()}


def check_stage_state(stage: Stage, state: Mapping[str, Tensor]) -> None:
    """Make sure that the state of a whole model holds a stage's values.

    Raises:
        ConfigError: where a name is missing or a shape differs.
    """
    own = stage.module.state_dict()
    missing = [name for name in own if name not in state]
    if missing:
        raise ConfigError(
            f"the state has no value for {missing[0]!r}"
            + (f" and {len(missing) - 1} more" if missing[1:] else "")
            + f" of stage {stage.index}; it must hold every name of the unsplit model. Load a state_dict() of the "
            "same model."
        )
    for name, value in own.items():
        if state[name].shape != value.shape:
            raise ConfigError(
                f"{name!r} is of shape {tuple(value.shape)} in the model and {tuple(state[name].shape)} in the "
                "state; load a state of the same model."
            )


def load_stage_state(stage: Stage, state: Mapping[str, Tensor]) -> None:
    """Copy the values of a stage out of the state of the whole model.

    Raises:
        ConfigError: where a name is missing or a shape differs; nothing is copied then.
    """
    check_stage_state(stage, state)
    stage.lane.join()
    with torch.no_grad():
        for name, value in stage.module.state_dict().items():
            value.copy_(state[name])


def optimizer_state(stage: Stage) -> dict[str, Any]:
    """State and parameter groups of a stage's optimizer: the layout of torch's, with names for indices."""
    named = named_optimizer_state(stage)
    return {**named, "state": {name: _on_cpu(values) for name, values in named["state"].items()}}


def named_optimizer_state(stage: Stage) -> dict[str, Any]:
    """The same by reference, not copied."""
    if stage.optimizer is None:
        return {"state": {}, "param_groups": []}
    names = _names_by_index(stage, stage.optimizer)
    packed = stage.optimizer.state_dict()
    return {
        "state": {names[index]: values for index, values in packed["state"].items()},
        "param_groups": [
            {**group, "params": [names[index] for index in group["params"]]} for group in packed["param_groups"]
        ],
    }


def merge_optimizer_states(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The states of all stages as one."""
    return {
        "state": {name: values for state in states for name, values in state["state"].items()},
        "param_groups": [group for state in states for group in state["param_groups"]],
    }


def load_optimizer_state(stage: Stage, state: Mapping[str, Any]) -> None:
    """Load a stage's part, found by parameter name, of a whole optimizer state.

    Raises:
        ConfigError: where a parameter of the stage is in no group of the state.
    """
    if stage.optimizer is None:
        return
    if not isinstance(state, Mapping) or not {"state", "param_groups"} <= set(state):
        raise ConfigError(
            "the optimizer state has no entries 'state' and 'param_groups'; load what optimizer_state_dict() gave."
        )
    names = _names_by_index(stage, stage.optimizer)
    groups = {name: group for group in state["param_groups"] for name in group["params"]}
    packed = stage.optimizer.state_dict()
    for group in packed["param_groups"]:
        for index in group["params"]:
            if names[index] not in groups:
                raise ConfigError(
                    f"the optimizer state has no group with {names[index]!r} of stage {stage.index}; load an "
                    "optimizer_state_dict() of the same model."
                )
        source = groups[names[group["params"][0]]]
        group.update({key: value for key, value in source.items() if key not in ("params", "param_names")})
    packed["state"] = {index: dict(state["state"][name]) for index, name in names.items() if name in state["state"]}
    stage.optimizer.load_state_dict(packed)


def _names_by_index(stage: Stage, optimizer: Optimizer) -> dict[int, str]:
    """Names of the optimizer's parameters, by the index that its own state dict gives them."""
    names = {id(parameter): name for name, parameter in stage.module.named_parameters()}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return {index: names[id(parameter)] for index, parameter in enumerate(parameters)}


def _on_cpu(values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else value
        for key, value in values.items()
    }
