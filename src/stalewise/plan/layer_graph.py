"""What the pass of one layer leaves for its backward.

    x ──► layer ──► y        kept: x?   what the formulas in between need   y?   and some of the weights

Whether y outlives the pass depends on the layer after too: a ReLU needs its output, a linear layer needs its input
but not its output. So a chain is looked at as a whole, from its end.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from stalewise.plan.storage import Storages, storages

__all__ = ["LayerGraph", "graph_of", "unsaved_outputs"]


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
        needs: for each tensor of the input, whether its backward needs it.
        outputs: none where the loss is a part of the pass, for then nothing comes after.
    """

    graph_bytes: int
    saved_weight_bytes: int
    needs: tuple[bool, ...]
    outputs: tuple[_Output, ...]


def graph_of(
    layer: nn.Module,
    *,
    saved: Iterable[Tensor],
    inputs: Sequence[Tensor],
    outputs: Sequence[Tensor],
    loss: Sequence[Tensor],
    elsewhere: Iterable[Tensor],
) -> LayerGraph:
    """What the pass that has just ended leaves.

    Args:
        layer: that was passed.
        saved: by autograd.
        inputs: of the layer.
        outputs: of the layer; none where they went into a loss.
        loss: what became of them there.
        elsewhere: tensors that are there anyway: buffers as they were before the pass, targets.
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
        needs=tuple(bool(storage.keys() & kept.keys()) for storage in given),
        outputs=tuple(described),
    )


def unsaved_outputs(graphs: Sequence[LayerGraph | None]) -> list[int | None]:
    """Of each layer's output, the bytes that neither its own backward needs nor that of the layers after it.

    Args:
        graphs: of the layers in order; after one that is unknown (None), everything counts as needed.
    """
    unsaved: list[int | None] = []
    needed: tuple[bool, ...] | None = ()
    for graph in reversed(graphs):
        if graph is None:
            unsaved.append(None)
            needed = None
            continue
        later = (True,) * len(graph.outputs) if needed is None else needed
        pairs = list(zip(graph.outputs, later, strict=True))
        unsaved.append(sum(output.new_bytes for output, wanted in pairs if not (output.saved or wanted)))
        needed = tuple(
            own or any(wanted and output.source == index for output, wanted in pairs)
            for index, own in enumerate(graph.needs)
        )
    return unsaved[::-1]


def _without(some: Storages, others: Storages) -> Storages:
    return {key: size for key, size in some.items() if key not in others}
