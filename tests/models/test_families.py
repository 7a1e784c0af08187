"""VGG, ResNeXt, wide and ImageNet ResNets: published sizes, where they may be cut, what a block does with its input."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import nn

from stalewise.errors import ConfigError
from stalewise.models import build_model, imagenet_resnet, resnext, vgg, wide_resnet
from stalewise.models.bottleneck import Bottleneck
from stalewise.models.imagenet_resnet import ImageNetBasicBlock
from stalewise.models.wide_resnet import PreactBasicBlock

SMALL: dict[str, Callable[[], nn.Sequential]] = {
    "vgg11": lambda: vgg(11, num_classes=10),
    "wrn10-2": lambda: wide_resnet(10, 2, num_classes=10),
    "resnext11-2x4d": lambda: resnext(11, cardinality=2, base_width=4, num_classes=10),
    "imagenet-resnet18": lambda: imagenet_resnet(18, num_classes=10),
    "imagenet-resnet50": lambda: imagenet_resnet(50, num_classes=10),
}
FAMILIES = pytest.mark.parametrize("make", SMALL.values(), ids=list(SMALL))


def parameters(name: str, num_classes: int) -> int:
    with torch.device("meta"):
        model = build_model(name, num_classes=num_classes)
    return sum(parameter.numel() for layer in model for parameter in layer.parameters())


@pytest.mark.parametrize(
    ("name", "num_classes", "millions"),
    [
        ("resnet110", 10, 1.7),  # He et al. 2015, table 6
        ("resnet164", 10, 1.7),  # He et al. 2016, table 4
        ("wrn28-10", 10, 36.5),  # Zagoruyko and Komodakis, table 4
        ("wrn40-4", 10, 8.9),
        ("wrn16-4", 10, 2.7),
        ("resnext29-8x64d", 10, 34.4),  # Xie et al., table 7
        ("resnext29-16x64d", 10, 68.1),
        ("vgg19", 10, 20.0),  # the CIFAR version; the paper's 144M are of ImageNet's three linear layers
    ],
)
def test_parameter_counts_are_the_published_ones(name: str, num_classes: int, millions: float) -> None:
    assert parameters(name, num_classes) / 1e6 == pytest.approx(millions, abs=0.06)


@pytest.mark.parametrize(
    ("name", "num_classes", "count"),
    [
        ("resnet98", 10, 1_533_530),
        ("wrn28-10", 10, 36_479_194),
        ("wrn28-10", 100, 36_536_884),
        ("resnext29-8x64d", 10, 34_426_698),
        ("vgg19", 10, 20_035_018),
        ("imagenet-resnet18", 1000, 11_689_512),
        ("imagenet-resnet34", 1000, 21_797_672),
        ("imagenet-resnet50", 1000, 25_557_032),
        ("imagenet-resnet101", 1000, 44_549_160),
        ("imagenet-resnet152", 1000, 60_192_808),
    ],
)
def test_exact_parameter_counts(name: str, num_classes: int, count: int) -> None:
    """ImageNet: the counts that torchvision documents. ResNet-98: ResNet-110 less twice three blocks of 97,216."""
    assert parameters(name, num_classes) == count


def test_depth_counts_the_layers_with_weights() -> None:
    for name, depth in (
        ("vgg19", 19 - 2),
        ("resnext29-8x64d", 29),
        ("imagenet-resnet34", 34),
        ("imagenet-resnet50", 50),
    ):
        with torch.device("meta"):
            model = nn.Sequential(*build_model(name, num_classes=10))
        layers = [
            name
            for name, module in model.named_modules()
            if isinstance(module, nn.Conv2d | nn.Linear) and "shortcut" not in name
        ]
        assert len(layers) == depth, "one linear layer stands for the three of VGG"
    with torch.device("meta"):
        wide = wide_resnet(28, 10, num_classes=10)
    assert sum(isinstance(module, nn.Conv2d) for module in wide.modules()) == 28, "shortcuts count in that paper"


@pytest.mark.parametrize(
    ("make", "side", "shapes"),
    [
        (SMALL["vgg11"], 32, [(64, 16), (128, 8), (256, 8), (256, 4), (512, 4), (512, 2), (512, 2), (512, 1)]),
        (lambda: wide_resnet(16, 2, num_classes=10), 32, [(16, 32), *2 * [(32, 32)], *2 * [(64, 16)], *2 * [(128, 8)]]),
        (SMALL["resnext11-2x4d"], 32, [(64, 32), (256, 32), (512, 16), (1024, 8)]),
        (SMALL["imagenet-resnet18"], 64, [*3 * [(64, 16)], *2 * [(128, 8)], *2 * [(256, 4)], *2 * [(512, 2)]]),
        (
            SMALL["imagenet-resnet50"],
            64,
            [(64, 16), *3 * [(256, 16)], *4 * [(512, 8)], *6 * [(1024, 4)], *3 * [(2048, 2)]],
        ),
    ],
)
def test_every_entry_has_the_shape_of_the_paper(
    make: Callable[[], nn.Sequential], side: int, shapes: list[tuple[int, int]]
) -> None:
    activation, seen = torch.randn(2, 3, side, side), []
    for entry in make():
        activation = entry(activation)
        seen.append(list(activation.shape))
    assert seen == [*([2, channels, size, size] for channels, size in shapes), [2, 10]]


@FAMILIES
@pytest.mark.parametrize("training", [True, False])
def test_no_entry_changes_its_input(make: Callable[[], nn.Sequential], training: bool) -> None:
    activation = torch.randn(2, 3, 32, 32)
    for entry in make().train(training):
        if training and activation.shape[-1] == 1 and activation.ndim == 4:
            activation = torch.randn(2, activation.shape[1], 2, 2)
        before = activation.clone()
        with torch.no_grad():
            output = entry(activation)
        assert torch.equal(activation, before)
        # Half of these values are negative, so that a ReLU in place on them would show.
        activation = torch.randn_like(output)


@FAMILIES
def test_gradients_reach_every_parameter(make: Callable[[], nn.Sequential]) -> None:
    torch.manual_seed(0)
    model = make()
    model(torch.randn(4, 3, 48, 48)).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


@FAMILIES
def test_initial_weights_are_those_of_he(make: Callable[[], nn.Sequential]) -> None:
    torch.manual_seed(0)
    for module in make().modules():
        if isinstance(module, nn.Conv2d) and module.weight.numel() > 4000:
            fan_out = module.out_channels * math.prod(module.kernel_size)
            assert module.weight.std().item() == pytest.approx(math.sqrt(2 / fan_out), rel=0.06)
        elif isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all()
            assert not module.bias.any()
        elif isinstance(module, nn.Linear):
            assert not module.bias.any()


def test_blocks_start_from_what_the_papers_say() -> None:
    """A silent residual leaves the shortcut: after the ReLU in ResNet and ResNeXt, bare in wide ResNets."""
    x = torch.randn(2, 8, 6, 6)
    plain, wide, grouped = ImageNetBasicBlock(8, 8), PreactBasicBlock(8, 8), Bottleneck(8, 4, 8, groups=2)
    for weight in (plain.norm2.weight, wide.conv2.weight, grouped.norm3.weight):
        nn.init.zeros_(weight)
    assert torch.equal(plain(x), x.relu())
    assert torch.equal(grouped(x), x.relu())
    assert torch.equal(wide(x), x)
    assert grouped.conv2.groups == 2
    shrinking = PreactBasicBlock(8, 16, stride=2).eval()
    nn.init.zeros_(shrinking.conv2.weight)
    assert shrinking.shortcut is not None
    assert torch.equal(shrinking(x), shrinking.shortcut(shrinking.norm1(x).relu()))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("vgg12", "depth 12; there are 11, 13"),
        ("wrn27-10", "nearest depth is 22 or 28"),
        ("wrn4-10", "nearest depth is 10"),
        ("resnext30-8x64d", "nearest depth is 29 or 38"),
        ("imagenet-resnet56", "there are 18, 34, 50, 101, 152"),
        ("wrn28x10", "Did you mean 'wrn28-10'"),
        ("resnext29-8x64", "Did you mean 'resnext29-8x64d'"),
    ],
)
def test_impossible_names_are_repaired(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_model(name, num_classes=10)
