"""`stalewise recipes`, and the option by which `train` takes one."""

from __future__ import annotations

from typing import Any

import typer

from stalewise.experiments.recipes import RECIPES, recipe

__all__ = ["recipes", "use_recipe"]


def recipes() -> None:
    """Print the named training settings, each with its source."""
    for entry in RECIPES.values():
        print(f"{entry.name}\n    {' '.join(f'--{_option(name, value)}' for name, value in entry.settings.items())}")
        print(f"    source: {entry.source}")


def use_recipe(context: typer.Context, name: str | None) -> str | None:
    """Make the settings of a recipe the defaults of a command's other options.

    Raises:
        ConfigError: where there is no such recipe.
    """
    if name is not None:
        settings = {key: _text(value) for key, value in recipe(name).settings.items()}
        context.default_map = {**(context.default_map or {}), **settings}
    return name


def _text(value: Any) -> Any:
    return ",".join(f"{entry:.6g}" for entry in value) if isinstance(value, tuple) else value


def _option(name: str, value: Any) -> str:
    key = name.replace("_", "-")
    if isinstance(value, bool):
        return key if value else f"no-{key}"
    return f"{key} {_text(value)}"
