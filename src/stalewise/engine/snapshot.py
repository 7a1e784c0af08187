"""Everything that a stage is and holds between two local steps, as nested plain values with tensors in them.

    snapshot_stage         weights, buffers, gradients that accumulate, optimizer, scheduler, counters, stored inputs,
                           graphs that wait for their backward with the weights they name, synthesizer
    snapshot_interpreter   what came and was not used yet, what was made and not sent yet, losses nobody took yet

Snapshots refer to the stage's own tensors: they are to be copied before the next action. Restoring one gives a stage
that goes on bitwise as the first one would. Graphs are not kept as such: their forward runs once more on the stored
input, and what autograd saves is replaced by what it had saved before (`saved_weights`). A recompute that ran ahead of
its gradient (elastic stages) runs once more, with the buffers that it met.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from stalewise.engine.buffers import all_buffers, restore_buffers
from stalewise.engine.interpreter import Interpreter
from stalewise.engine.messages import Activation, Gradient
from stalewise.engine.stage import Stage, StoredInput
from stalewise.engine.state import load_optimizer_state, named_optimizer_state
from stalewise.errors import CheckpointError, ConfigError, ProgramError
from stalewise.protocol.actions import Kind
from stalewise.protocol.course import Course

__all__ = [
    "check_course",
    "check_stage",
    "restore_interpreter",
    "restore_stage",
    "snapshot_interpreter",
    "snapshot_stage",
    "stage_description",
]


def stage_description(stage: Stage) -> dict[str, Any]:
    """What must be equal where a snapshot is restored, as JSON values."""
    return {
        "layers": [
            f"{name}: {type(part).__name__}" for name, part in stage.module.named_modules() if not len(part._modules)
        ],
        "parameters": {name: list(value.shape) for name, value in stage.module.named_parameters()},
        "trainable": [name for name, value in stage.module.named_parameters() if value.requires_grad],
        "optimizer": _type_name(stage.optimizer),
        "lr_scheduler": _type_name(stage.lr_scheduler),
    }


def snapshot_stage(stage: Stage) -> dict[str, Any]:
    """A stage between two local steps; see the module.

    Raises:
        ConfigError: where it holds a graph that cannot be built again.
    """
    saved_weights = stage._saved_weights
    if saved_weights is None and stage._graphs.keys() - stage._buffers_before.keys():
        raise ConfigError(
            f"stage {stage.index} holds graphs of {len(stage._graphs)} batches that no backward of this program is "
            "known to use later; save after a drain."
        )
    persistent = set(stage.module.state_dict())
    return {
        "description": stage_description(stage),
        "model": stage.module.state_dict(),
        "buffers": {name: value for name, value in all_buffers(stage.module) if name not in persistent},
        "gradients": {name: value.grad for name, value in stage.module.named_parameters() if value.grad is not None},
        "optimizer": named_optimizer_state(stage),
        "lr_scheduler": None if stage.lr_scheduler is None else stage.lr_scheduler.state_dict(),
        "seed": stage.seed,
        "num_updates": stage.num_updates,
        "gradients_added": stage._gradients_added,
        "peak_stored_inputs": stage.peak_stored_inputs,
        "copies_inputs": stage._isolation.copies,
        "stored": [
            [*unit, stored.values, stored.structure, stored.target, stored.share]
            for unit, stored in stage._stored.items()
        ],
        "saved_weights": None if saved_weights is None else saved_weights.snapshot(),
        "graphs": [] if saved_weights is None else [[*unit, saved_weights.saved_in(unit)] for unit in stage._graphs],
        "recomputed": [[*unit, buffers] for unit, buffers in stage._buffers_before.items()],
        "synthesizer": None if stage.synthesizer is None else stage.synthesizer.snapshot(),
    }


def restore_stage(stage: Stage, snapshot: Mapping[str, Any]) -> None:
    """Bring a stage that has done nothing yet to where the snapshot was taken.

    Args:
        stage: built from the same layers and recipes.
        snapshot: of `snapshot_stage`, with its tensors on the stage's device; the stage keeps them.
    """
    _load_model(stage, snapshot["model"])
    load_optimizer_state(stage, snapshot["optimizer"])
    if stage.lr_scheduler is not None:
        stage.lr_scheduler.load_state_dict(snapshot["lr_scheduler"])
    parameters = dict(stage.module.named_parameters())
    for name, gradient in snapshot["gradients"].items():
        parameters[name].grad = gradient
    stage.seed = snapshot["seed"]
    stage.num_updates = snapshot["num_updates"]
    stage._gradients_added = snapshot["gradients_added"]
    stage.peak_stored_inputs = snapshot["peak_stored_inputs"]
    stage._isolation.copies = snapshot["copies_inputs"]
    for batch, micro_batch, values, structure, target, share in snapshot["stored"]:
        stage._stored[batch, micro_batch] = StoredInput(values, structure, target, share)
    if stage._saved_weights is not None:
        stage._saved_weights.restore(snapshot["saved_weights"])
        for batch, micro_batch, saved in snapshot["graphs"]:
            stage.rebuild_graph((batch, micro_batch), saved)
    restore_buffers(stage.module, snapshot["buffers"])
    for batch, micro_batch, buffers in snapshot["recomputed"]:
        restore_buffers(stage.module, buffers)
        # It leaves the buffers as they are in the snapshot. Autograd may have saved them: they are not written again.
        stage.recompute(batch, micro_batch)
    if stage.synthesizer is not None and snapshot["synthesizer"] is not None:
        stage.synthesizer.restore(snapshot["synthesizer"])


def check_stage(stage: Stage, snapshot: Mapping[str, Any]) -> None:
    """Make sure that a snapshot is of this stage.

    Raises:
        CheckpointError: naming the first difference; nothing was restored.
    """
    ours, theirs = stage_description(stage), snapshot["description"]
    for what, own in ours.items():
        other = theirs[what]
        if own == other:
            continue
        if isinstance(own, dict):
            names = [name for name in (*own, *other) if own.get(name) != other.get(name)]
            raise CheckpointError(
                f"it is of another model: {names[0]!r} of stage {stage.index} has shape "
                f"{other.get(names[0], 'no value')} in it and {own.get(names[0], 'no value')} here. Build the pipeline "
                "from the same model."
            )
        raise CheckpointError(
            f"it is of another run: {what.replace('_', ' ')} of stage {stage.index} is {other} in it and {own} here. "
            "Build the pipeline from the same model, optimizer and scheduler."
        )
    missing = [name for name in stage.module.state_dict() if name not in snapshot["model"]]
    if missing:
        raise CheckpointError(f"it is of another model: it has no value for {missing[0]!r} of stage {stage.index}.")


def check_course(course: Course, snapshot: Mapping[str, Any]) -> None:
    """Make sure that the record of an elastic stage can go on.

    Raises:
        CheckpointError: where it is to repeat another one.
    """
    try:
        course.check(snapshot)
    except ProgramError as error:
        raise CheckpointError(f"it is of another run: {error}") from None


def snapshot_interpreter(interpreter: Interpreter) -> dict[str, Any]:
    """What lies between the actions of a stage, and its counters."""
    interpreter.settle_losses()
    return {
        "batch": interpreter.batch,
        "bytes_sent": interpreter.bytes_sent,
        "time_ns": {kind.value: spent for kind, spent in interpreter.time_ns.items()},
        "inbox": [[*unit, message._asdict()] for unit, message in interpreter._inbox.items()],
        "outbox": [[*unit, message._asdict()] for unit, message in interpreter._outbox.items()],
        "gradients": [[*unit, message._asdict()] for unit, message in interpreter._gradients.items()],
        "input_gradients": [[*unit, m._asdict()] for unit, m in interpreter._input_gradients.items()],
        "to_predict": [[batch, message._asdict()] for batch, message in interpreter._to_predict.items()],
        "losses": [list(entry) for entry in interpreter._losses],
        "partial_losses": dict(interpreter._partial_losses),
        "losses_to_send": dict(interpreter._losses_to_send),
    }


def restore_interpreter(interpreter: Interpreter, snapshot: Mapping[str, Any]) -> None:
    """The inverse of `snapshot_interpreter`."""
    interpreter.batch = snapshot["batch"]
    interpreter.bytes_sent = snapshot["bytes_sent"]
    interpreter.time_ns.update({Kind(kind): spent for kind, spent in snapshot["time_ns"].items()})
    for own, name in ((interpreter._inbox, "inbox"), (interpreter._outbox, "outbox")):
        own.update({(batch, part): Activation(**value) for batch, part, value in snapshot[name]})
    for held, name in ((interpreter._gradients, "gradients"), (interpreter._input_gradients, "input_gradients")):
        held.update({(batch, part): Gradient(**value) for batch, part, value in snapshot[name]})
    interpreter._to_predict.update({batch: Activation(**value) for batch, value in snapshot["to_predict"]})
    interpreter._losses.extend((batch, loss) for batch, loss in snapshot["losses"])
    interpreter._partial_losses.update(snapshot["partial_losses"])
    interpreter._losses_to_send.update(snapshot["losses_to_send"])


def _load_model(stage: Stage, values: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, parameter in stage.module.named_parameters(remove_duplicate=False):
            parameter.copy_(values[name])
    names = [name for name, _ in all_buffers(stage.module) if name in values]
    restore_buffers(stage.module, {name: values[name].to(stage.device, copy=True) for name in names})


def _type_name(value: object) -> str | None:
    return None if value is None else type(value).__name__
