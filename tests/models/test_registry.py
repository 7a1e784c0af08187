"""Model names, and models of the user's own."""

import itertools
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from stalewise.errors import ConfigError
from stalewise.models import available_models, build_model
from stalewise.models.resnet import BasicBlock, PreactBottleneck

_serial = itertools.count()


@pytest.fixture
def user_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Writes a module of a fresh name into the current directory, and returns the name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    names = []

    def write(source: str) -> str:
        names.append(f"user_model_{next(_serial)}")
        (tmp_path / f"{names[-1]}.py").write_text(source)
        return names[-1]

    yield write
    for name in names:
        sys.modules.pop(name, None)


@pytest.mark.parametrize(
    ("name", "block", "entries"),
    [
        ("resnet20", BasicBlock, 11),
        ("resnet56", BasicBlock, 29),
        ("resnet98", BasicBlock, 50),
        ("resnet164", PreactBottleneck, 56),
        ("preresnet56", PreactBottleneck, 20),
        ("preresnet164", PreactBottleneck, 56),
    ],
)
def test_names_choose_family_and_depth(name: str, block: type[nn.Module], entries: int) -> None:
    model = build_model(name, num_classes=10)
    assert isinstance(model, nn.Sequential)
    assert len(model) == entries
    assert all(type(entry) is block for entry in model[1:-1])


def test_resnet164_is_preresnet164() -> None:
    torch.manual_seed(3)
    short = build_model("resnet164", num_classes=10)
    torch.manual_seed(3)
    explicit = build_model("preresnet164", num_classes=10)
    assert isinstance(short, nn.Sequential)
    assert isinstance(explicit, nn.Sequential)
    pairs = zip(short.state_dict().items(), explicit.state_dict().items(), strict=True)
    assert all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)


def test_every_available_model_can_be_built() -> None:
    names = available_models()
    assert {"resnet20", "resnet98", "resnet164", "resnet1001"} <= set(names)
    with torch.device("meta"):
        for name in names:
            assert len(build_model(name, num_classes=10)) > 3


def test_classes_and_channels_are_passed_on() -> None:
    model = build_model("resnet8", num_classes=5, in_channels=1)
    assert isinstance(model, nn.Sequential)
    assert model(torch.randn(2, 1, 16, 16)).shape == (2, 5)


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("resnt20", "resnet20"),
        ("ResNet20", "resnet20"),
        ("resnet-56", "resnet56"),
        ("resnet020", "resnet20"),
        ("preres164", "preresnet164"),
    ],
)
def test_unknown_names_get_the_nearest(name: str, nearest: str) -> None:
    with pytest.raises(ConfigError, match=f"no model named '{name}'.*Did you mean '{nearest}'"):
        build_model(name, num_classes=10)


def test_a_name_like_no_other_gets_the_list() -> None:
    with pytest.raises(ConfigError, match="Try one of resnet8, "):
        build_model("qqq", num_classes=10)


def test_a_depth_beyond_reason_builds_nothing() -> None:
    with pytest.raises(ConfigError, match="no model named"):
        build_model("resnet" + "9" * 5000, num_classes=10)


@pytest.mark.parametrize(
    ("name", "nearest"), [("resnet18", "14 or 20"), ("preresnet165", "164 or 173"), ("resnet1", "8")]
)
def test_invalid_depths_get_the_nearest(name: str, nearest: str) -> None:
    with pytest.raises(ConfigError, match=nearest):
        build_model(name, num_classes=10)


@pytest.mark.parametrize("bad", [0, -1, 2.5, True, "10"])
def test_counts_must_be_positive_integers(bad: object) -> None:
    with pytest.raises(ConfigError, match="num_classes is"):
        build_model("resnet8", num_classes=bad)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="in_channels is"):
        build_model("resnet8", num_classes=10, in_channels=bad)  # type: ignore[arg-type]


def test_a_users_sequential(user_module) -> None:
    name = user_module(
        "from torch import nn\n"
        "def build(num_classes, in_channels):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(in_channels * 4, num_classes))\n"
    )
    model = build_model(f"{name}:build", num_classes=6, in_channels=2)
    assert isinstance(model, nn.Sequential)
    assert model(torch.randn(3, 2, 2, 2)).shape == (3, 6)


def test_a_users_list_of_modules(user_module) -> None:
    name = user_module(
        "from torch import nn\ndef build(*, num_classes):\n    return nn.Flatten(), nn.Linear(4, num_classes)\n"
    )
    layers = build_model(f"{name}:build", num_classes=6)
    assert isinstance(layers, list)
    assert [type(layer) for layer in layers] == [nn.Flatten, nn.Linear]


@pytest.mark.parametrize(
    ("signature", "seen"),
    [
        ("", {}),
        ("num_classes", {"num_classes": 6}),
        ("in_channels, *, width=3", {"in_channels": 2, "width": 3}),
        ("**options", {"options": {"num_classes": 6, "in_channels": 2}}),
        ("num_classes=10, /", {"num_classes": 10}),
        ("*layers, in_channels", {"layers": (), "in_channels": 2}),
    ],
)
def test_a_users_function_gets_what_its_signature_accepts(user_module, signature: str, seen: dict) -> None:
    name = user_module(
        f"from torch import nn\nSEEN = []\ndef build({signature}):\n"
        "    SEEN.append(dict(locals()))\n    return [nn.ReLU()]\n"
    )
    build_model(f"{name}:build", num_classes=6, in_channels=2)
    assert [seen] == sys.modules[name].SEEN


def test_a_users_own_error_is_the_cause(user_module) -> None:
    name = user_module("def build():\n    raise ZeroDivisionError('mine')")
    with pytest.raises(ConfigError, match=":build failed: ZeroDivisionError: mine") as caught:
        build_model(f"{name}:build", num_classes=10)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


@pytest.mark.parametrize(
    ("source", "function", "message"),
    [
        ("1 +", "build", "cannot be imported: SyntaxError"),
        ("import does_not_exist_at_all", "build", "ModuleNotFoundError: No module named 'does_not_exist_at_all'"),
        ("raise RuntimeError('no data here')", "build", "cannot be imported: RuntimeError: no data here"),
        ("import sys; sys.exit(2)", "build", "cannot be imported: SystemExit: 2"),
        ("def build(): pass", "biuld", "has no 'biuld'.*Did you mean user_model_[0-9]+:build"),
        ("build = 3", "build", "is of type int, which cannot be called"),
        ("def build(): return 3", "build", "returned an object of type int;.*nn.Sequential or a list"),
        ("def build(): return [3]", "build", "entry 0 .* is of type int;.*torch.nn.Module"),
        ("def build(): return []", "build", "returned no layers"),
        ("def build(width): pass", "build", "requires an argument 'width'.*default"),
        ("from torch import nn\ndef build(): return nn.Linear(1, 1)", "build", "of type Linear"),
    ],
)
def test_mistakes_in_a_users_model_are_explained(user_module, source: str, function: str, message: str) -> None:
    name = user_module(source)
    with pytest.raises(ConfigError, match=message):
        build_model(f"{name}:{function}", num_classes=10)


def test_a_missing_module_is_named_with_the_folder_searched(user_module, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no_such_module.*ModuleNotFoundError") as caught:
        build_model("no_such_module:build", num_classes=10)
    assert str(tmp_path) in str(caught.value)
    assert isinstance(caught.value.__cause__, ModuleNotFoundError)


@pytest.mark.parametrize("name", [":build", "module:", "module:a:b", "module:a-b"])
def test_malformed_references(name: str) -> None:
    with pytest.raises(ConfigError, match="not of the form module:function"):
        build_model(name, num_classes=10)
