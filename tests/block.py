"""A chain that is one layer: only plain `nn.Sequential`s are opened when a model is cut."""

from __future__ import annotations

from torch import nn

__all__ = ["Block"]


class Block(nn.Sequential):
    """Runs its layers one after another, and stays whole."""
