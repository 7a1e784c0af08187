# ruff: noqa: RUF005 (long tables of bad values)
"""Wrong arguments of everything public."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import torch
from bad_cases import Case, misspelt, wrong_count, wrong_number, wrong_value
from torch import nn
from torch.nn.functional import mse_loss

from stalewise import BP, DSP, Pipeline, Straggler, Stragglers, launch
from stalewise.data import Batches, load_data
from stalewise.experiments.config import TrainConfig
from stalewise.methods import METHOD_NAMES, build_method, method_options
from stalewise.models import available_models, build_model
from stalewise.plan.partition import LayerCost, fixed_partition, partition
from stalewise.protocol.actions import Action, Kind
from stalewise.theory import (
    SineChain,
    UnifiedMomentum,
    closed_form_limit,
    observe_rate,
    proven_condition,
    spectral_radius,
    stability_limit,
)
from stalewise.timing import LinkCost, Links, StepCosts, simulate

__all__ = ["config", "data_names", "launching", "methods", "models", "pipeline", "planning", "simulation", "theory"]


def layers() -> list[nn.Module]:
    """A chain of six."""
    return [nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.Linear(4, 3)]


def sgd(params: Any) -> torch.optim.Optimizer:
    """A recipe."""
    return torch.optim.SGD(params, lr=0.1)


class Branching(nn.Sequential):
    """A Sequential that is no chain."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs + super().forward(inputs)


def tied() -> list[nn.Module]:
    """Two layers with one weight."""
    model = layers()
    model[4].weight = model[0].weight
    return model


def lazy() -> list[nn.Module]:
    """A layer whose weights do not exist yet."""
    return [*layers()[:5], nn.LazyLinear(3)]


def wrong_staleness(random: Random) -> Any:
    """None that a DSP could have."""
    grows = [0] + [random.randint(1, 9) for _ in range(random.randint(1, 5))]
    ends = [random.randint(5, 9), random.randint(1, 4)]
    return random.choice([(), grows, ends, [math.nan, 0], ["2", 0], [2.0, 0], [-1, 0], 3, None, "4,2,0", [True, 0]])


def methods(random: Random, folder: Path) -> Case:
    """A method that cannot be."""
    name = random.choice(METHOD_NAMES)
    options = [option for option in method_options(name) if option != "self"]
    match random.randrange(6):
        case 0:
            wrong = misspelt(random, name)
            return Case(f"method {wrong!r}", partial(build_method, wrong, num_stages=3), wrong not in METHOD_NAMES)
        case 1:
            stages = wrong_count(random)
            return Case(f"{name} of {stages!r} stages", partial(build_method, name, num_stages=stages))
        case 2 if options:
            option = random.choice(options)
            value = random.choice([wrong_value(random), wrong_count(random), wrong_number(random)])
            given: dict[str, Any] = {option: value}
            act = partial(_program, name, given)
            return Case(f"{name} with {given!r}", act, must_fail=False)
        case 3:
            option = misspelt(random, random.choice(options or ["staleness"]))
            act = partial(build_method, name, num_stages=3, **{option: 1})
            return Case(f"{name} with {option!r}", act, option not in options)
        case 4:
            staleness = wrong_staleness(random)
            return Case(f"DSP(staleness={staleness!r})", partial(DSP, staleness=staleness))
        case _:
            queue = random.choice([[3, 1, 0], [1, 1], [1, 1, 1], [1, -1, 0], "110", 5, [1, None, 0], [[], 1, 0]])
            return Case(f"DSP queue {queue!r}", partial(DSP, staleness=(4, 2, 0), queue=queue))


def _program(name: str, options: dict[str, Any]) -> object:
    return build_method(name, num_stages=3, **options).program()


