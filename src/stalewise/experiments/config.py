"""What a training run is: one value, checked when it is made, kept as JSON in the run folder."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from stalewise.arguments import check_compile, check_precision
from stalewise.engine.precision import Precision
from stalewise.errors import ConfigError
from stalewise.experiments.config_checks import check_types
from stalewise.methods import Method, build_method, method_options
from stalewise.protocol.stragglers import Straggler, Stragglers

__all__ = ["DISPLAYS", "ON_NAN", "SCHEDULES", "TrainConfig"]

SCHEDULES = ("onecycle", "constant", "cosine", "step")
ON_NAN = ("stop", "skip", "go-on")
DISPLAYS = ("auto", "live", "plain", "json", "quiet")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A training run on images.

    Args:
        model: name, or `module:function`; see `stalewise.models.build_model`.
        data: name or path; see `stalewise.data.load_data`.
        data_dir: where the files of a named data set are; None: the cache, or a download.
        method: name; see `stalewise.methods.build_method`.
        stages: K.
        queue: p_k, or None for the method's own.
        staleness: m_k; "auto" leaves it to the plan (see `stalewise.plan.depth`); None for the method's own.
        options: of the method, beside these; see `stalewise.methods.method_options`.
        epochs: passes over the training set.
        batch_size: samples per batch.
        lr: peak learning rate.
        momentum: of SGD.
        nesterov: momentum in Nesterov's form.
        weight_decay: of SGD.
        lr_schedule: of `SCHEDULES`, stepped once per update.
        lr_milestones: for "step": fractions of the run after which the rate falls to a tenth.
        clip_grad_norm: per stage, or None.
        partition: "profile", or cuts.
        memory_limit: that a stage may hold, such as "2GiB", or None; needs partition="profile".
        engine: "distributed" or "sequential".
        device: "auto" or a torch device.
        threads: intra-op threads per stage; None: cores over stages.
        seed: of weights, data order, augmentation and random layers.
        channels_last: keep images with their channels last in memory, which convolutions compute quicker.
        autocast: "bfloat16" or None; see `Pipeline`.
        compile: compile the layers of each stage; see `Pipeline`.
        augment: crop and flip the training images.
        loader_workers: processes that prepare batches.
        train_limit: use only so many training samples.
        test_limit: use only so many test samples.
        evaluate_every: epochs between evaluations, each of which drains the pipeline; the last epoch always does.
        recv_timeout_s: how long a stage waits for a message; None: see `Pipeline`.
        measure_memory: keep what every stage holds at most in the summary.
        gradient_difference_every: batches between measurements of the gradient difference, or None.
        display: of `DISPLAYS`.
        checkpoint_every: batches between checkpoints, or None.
        keep: how many of the newest checkpoints stay.
        stragglers: steps that are slow on purpose.
        replay: folder of the elastic run whose order is repeated, or None.
        on_nan: what becomes of a batch whose loss is not finite; see `nonfinite_loss` of `Pipeline`.

    Raises:
        ConfigError: where a value is not valid.
    """

    model: str = "resnet20"
    data: str = "digits"
    data_dir: str | None = None
    method: str = "dsp"
    stages: int = 3
    queue: tuple[int, ...] | None = None
    staleness: tuple[int, ...] | str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    epochs: int = 10
    batch_size: int = 64
    lr: float = 0.1
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 5e-4
    lr_schedule: str = "onecycle"
    lr_milestones: tuple[float, ...] = (0.5, 0.75)
    clip_grad_norm: float | None = None
    partition: str | tuple[int, ...] = "profile"
    memory_limit: str | None = None
    engine: str = "distributed"
    device: str = "auto"
    threads: int | None = None
    seed: int = 0
    channels_last: bool = True
    autocast: str | None = None
    compile: bool | str = False
    augment: bool = True
    loader_workers: int = 0
    train_limit: int | None = None
    test_limit: int | None = None
    evaluate_every: int = 1
    recv_timeout_s: float | None = None
    measure_memory: bool = False
    gradient_difference_every: int | None = None
    display: str = "auto"
    checkpoint_every: int | None = None
    keep: int = 3
    stragglers: tuple[Straggler, ...] = ()
    replay: str | None = None
    on_nan: str = "stop"

    def __post_init__(self) -> None:
        for name, least in (
            ("stages", 1),
            ("epochs", 1),
            ("batch_size", 1),
            ("evaluate_every", 1),
            ("keep", 1),
            ("seed", 0),
        ):
            _check_number(name, getattr(self, name), least, whole=True)
        check_types(self)
        for name in ("train_limit", "test_limit", "threads", "gradient_difference_every", "checkpoint_every"):
            if getattr(self, name) is not None:
                _check_number(name, getattr(self, name), 1, whole=True)
        for name in ("lr", "momentum", "weight_decay", "loader_workers"):
            _check_number(name, getattr(self, name), 0, whole=name == "loader_workers")
        for name, none in (
            ("clip_grad_norm", "which leaves no gradient; give a norm above 0, or none."),
            ("recv_timeout_s", "but a stage waits longer for its messages; give seconds above 0, or none."),
        ):
            if getattr(self, name) is not None:
                _check_number(name, getattr(self, name), 0, whole=False)
                if getattr(self, name) == 0:
                    raise ConfigError(f"{name} is 0, {none}")
        for name, choices in (
            ("lr_schedule", SCHEDULES),
            ("display", DISPLAYS),
            ("engine", ("distributed", "sequential")),
            ("on_nan", ON_NAN),
        ):
            if getattr(self, name) not in choices:
                raise ConfigError(f"{name} is {getattr(self, name)!r}; it must be one of {', '.join(choices)}.")
        if self.nesterov and not self.momentum:
            raise ConfigError("nesterov is on and momentum is 0; Nesterov's form needs momentum. Give momentum=0.9.")
        check_precision(Precision(self.autocast), self.build_method())
        check_compile(self.compile, self.build_method())
        Stragglers.of(self.stragglers).check_stages(self.stages)

    def build_method(self) -> Method:
        """The method with its depths."""
        return build_method(
            self.method, num_stages=self.stages, staleness=self.staleness, queue=self.queue, **self.options
        )

    def as_dict(self) -> dict[str, Any]:
        """JSON values, with the method's depths filled in where they are known."""
        method = self.build_method()
        if not method.knows_staleness:
            return asdict(self)
        described: dict[str, Any] = {"staleness": list(method.staleness), "slack": list(method.staleness.slack)}
        for name in ("queue", "gradient_queue"):
            if hasattr(method, name):
                described[name] = list(getattr(method, name))
        return {**asdict(self), **described}

    @classmethod
    def read(cls, path: Path) -> TrainConfig:
        """The configuration that `as_dict` wrote to a file.

        Raises:
            ConfigError: where the file is missing or malformed; the message names it.
        """
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            known = {entry.name for entry in fields(cls)}
            given: dict[str, Any] = {
                name: tuple(value) if isinstance(value, list) else value
                for name, value in values.items()
                if name in known
            }
            given["stragglers"] = tuple(Straggler.from_json(straggler) for straggler in given.get("stragglers", ()))
        except (OSError, ValueError, AttributeError, TypeError) as error:
            raise ConfigError(
                f"{path} is not the configuration of a run ({error}); give the folder that `stalewise train` wrote."
            ) from None
        if "staleness" not in method_options(given.get("method", cls.method)):
            given.update(staleness=None, queue=None)
        return cls(**given)


