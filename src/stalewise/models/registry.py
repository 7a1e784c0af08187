"""From the text that a user types to a model: `resnet20`, `preresnet164`, or one's own `module:function`.

    name                model
    resnet<6n+2>        basic ResNet, except that
    resnet164           and resnet1001 are the pre-activation bottleneck networks known by these names
    preresnet<9n+2>     pre-activation bottleneck ResNet
    vgg<depth>          VGG-11, 13, 16, 19 with BatchNorm
    wrn<6n+4>-<k>       wide ResNet, such as wrn28-10
    resnext<9n+2>-<C>x<d>d      such as resnext29-8x64d
    imagenet-resnet<depth>      the ImageNet ResNets of depth 18, 34, 50, 101, 152
    module:function     what `function` of `module` returns

Where 6n + 2 and 9n + 2 are both possible, as for 20 and 56, `resnet` is the basic one.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import os
import re
import sys
from collections.abc import Callable
from typing import Any

from torch import nn

from stalewise.errors import ConfigError, StalewiseError
from stalewise.models.imagenet_resnet import imagenet_resnet
from stalewise.models.resnet import basic_resnet, preact_bottleneck_resnet
from stalewise.models.resnext import resnext
from stalewise.models.vgg import vgg
from stalewise.models.wide_resnet import wide_resnet

__all__ = ["available_models", "build_model"]

_COMMON = (
    *(f"resnet{depth}" for depth in (8, 14, 20, 32, 44, 56, 98, 110, 164, 1001)),
    *(f"preresnet{depth}" for depth in (11, 29, 56, 110, 164, 1001)),
    *(f"vgg{depth}" for depth in (11, 13, 16, 19)),
    *("wrn16-4", "wrn28-10", "wrn40-4", "resnext29-8x64d", "resnext29-16x64d"),
    *(f"imagenet-resnet{depth}" for depth in (18, 34, 50, 101, 152)),
)
_BOTTLENECK_DEPTHS = (164, 1001)
# Four digits: above any depth that trains, and low enough that a slip of the hand does not fill the memory.
_NUMBER = "([1-9][0-9]{0,3})"
_RESNET = re.compile(f"(pre)?resnet{_NUMBER}")
_VGG = re.compile(f"vgg{_NUMBER}")
_WRN = re.compile(f"wrn{_NUMBER}-{_NUMBER}")
_RESNEXT = re.compile(f"resnext{_NUMBER}-{_NUMBER}x{_NUMBER}d")
_IMAGENET = re.compile(f"imagenet-resnet{_NUMBER}")


def available_models() -> list[str]:
    """Common model names, for help texts; other depths work as well, and so does `module:function`."""
    return list(_COMMON)


def build_model(name: str, *, num_classes: int, in_channels: int = 3) -> nn.Sequential | list[nn.Module]:
    """The model of that name, as the sequence of layers that a plan cuts into stages.

    For `module:function`, the current directory is put on `sys.path`, first unless it is there, and stays there,
    because worker processes import the same module again. What the function itself raises is the cause of the error.

    Args:
        name: as in the table of this module.
        num_classes: number of logits; passed to a user's function if it takes an argument of that name.
        in_channels: channels of the images; passed likewise.

    Returns:
        An `nn.Sequential`, or the list of modules that a user's function returned.

    Raises:
        ConfigError: where the name is unknown, the depth is impossible, or the user's module or function
            cannot be used.
    """
    for argument, value in (("num_classes", num_classes), ("in_channels", in_channels)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigError(f"{argument} is {value!r}; it is a count, so give an integer >= 1.")
    if ":" in name:
        return _build_users_model(name, {"num_classes": num_classes, "in_channels": in_channels})
    if match := _RESNET.fullmatch(name):
        depth = int(match[2])
        if match[1] or depth in _BOTTLENECK_DEPTHS:
            return preact_bottleneck_resnet(depth, num_classes=num_classes, in_channels=in_channels)
        return basic_resnet(depth, num_classes=num_classes, in_channels=in_channels)
    if match := _VGG.fullmatch(name):
        return vgg(int(match[1]), num_classes=num_classes, in_channels=in_channels)
    if match := _WRN.fullmatch(name):
        return wide_resnet(int(match[1]), int(match[2]), num_classes=num_classes, in_channels=in_channels)
    if match := _RESNEXT.fullmatch(name):
        depth, cardinality, width = map(int, match.groups())
        return resnext(
            depth, cardinality=cardinality, base_width=width, num_classes=num_classes, in_channels=in_channels
        )
    if match := _IMAGENET.fullmatch(name):
        return imagenet_resnet(int(match[1]), num_classes=num_classes, in_channels=in_channels)
    raise ConfigError(_unknown_model(name))


def _unknown_model(name: str) -> str:
    nearest = difflib.get_close_matches(name.lower(), _COMMON, n=1, cutoff=0.5)
    repair = f"Did you mean {nearest[0]!r}?" if nearest else f"Try one of {', '.join(_COMMON)}."
    return (
        f"there is no model named {name!r}; a model is resnet<6n+2>, preresnet<9n+2>, vgg<depth>, wrn<6n+4>-<k>, "
        f"resnext<9n+2>-<C>x<d>d, imagenet-resnet<depth>, or your own as module:function. {repair}"
    )


def _build_users_model(name: str, offered: dict[str, int]) -> nn.Sequential | list[nn.Module]:
    module_name, _, function_name = name.partition(":")
    if not (module_name and function_name.isidentifier()):
        raise ConfigError(
            f"model {name!r} is not of the form module:function. Write for example mymodels:build for the "
            "function build in mymodels.py."
        )
    function = _find_function(name, module_name, function_name)
    accepted = _accepted(name, function, offered)
    try:
        layers = function(**accepted)
    except StalewiseError:
        raise
    except (Exception, SystemExit) as error:
        raise ConfigError(
            f"{name} failed: {type(error).__name__}: {error}. It is called with the keywords {accepted}; try the call "
            "alone."
        ) from error
    if isinstance(layers, nn.Sequential):
        checked: nn.Sequential | list[nn.Module] = layers
    elif isinstance(layers, list | tuple):
        for index, layer in enumerate(layers):
            if not isinstance(layer, nn.Module):
                raise ConfigError(
                    f"entry {index} of what {name} returned is of type {type(layer).__name__}; every layer must be "
                    "a torch.nn.Module. Wrap functions in a module class."
                )
        checked = list(layers)
    else:
        raise ConfigError(
            f"{name} returned an object of type {type(layers).__name__}; a model is cut between its layers, so it "
            "must be an nn.Sequential or a list of nn.Module. Return the layers in the order in which they run."
        )
    if len(checked) == 0:
        raise ConfigError(f"{name} returned no layers; a model needs at least one. Return all its layers.")
    return checked


def _find_function(name: str, module_name: str, function_name: str) -> Callable[..., Any]:
    here = os.getcwd()
    if here not in sys.path:
        sys.path.insert(0, here)
    importlib.invalidate_caches()
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:
        # Whatever the file raises while it is imported (a script may even exit), the user needs its text.
        raise ConfigError(
            f"module {module_name!r} of model {name!r} cannot be imported: {type(error).__name__}: {error}. "
            f"A module must be on sys.path, or in the current directory {here}; check that "
            f"`python -c 'import {module_name}'` works there."
        ) from error
    try:
        function = getattr(module, function_name)
    except AttributeError:
        callables = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        nearest = difflib.get_close_matches(function_name, callables, n=1)
        raise ConfigError(
            f"module {module_name!r} ({module.__file__}) has no {function_name!r}; model {name!r} needs it. "
            + (f"Did you mean {module_name}:{nearest[0]}?" if nearest else f"It defines {callables or 'nothing'}.")
        ) from None
    if not callable(function):
        raise ConfigError(
            f"{name} is of type {type(function).__name__}, which cannot be called; name a function that returns "
            "the layers of the model."
        )
    return function  # type: ignore[no-any-return]


def _accepted(name: str, function: Callable[..., Any], offered: dict[str, int]) -> dict[str, int]:
    """Those of the `offered` keyword arguments that `function` takes."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:  # some callables written in C have no signature
        return {}
    by_keyword = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    takes_any = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters)
    names = {parameter.name for parameter in parameters if parameter.kind in by_keyword}
    accepted = {key: value for key, value in offered.items() if takes_any or key in names}
    optional = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    for parameter in parameters:
        required = parameter.default is inspect.Parameter.empty and parameter.kind not in optional
        if required and parameter.name not in accepted:
            raise ConfigError(
                f"{name} requires an argument {parameter.name!r}; a model function is called with the "
                f"keywords {' and '.join(offered)} only. Give {parameter.name!r} a default value."
            )
    return accepted