def pipeline(random: Random, folder: Path) -> Case:
    """One argument of a good pipeline spoilt, or two that contradict each other."""
    good: dict[str, Any] = {
        "model": layers(),
        "method": DSP.minimal(3),
        "loss_fn": mse_loss,
        "optimizer": sgd,
        "partition": (2, 4),
        "verbose": False,
    }
    bad: dict[str, Callable[[], Any]] = {
        "model": lambda: random.choice(
            [None, 3, "resnet20", nn.Linear(4, 4), [], nn.Sequential(), [*layers()[:5], 3], {"a": nn.Linear(4, 4)}]
            + [Branching(*layers()), lazy(), tied(), [lambda: 3, *layers()], layers()[:2], wrong_value(random)]
            + [[nn.Linear, *layers()], [int, *layers()], [_failing, *layers()]]
        ),
        "method": lambda: random.choice([None, "dsp", 3, DSP, BP, (4, 2, 0), wrong_value(random)]),
        "loss_fn": lambda: random.choice([None, "mse", 3, torch.ones(1)]),
        "optimizer": lambda: random.choice(
            [None, "sgd", sgd(layers()[0].parameters()), lambda params: None, lambda params: params]
            + [lambda params: sgd(layers()[0].parameters()), lambda params: torch.optim.LBFGS(params)]
            + [lambda: None, lambda params: torch.optim.SGD(params, lr=-1), torch.optim.Optimizer]
        ),
        "lr_scheduler": lambda: random.choice(
            [3, "cosine", lambda optimizer: None.x, lambda optimizer: 3, torch.optim.lr_scheduler.ReduceLROnPlateau]
            + [lambda: None]
        ),
        "partition": lambda: random.choice(
            [
                (4, 2),
                (2, 2),
                (0, 3),
                (2, 6),
                (2,),
                (1, 2, 3),
                (-1, 3),
                "even",
                "",
                3,
                None,
                (2.0, 4),
                ("2", 4),
                (True, 4),
            ]
            + [wrong_value(random), torch.tensor([2, 4]), {"a": 2}]
        ),
        "memory_limit": lambda: random.choice([0, -1, "2 parsec", "", 1.5, True, "1GB", wrong_value(random)]),
        "engine": lambda: random.choice(["distributed", "Sequential", "gpu", None, 3, wrong_value(random)]),
        "device": lambda: random.choice(["cuda:77", "gpu", "", 3.5, None, "cpu:x", "meta:0:1", wrong_value(random)]),
        "seed": lambda: random.choice([1.5, "0", True, math.nan, -(10**40), 10**40, wrong_value(random)]),
        "clip_grad_norm": lambda: random.choice([0, -1, math.nan, True, "1", wrong_value(random)]),
        "param_groups": lambda: random.choice([3, "x", lambda name: {}, lambda name, p: 3]),
        "recv_timeout_s": lambda: wrong_number(random),
        "start_timeout_s": lambda: random.choice([wrong_number(random), None]),
        "gradient_difference_every": lambda: random.choice([0, -1, 1.5, True, "1", wrong_value(random)]),
        "stragglers": lambda: random.choice([3, "slow", [3], {"a": 1}, Straggler(factor=2, stages=(3,))]),
    }
    name = random.choice(list(bad))
    value = bad[name]()
    if name == "memory_limit" and value == "1GB":
        return Case("memory_limit with given cuts", partial(Pipeline, **good | {"memory_limit": value}))
    if name == "model" and isinstance(value, list) and len(value) == 7:
        good |= {"partition": (2, 4)}
    return Case(f"Pipeline({name}={value!r})", partial(Pipeline, **good | {name: value}))


def _failing() -> nn.Module:
    raise ZeroDivisionError("in the user's factory")


def config(random: Random, folder: Path) -> Case:
    """A field of a run's configuration of another type or out of its range."""
    bad: dict[str, Callable[[], Any]] = {
        "model": lambda: wrong_value(random),
        "data": lambda: wrong_value(random),
        "data_dir": lambda: random.choice([3, True, wrong_value(random)]),
        "method": lambda: random.choice([None, 3, wrong_value(random), misspelt(random, "dsp") + "?"]),
        "options": lambda: random.choice([None, 3, "x", [], {"x": 1}, {3: 1}]),
        "queue": lambda: random.choice([3, "110", (1, 1), [3, 3, 3]]),
        "staleness": lambda: random.choice([3, "420", (4, 2), [2, 4, 0], (4, 2, None)]),
        "lr_schedule": lambda: random.choice([None, "linear", 3, []]),
        "lr_milestones": lambda: random.choice([None, 3, "ab", (None,), (2.0,), (math.nan,), (-0.1,)]),
        "clip_grad_norm": lambda: wrong_number(random),
        "partition": lambda: random.choice(
            [None, "even", 3, (2, 1), (1.5, 2), (1, 2, 3), ("a", "b"), wrong_value(random)]
        ),
        "memory_limit": lambda: random.choice([-1, "lots", wrong_value(random)]),
        "engine": lambda: random.choice([None, "auto", 3, []]),
        "device": lambda: random.choice([None, 3, "gpu", "cuda:x", wrong_value(random)]),
        "display": lambda: random.choice([None, "loud", 3, {}]),
        "stragglers": lambda: random.choice([3, "x", [3], {"a": 1}]),
        "lr": lambda: wrong_number(random, zero=True),
        "momentum": lambda: wrong_number(random, zero=True),
        "weight_decay": lambda: wrong_number(random, zero=True),
        "recv_timeout_s": lambda: wrong_number(random),
        "seed": lambda: random.choice([-1, 1.5, 2**64, None, "0"]),
        "threads": lambda: random.choice([0, -1, 1.5, "4", 10**9]),
        **{name: (lambda: wrong_count(random)) for name in ("stages", "epochs", "batch_size", "evaluate_every")},
        **{name: (lambda: random.choice([0, -1, 1.5, "4"])) for name in ("train_limit", "test_limit")},
        **{name: (lambda: random.choice([None, 3, "yes", []])) for name in ("nesterov", "channels_last", "augment")},
        "loader_workers": lambda: random.choice([-1, 1.5, None, "2", 10**6]),
    }
    name = random.choice(list(bad))
    value = bad[name]()
    return Case(f"TrainConfig({name}={value!r})", partial(TrainConfig, **{name: value}))


