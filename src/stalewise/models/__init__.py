"""Models as sequences of layers: built-in CIFAR ResNets, and the user's own."""

from stalewise.models.registry import available_models, build_model
from stalewise.models.resnet import basic_resnet, preact_bottleneck_resnet

__all__ = ["available_models", "basic_resnet", "build_model", "preact_bottleneck_resnet"]
