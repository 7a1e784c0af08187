"""What the pass of one layer leaves for its backward.

    x ──► layer ──► y        kept: x?   what the formulas in between need   y?   and some of the weights

Whether y outlives the pass depends on the layer after too: a ReLU needs its output, a linear layer needs its input
but not its output. Some layers give a view of their input on, or work in place. So a chain is looked at as a whole,
from its end.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from stalewise.plan.storage import Storages, storages

__all__ = ["Ends", "LayerGraph", "ends_of_chain", "graph_of"]


@dataclass(frozen=True, slots=True)
class _Output:
    """One tensor of a layer's output.

    Args:
        new_bytes: of its storage; 0 where that is the input's, or was counted with another output.
        saved: whether the layer's own backward needs it.
        source: which tensor of the input it shares its storage with, or None.
    """

    new_bytes: int
    saved: bool
    source: int | None


@dataclass(frozen=True, kw_only=True)
class LayerGraph:
    """What one pass leaves.

    Args:
        graph_bytes: storages that its backward needs and those of its output, without its input's and its weights'.
        saved_weight_bytes: of the parameters that its backward needs.
        inputs: for each tensor of the input, bytes of its storage and whether its backward needs it.
        changes_input: whether it works in place on its input.
        outputs: none where the loss is a part of the pass, for then nothing comes after.
    """

    graph_bytes: int
    saved_weight_bytes: int
    inputs: tuple[tuple[int, bool], ...]
    changes_input: bool
    outputs: tuple[_Output, ...]


@dataclass(frozen=True, kw_only=True)
class Ends:
    """What becomes of the input and the output of a layer in its chain.

    Args:
        unsaved_output_bytes: of its output, what neither its own backward needs nor that of the layers after it.
        saved_input_bytes: of its input, what its backward needs, or that of layers after it to which it is passed on.
        changes_input: whether it, or a layer after it to which it is passed on, works in place on its input.
    """

    unsaved_output_bytes: int
    saved_input_bytes: int
    changes_input: bool


def graph_of(
    layer: nn.Module,
    *,
    saved: Iterable[Tensor],
    inputs: Sequence[Tensor],
    outputs: Sequence[Tensor],
    loss: Sequence[Tensor],
    elsewhere: Iterable[Tensor],
    changes_input: bool,
) -> LayerGraph:
    """What the pass that has just ended leaves.

    Args:
        layer: that was passed.
        saved: by autograd.
        inputs: of the layer.
        outputs: of the layer; none where they went into a loss.
        loss: what became of them there.
        elsewhere: tensors that are there anyway: buffers as they were before the pass, targets.
        changes_input: whether the pass did.
    """
    kept = storages(saved)
    given = [storages([tensor]) for tensor in inputs]
    known = storages([*inputs, *layer.parameters(), *layer.buffers(), *elsewhere])
    made = _without(storages([*outputs, *loss]), known)
    seen: Storages = {}
    described = []
    for tensor in outputs:
        own = storages([tensor])
        fresh = _without(_without(own, known), seen)
        seen.update(own)
        source = next((index for index, storage in enumerate(given) if own.keys() & storage.keys()), None)
        described.append(_Output(sum(fresh.values()), bool(own.keys() & kept.keys()), source))
    return LayerGraph(
        graph_bytes=sum((_without(kept, known) | made).values()),
        saved_weight_bytes=sum(
            weight.numel() * weight.element_size()
            for weight in layer.parameters()
            if storages([weight]).keys() & kept.keys()
        ),
        inputs=tuple((sum(storage.values()), bool(storage.keys() & kept.keys())) for storage in given),
        changes_input=changes_input,
        outputs=tuple(described),
    )


def ends_of_chain(graphs: Sequence[LayerGraph | None]) -> list[Ends | None]:
    """What becomes of every layer's input and output.

    Args:
        graphs: of the layers in order; before one that is unknown (None), every output counts as needed.
    """
    ends: list[Ends | None] = []
    needed: Sequence[bool] | None = ()
    changed_later = False
    for graph in reversed(graphs):
        if graph is None:
            ends.append(None)
            needed, changed_later = None, False
            continue
        outputs = list(zip(graph.outputs, [True] * len(graph.outputs) if needed is None else needed, strict=True))
        needed = [
            own or any(wanted and output.source == index for output, wanted in outputs)
            for index, (_, own) in enumerate(graph.inputs)
        ]
        passed_on = any(output.source is not None for output, _ in outputs)
        changed_later = graph.changes_input or (passed_on and changed_later)
        ends.append(
            Ends(
                unsaved_output_bytes=sum(out.new_bytes for out, wanted in outputs if not (out.saved or wanted)),
                saved_input_bytes=sum(size for (size, _), wanted in zip(graph.inputs, needed, strict=True) if wanted),
                changes_input=changed_later,
            )
        )
    return ends[::-1]


def _without(some: Storages, others: Storages) -> Storages:
    return {key: size for key, size in some.items() if key not in others}