def models(random: Random, folder: Path) -> Case:
    """A model that is not there."""
    match random.randrange(4):
        case 0:
            name = misspelt(random, random.choice(available_models()))
            return Case(f"model {name!r}", partial(_model, name), must_fail=False)
        case 1:
            name = random.choice(
                ["resnet21", "vgg12", "wrn17-4", "resnext30-8x64d", "imagenet-resnet20", "preresnet21"]
            )
            return Case(f"model {name!r}", partial(_model, name))
        case 2:
            value = wrong_count(random)
            return Case(f"num_classes {value!r}", partial(build_model, "resnet8", num_classes=value))
        case _:
            name = random.choice(
                [
                    "nowhere:build",
                    "os:path",
                    "os:nothing",
                    ":build",
                    "os:",
                    "a:b:c",
                    "bad_models:fails",
                    "bad_models:exits",
                ]
                + ["bad_models:none", "bad_models:empty", "bad_models:numbers", "bad_models:needs", "bad_broken:build"]
                + [
                    "bad models:build",
                    "..:build",
                    "\0:a",
                    "bad_models:Fails",
                    "bad_models:build\n",
                    "bad_models.x:build",
                ]
            )
            return Case(f"model {name!r}", partial(build_model, name, num_classes=10))


def _model(name: str) -> object:
    return "built" if name in available_models() else build_model(name, num_classes=2)


def data_names(random: Random, folder: Path) -> Case:
    """A data set that is not there, or options of batches that cannot be."""
    match random.randrange(3):
        case 0:
            name = random.choice(
                [misspelt(random, "imagenet") + "?", misspelt(random, "digits") + "/", "", "\0", "a" * 5000]
            )
            return Case(f"data {name!r}", partial(load_data, name))
        case 1:
            limit = random.choice([0, -1, 1.5, True, "5"])
            which = random.choice(["train_limit", "test_limit"])
            return Case(f"{which} {limit!r}", partial(load_data, "digits", **{which: limit}))
        case _:
            split = load_data("digits", train_limit=20)
            good: dict[str, Any] = {"batch_size": 4, "seed": 0, "epoch": 0, "shuffle": True, "augment": True}
            name = random.choice(["batch_size", "seed", "epoch", "num_workers", "start_batch", "mean", "std"])
            if name in ("mean", "std"):
                values = {
                    "mean": split.mean,
                    "std": split.std,
                    name: random.choice([(), (1.0,), (0, 0, 0), None, "abc"]),
                }
                must = not (name == "mean" and values["mean"] == (0, 0, 0))
                act = partial(_read, split.train, values["mean"], values["std"], good)
                return Case(f"Batches {name} {values[name]!r}", act, must)
            value = wrong_count(random, 1 if name == "batch_size" else 0)
            act = partial(_read, split.train, split.mean, split.std, good | {name: value})
            return Case(f"Batches {name} {value!r}", act)


def _read(samples: Any, mean: Any, std: Any, options: dict[str, Any]) -> object:
    return next(iter(Batches(samples, mean, std, **options)))


def simulation(random: Random, folder: Path) -> Case:
    """Timings that cannot be."""
    program = DSP.minimal(3).program()
    costs = StepCosts.of_kinds(program, dict.fromkeys((Kind.FORWARD, Kind.RECOMPUTE, Kind.BACKWARD, Kind.UPDATE), 5))
    choices: list[tuple[str, Callable[[], object]]] = []
    for name, value in (
        ("num_batches", wrong_count(random)),
        ("replicas", wrong_count(random)),
        ("seed", wrong_count(random, 0)),
    ):
        options = {"num_batches": 5, name: value}
        choices.append((f"simulate {name}={value!r}", partial(simulate, program, costs, **options)))
    ns = random.choice([-1, 1.5, math.nan, "1", None, 10**30, [1, 2], [1, 2, 3, 4], wrong_value(random)])
    choices.append((f"StepCosts {ns!r}", lambda: StepCosts.of_kinds(program, {Kind.FORWARD: ns})))
    stages = wrong_count(random)
    choices.append((f"Links of {stages!r}", lambda: Links.equal(stages)))
    number = wrong_number(random)
    choices.append((f"bandwidth {number!r}", _bandwidth(number)))
    field = random.choice(["probability", "factor", "pause_s", "duration", "seed", "first", "last", "how", "stages"])
    value = random.choice([-1, math.nan, "x", wrong_value(random), [], -0.5])
    choices.append((f"Straggler {field}={value!r}", lambda: Straggler(**{"factor": 2.0, field: value})))
    text = misspelt(random, "SEND_A7") + "_"
    choices.append((f"Action {text!r}", lambda: Action.parse(text)))
    choices.append(("Stragglers", lambda: Stragglers.of(wrong_value(random))))
    what, act = random.choice(choices)
    return Case(what, act)


