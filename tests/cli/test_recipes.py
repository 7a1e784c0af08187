"""Recipes: complete, with sources, and weaker than what is typed beside them."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from stalewise.cli import train as command
from stalewise.cli.main import app
from stalewise.errors import ConfigError
from stalewise.experiments.config import TrainConfig
from stalewise.experiments.recipes import RECIPES, recipe
from stalewise.models import build_model


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Runs `stalewise train` up to the configuration."""

    def run(*arguments: str) -> TrainConfig:
        seen: list[TrainConfig] = []
        monkeypatch.setattr(command, "run", lambda config, _, **options: seen.append(config))
        done = CliRunner().invoke(app, ["train", "--out", str(tmp_path / "run"), "--overwrite", *arguments])
        if done.exception is not None and not isinstance(done.exception, SystemExit):
            raise done.exception
        assert done.exit_code == 0, done.output
        return seen[0]

    return run


def test_a_recipe_sets_what_it_says_and_nothing_else(typed: Any) -> None:
    config = typed("--recipe", "cifar10-resnet110")
    settings = recipe("cifar10-resnet110").settings
    plain = TrainConfig()
    for field in fields(TrainConfig):
        expected = settings.get(field.name, getattr(plain, field.name))
        assert getattr(config, field.name) == expected, field.name
    assert (config.model, config.data, config.batch_size, config.epochs) == ("resnet110", "cifar10", 128, 300)
    assert config.nesterov
    assert config.lr_milestones == (0.5, 0.75)


def test_what_is_typed_counts_more(typed: Any) -> None:
    config = typed("--lr", "0.3", "--recipe", "cifar10-resnet110", "--epochs", "2", "--no-nesterov")
    assert (config.lr, config.epochs, config.nesterov, config.model) == (0.3, 2, False, "resnet110")


def test_the_rates_of_imagenet_drop_after_30_60_and_80_epochs(typed: Any) -> None:
    config = typed("--recipe", "imagenet-resnet50", "--data-dir", "/data")
    assert [round(part * config.epochs, 3) for part in config.lr_milestones] == [30, 60, 80]
    assert (config.batch_size, config.lr, config.loader_workers) == (256, 0.1, 8)


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_can_be_trained_and_has_a_source(name: str) -> None:
    found = RECIPES[name]
    config = TrainConfig(**found.settings)
    assert "arXiv" in found.source
    with torch.device("meta"):
        assert len(build_model(config.model, num_classes=10)) >= config.stages


def test_recipes_are_printed_as_options_that_can_be_typed(typed: Any) -> None:
    done = CliRunner().invoke(app, ["recipes"])
    assert done.exit_code == 0
    lines = done.output.splitlines()
    assert lines[::3] == list(RECIPES)
    for name, options in zip(lines[::3], lines[1::3], strict=True):
        if name.endswith(("resnet110", "resnet50")):
            assert typed(*options.split()) == typed("--recipe", name)
    assert all(line.startswith("    source: ") for line in lines[2::3])


def test_a_name_that_is_none() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'cifar10-resnet110'"):
        recipe("cifar-resnet110")
    with pytest.raises(ConfigError, match="prints all"):
        recipe("qqq")


@pytest.mark.parametrize("text", ["", "a", "0.5,0.4", "0,0.5", "0.5,1"])
def test_milestones_grow_within_the_run(typed: Any, text: str) -> None:
    with pytest.raises(ConfigError, match="--lr-milestones"):
        typed("--lr-milestones", text)
