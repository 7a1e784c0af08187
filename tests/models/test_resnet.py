"""Residual networks: published sizes, where they may be cut, and what a block does with its input."""

import math
import pickle

import pytest
import torch
from torch import nn

from stalewise.errors import ConfigError
from stalewise.models import basic_resnet, preact_bottleneck_resnet
from stalewise.models.resnet import BasicBlock, Head, PadShortcut, PreactBottleneck, PreactHead, Stem

FAMILIES = pytest.mark.parametrize(
    "make", [lambda: basic_resnet(14, num_classes=10), lambda: preact_bottleneck_resnet(20, num_classes=10)]
)


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("depth", "count"), [(20, 269_722), (32, 464_154), (44, 658_586), (56, 853_018), (110, 1_727_962)]
)
def test_basic_parameter_counts_are_the_published_ones(depth: int, count: int) -> None:
    """He et al. 2015, table 6: 0.27M, 0.46M, 0.66M, 0.85M, 1.7M."""
    assert parameters(basic_resnet(depth, num_classes=10)) == count


@pytest.mark.parametrize(("depth", "count"), [(164, 1_703_258), (1001, 10_327_706)])
def test_bottleneck_parameter_counts_are_the_published_ones(depth: int, count: int) -> None:
    """He et al. 2016, table 4: 1.7M and 10.2M; these counts are those of the authors' code."""
    assert parameters(preact_bottleneck_resnet(depth, num_classes=10)) == count


@pytest.mark.parametrize(
    ("model", "blocks", "shapes"),
    [
        (lambda: basic_resnet(20, num_classes=7), 3, [(16, 32), (32, 16), (64, 8)]),
        (lambda: preact_bottleneck_resnet(29, num_classes=7), 3, [(64, 32), (128, 16), (256, 8)]),
    ],
)
def test_every_entry_has_the_shape_of_the_paper(model, blocks: int, shapes: list[tuple[int, int]]) -> None:
    expected = [[2, 16, 32, 32]]
    expected += [[2, channels, side, side] for channels, side in shapes for _ in range(blocks)]
    expected += [[2, 7]]
    activation, seen = torch.randn(2, 3, 32, 32), []
    for entry in model():
        activation = entry(activation)
        seen.append(list(activation.shape))
    assert seen == expected


def test_depth_counts_the_layers_with_weights() -> None:
    for depth, make in ((32, basic_resnet), (29, preact_bottleneck_resnet)):
        model = make(depth, num_classes=10)
        layers = [
            module
            for name, module in model.named_modules()
            if isinstance(module, nn.Conv2d | nn.Linear) and "shortcut" not in name
        ]
        assert len(layers) == depth


def test_the_deepest_network_runs() -> None:
    torch.manual_seed(0)
    model = preact_bottleneck_resnet(1001, num_classes=10)
    with torch.no_grad():
        logits = model(torch.randn(2, 3, 16, 16))
    assert logits.shape == (2, 10)
    assert logits.isfinite().all()


def test_other_channels_and_image_sizes() -> None:
    for model in (
        basic_resnet(8, num_classes=3, in_channels=1),
        preact_bottleneck_resnet(11, num_classes=3, in_channels=1),
    ):
        assert model(torch.randn(2, 1, 20, 28)).shape == (2, 3)


@FAMILIES
@pytest.mark.parametrize("training", [True, False])
def test_no_entry_changes_its_input(make, training: bool) -> None:
    activation = torch.randn(2, 3, 32, 32)
    for entry in make().train(training):
        before = activation.clone()
        with torch.no_grad():
            output = entry(activation)
        assert torch.equal(activation, before)
        # Half of these values are negative, so that a ReLU in place on them would show.
        activation = torch.randn_like(output)


@FAMILIES
def test_gradients_reach_every_parameter_and_the_images(make) -> None:
    torch.manual_seed(0)
    model = make()
    images = torch.randn(4, 3, 32, 32, requires_grad=True)
    model(images).square().sum().backward()
    assert images.grad is not None
    assert images.grad.abs().sum() > 0
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_basic_block_adds_before_its_last_relu() -> None:
    block = BasicBlock(4, 4)
    nn.init.zeros_(block.norm2.weight)
    x = torch.randn(2, 4, 5, 5)
    assert torch.equal(block(x), x.relu())


def test_preactivation_block_leaves_the_sum_alone() -> None:
    block = PreactBottleneck(8, 8)
    nn.init.zeros_(block.conv3.weight)
    x = torch.randn(2, 8, 5, 5)
    assert torch.equal(block(x), x)


def test_preactivation_shortcut_starts_from_the_activation() -> None:
    block = PreactBottleneck(8, 16, stride=2).eval()
    nn.init.zeros_(block.conv3.weight)
    x = torch.randn(2, 8, 6, 6)
    assert block.shortcut is not None
    assert torch.equal(block(x), block.shortcut(block.norm1(x).relu()))


def test_pad_shortcut_keeps_every_second_pixel_and_adds_zeros() -> None:
    x = torch.arange(2 * 4 * 4, dtype=torch.float32).view(1, 2, 4, 4)
    output = PadShortcut(2, 4, stride=2)(x)
    assert torch.equal(output[:, 1:3], x[:, :, ::2, ::2])
    assert not output[:, [0, 3]].any()
    assert parameters(PadShortcut(2, 4, stride=2)) == 0


@FAMILIES
def test_initial_weights_are_those_of_the_authors(make) -> None:
    torch.manual_seed(0)
    model = make()
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.weight.numel() > 4000:
            fan_out = module.out_channels * math.prod(module.kernel_size)
            assert module.weight.std().item() == pytest.approx(math.sqrt(2 / fan_out), rel=0.06)
            assert module.weight.mean().item() == pytest.approx(0, abs=0.1 * math.sqrt(2 / fan_out))
        elif isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all()
            assert not module.bias.any()
        elif isinstance(module, nn.Linear):
            assert not module.bias.any()
    torch.manual_seed(0)
    again = make()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


@FAMILIES
def test_entries_are_named_classes_that_pickle(make) -> None:
    model = make()
    assert {type(entry) for entry in model} <= {Stem, nn.Conv2d, BasicBlock, PreactBottleneck, Head, PreactHead}
    copy = pickle.loads(pickle.dumps(model))
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(copy.eval()(images), model.eval()(images))
    assert "lambda" not in repr(model)


def test_printing_tells_the_shortcut() -> None:
    assert "PadShortcut(before=8, after=8, stride=2)" in repr(basic_resnet(8, num_classes=10))


@pytest.mark.parametrize(
    ("make", "depth", "nearest"),
    [
        (basic_resnet, 21, "20 or 26"),
        (basic_resnet, 2, "is 8"),
        (basic_resnet, 1, "is 8"),
        (preact_bottleneck_resnet, 165, "164 or 173"),
        (preact_bottleneck_resnet, 8, "is 11"),
    ],
)
def test_impossible_depths_name_the_nearest(make, depth: int, nearest: str) -> None:
    with pytest.raises(ConfigError, match=f"depth {depth} is not possible.*{nearest}"):
        make(depth, num_classes=10)
