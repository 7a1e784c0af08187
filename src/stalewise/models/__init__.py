"""Models as sequences of layers: built-in networks for CIFAR and ImageNet, and the user's own."""

from stalewise.models.imagenet_resnet import imagenet_resnet
from stalewise.models.registry import available_models, build_model
from stalewise.models.resnet import basic_resnet, preact_bottleneck_resnet
from stalewise.models.resnext import resnext
from stalewise.models.vgg import vgg
from stalewise.models.wide_resnet import wide_resnet

__all__ = [
    "available_models",
    "basic_resnet",
    "build_model",
    "imagenet_resnet",
    "preact_bottleneck_resnet",
    "resnext",
    "vgg",
    "wide_resnet",
]