def _bandwidth(number: Any) -> Callable[[], object]:
    bytes_per_s = -1.0 if number == math.inf else number
    return lambda: LinkCost.of_bytes(100, latency_s=0.1, bytes_per_s=bytes_per_s)


def planning(random: Random, folder: Path) -> Case:
    """Layers and stages that do not fit."""
    costs = [
        LayerCost(name=str(index), type="Linear", parameters=3, forward_s=1.0, backward_s=2.0) for index in range(4)
    ]
    match random.randrange(3):
        case 0:
            count = random.choice([0, 5, 9, 100])
            return Case(f"4 layers, {count} stages", partial(partition, costs, recompute=[True] * count))
        case 1:
            cuts = random.choice(
                [(3, 1), (0, 1), (1, 9), (1,), (1, 1), (1.5, 2), None, "12", (-1, 2), wrong_value(random)]
            )
            return Case(f"cuts {cuts!r}", partial(fixed_partition, costs, cuts, recompute=[True] * 3))
        case _:
            time = wrong_number(random, zero=True)
            bad = partial(LayerCost, name="a", type="b", parameters=3, forward_s=time, backward_s=2.0)
            return Case(f"forward_s {time!r}", lambda: partition([bad(), *costs], recompute=[True] * 3))


def theory(random: Random, folder: Path) -> Case:
    """Numbers that theory has no answer for."""
    staleness = wrong_staleness(random)
    number = wrong_number(random)
    momentum = random.choice([-0.1, 1, 1.5, math.nan, "x", wrong_value(random)])
    depths = (4, 2, 0)
    deep = random.choice([(), [201, 0], [-1, 0], ["2", 0], [2.0, 0], 3, None, "4,2,0", [True, 0]])  # any order is right
    weight = nn.Parameter(torch.zeros(2))
    choices: list[tuple[str, Callable[[], object]]] = [
        (f"delay {number!r}", lambda: closed_form_limit(-1 if number == 0 else number)),
        (f"stability of {deep!r}", lambda: stability_limit(deep)),
        (f"momentum {momentum!r}", lambda: stability_limit(depths, momentum=momentum)),
        (f"step {number!r}", lambda: spectral_radius(depths, math.nan if isinstance(number, int | float) else number)),
        (f"lipschitz {number!r}", lambda: proven_condition(depths, lipschitz=number, error_bound=1.0)),
        (f"error bound {number!r}", lambda: proven_condition(depths, lipschitz=1.0, error_bound=number)),
        (f"staleness {staleness!r}", lambda: proven_condition(staleness, lipschitz=1.0, error_bound=1.0)),
        (f"lr {number!r}", lambda: UnifiedMomentum([weight], lr=-1 if number == 0 else number, momentum=0.9)),
        (f"beta {momentum!r}", lambda: UnifiedMomentum([weight], lr=0.1, momentum=momentum)),
        (f"chain {staleness!r}", lambda: SineChain(num_stages=wrong_count(Random(1), 1))),
    ]
    counts = random.choice([(), (5,), (9, 5), (0, 5), (-1, 2), ("a", "b"), None])
    chain = SineChain(num_stages=3)
    options: dict[str, Any] = {"steps": "constant", "updates": counts, "copies": 32, "seed": 0}
    choices.append((f"updates {counts!r}", lambda: observe_rate(chain, depths, **options)))
    what, act = random.choice(choices)
    return Case(what, act)


def launching(random: Random, folder: Path) -> Case:
    """Jobs that cannot start; no process is."""
    match random.randrange(3):
        case 0:
            workers = wrong_count(random)
            return Case(f"{workers!r} workers", lambda: launch(layers, num_workers=workers))
        case 1:
            main = random.choice([None, 3, "main", lambda: None, partial(layers), wrong_value(random), print])
            return Case(f"launch {main!r}", lambda: launch(main, num_workers=1))
        case _:
            args = random.choice([[object()], [b"x"], [{1, 2}], 3, ["x" * 200_000], [torch.ones(1)], [1j]])
            return Case(f"args {str(args)[:40]}", lambda: launch(layers, num_workers=1, args=args))
