"""A model as a chain of layers, and its cut into stages.

Layers may be modules or factories (callables that build one). A factory is called only where its stage lives, so a
model may be larger than any one host. An `nn.Sequential` inside is a chain too, so its layers are layers of the model:

    Sequential(stem, Sequential(a, b), head)  ->  0: stem, 1.0: a, 1.1: b, 2: head
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

from torch import nn

from stalewise.errors import ConfigError, PlanError, StalewiseError

__all__ = ["Chain", "LayerSource"]

LayerSource = nn.Module | Callable[[], nn.Module]
"""A layer, or what builds it."""


class Chain:
    """The layers of a model in order, with the names that they have in the unsplit model.

    Args:
        model: an `nn.Sequential`, or a list of modules and factories that stands for `nn.Sequential(*list)`.

    Raises:
        ConfigError: where the model is neither.
    """

    def __init__(self, model: nn.Sequential | Sequence[LayerSource]) -> None:
        if isinstance(model, nn.Sequential):
            if type(model).forward is not nn.Sequential.forward:
                raise ConfigError(
                    f"model is a {type(model).__name__} with a forward of its own; only a chain that runs one layer "
                    "after another can be cut between them. Write what its forward does as layers of an nn.Sequential."
                )
            if any(getattr(model, kind) for kind in _HOOKS):
                raise ConfigError(
                    "the model has hooks of its own, which would not be called: its layers run in stages, never the "
                    "whole of it. Register them on its layers."
                )
            names = [name for name, _ in model.named_modules(remove_duplicate=False) if name and "." not in name]
            named: list[tuple[str, LayerSource]] = list(zip(names, model, strict=True))
        elif isinstance(model, nn.Module) or not isinstance(model, Sequence):
            raise ConfigError(
                f"model is a {type(model).__name__}; it must be an nn.Sequential or a list of modules, one after "
                "another, so that it can be cut between them. Write its forward as a chain of modules."
            )
        else:
            named = [(str(index), layer) for index, layer in enumerate(model)]
        for name, layer in named:
            if not isinstance(layer, nn.Module) and not callable(layer):
                raise ConfigError(
                    f"layer {name} of the model is a {type(layer).__name__}; each must be a module or a function "
                    "without arguments that builds one."
                )
        if not named:
            raise ConfigError("the model has no layers; give at least one.")
        for name, layer in named:
            if isinstance(layer, nn.Module) and any(
                nn.parameter.is_lazy(tensor) for tensor in (*layer.parameters(), *layer.buffers())
            ):
                raise ConfigError(
                    f"layer {name} ({type(layer).__name__}) is lazy, so the shapes of its weights are not known "
                    "yet and there is nothing to train. Run the model once on a batch before you build the pipeline."
                )
        opened = [inner for name, layer in named for inner in _opened(name, layer)]
        self.names = tuple(name for name, _ in opened)
        self.layers = tuple(layer for _, layer in opened)

    def __len__(self) -> int:
        return len(self.layers)

    def built(self) -> Chain:
        """The same chain with every factory called."""
        chain = object.__new__(Chain)
        chain.names = self.names
        chain.layers = tuple(_build_layer(name, source) for name, source in zip(self.names, self.layers, strict=True))
        return chain

    def describe(self) -> list[str]:
        """A line per layer that is equal wherever the same model was built: name, type, parameter shapes."""
        return [
            f"{name}:{type(layer).__name__}:"
            + ",".join(f"{key}{tuple(value.shape)}" for key, value in layer.state_dict().items())
            if isinstance(layer, nn.Module)
            else f"{name}:factory"
            for name, layer in zip(self.names, self.layers, strict=True)
        ]

    def build(self, cuts: Sequence[int], stage: int) -> nn.Sequential:
        """The layers of one stage as a module whose parameters have the names of the unsplit model.

        Args:
            cuts: indices of the first layer of stages 1 .. K-1.
            stage: which stage; factories of other stages are not called.
        """
        start, end = list(pairwise((0, *cuts, len(self))))[stage]
        module = nn.Sequential()
        for name, source in zip(self.names[start:end], self.layers[start:end], strict=True):
            *around, last = name.split(".")
            place = module
            for part in around:
                if part not in place._modules:
                    place.add_module(part, nn.Sequential())
                inner = place._modules[part]
                assert isinstance(inner, nn.Sequential)
                place = inner
            place.add_module(last, _build_layer(name, source))
        return module

    def check_nothing_shared(self, cuts: Sequence[int]) -> None:
        """Refuse parameters and buffers that two stages share.

        Raises:
            PlanError: naming both places.
        """
        owner: dict[int, tuple[int, str]] = {}
        for stage, (start, end) in enumerate(pairwise((0, *cuts, len(self)))):
            for layer_name, layer in zip(self.names[start:end], self.layers[start:end], strict=True):
                if not isinstance(layer, nn.Module):
                    continue
                for tensors in (layer.named_parameters, layer.named_buffers):
                    for name, tensor in tensors(remove_duplicate=False):
                        full_name = f"{layer_name}.{name}"
                        first_stage, first_name = owner.setdefault(id(tensor), (stage, full_name))
                        if first_stage != stage:
                            raise PlanError(
                                f"{first_name!r} (stage {first_stage}) and {full_name!r} (stage {stage}) are the "
                                "same tensor; a stage owns its weights, so tied ones must lie in one stage. Move the "
                                "cut so that both are on one side, or give one layer a copy of its own."
                            )


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def _opened(name: str, layer: LayerSource) -> Iterator[tuple[str, LayerSource]]:
    """The layers of a plain `nn.Sequential`, however deep; anything else as it is."""
    if (
        type(layer) is not nn.Sequential
        or not len(layer)
        or layer._parameters
        or layer._buffers
        or any(getattr(layer, kind) for kind in _HOOKS)
    ):
        yield name, layer
        return
    for inner_name, inner in layer._modules.items():
        assert inner is not None
        yield from _opened(f"{name}.{inner_name}", inner)


def _build_layer(name: str, source: LayerSource) -> nn.Module:
    try:
        layer = source if isinstance(source, nn.Module) else source()
    except StalewiseError:
        raise
    except Exception as error:
        raise ConfigError(
            f"the factory of layer {name} failed: {type(error).__name__}: {error}. It is called without arguments and "
            "must return a module; try the call alone."
        ) from error
    if not isinstance(layer, nn.Module):
        raise ConfigError(f"the factory of layer {name} returned a {type(layer).__name__}; it must return a module.")
    return layer