def parse_numbers(text: str | None, option: str) -> tuple[int, ...] | None:
    """`"4,2,0"` as (4, 2, 0); None stays None.

    Raises:
        ConfigError: naming the option and the entry that is no whole number.
    """
    if text is None:
        return None
    entries: Sequence[str] = [entry.strip() for entry in text.split(",")]
    for entry in entries:
        if not entry.lstrip("-").isdigit():
            raise ConfigError(f"{option} {text!r} has the entry {entry!r}; give whole numbers such as 4,2,0.")
    return tuple(int(entry) for entry in entries)


def parse_staleness(text: str | None) -> tuple[int, ...] | str | None:
    """`"4,2,0"` as (4, 2, 0), `"auto"` as it is.

    Raises:
        ConfigError: see `parse_numbers`.
    """
    return text if text == "auto" else parse_numbers(text, "--staleness")


def parse_fractions(text: str, option: str) -> tuple[float, ...]:
    """`"0.5,0.75"` as (0.5, 0.75): growing parts of a run.

    Raises:
        ConfigError: naming the option, where an entry is no number between 0 and 1, or they do not grow.
    """
    try:
        entries = tuple(float(entry) for entry in text.split(","))
    except ValueError:
        entries = ()
    if not entries or not all(0 < entry < 1 for entry in entries) or list(entries) != sorted(set(entries)):
        raise ConfigError(f"{option} {text!r} must be growing parts of the run, between 0 and 1, such as 0.5,0.75.")
    return entries


def parse_options(texts: Sequence[str]) -> dict[str, Any]:
    """`["micro_batches=8", "activations=stored"]` as a dict; numbers become numbers.

    Raises:
        ConfigError: naming what is no key=value.
    """
    options: dict[str, Any] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise ConfigError(f"--option {text!r} is not of the form key=value, such as micro_batches=8.")
        try:
            options[key.replace("-", "_")] = json.loads(value)
        except ValueError:
            options[key.replace("-", "_")] = value
    return options


def _check_number(name: str, value: Any, least: float, *, whole: bool) -> None:
    kind = int if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kind) or not math.isfinite(value) or value < least:
        raise ConfigError(f"{name} is {value!r}; it must be {'a whole' if whole else 'a'} number of at least {least}.")
