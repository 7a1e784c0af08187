"""Numbers and names as people read them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable

__all__ = [
    "NOT_RECORDED",
    "count",
    "data_name",
    "duration",
    "link",
    "listed",
    "method_name",
    "model_name",
    "percent",
    "size",
    "span",
]

NOT_RECORDED = "–"
"""Stands where the run folder has no value."""

_METHODS = {
    "bp": "Backpropagation",
    "gpipe": "GPipe",
    "one_f_one_b": "1F1B",
    "1f1b": "1F1B",
    "dni": "DNI",
    "ddg": "DDG",
    "features_replay": "Features Replay",
    "fr": "Features Replay",
    "pipedream": "PipeDream",
    "pipemare": "PipeMare",
    "fdg": "FDG",
    "dsp": "DSP",
    "dsp-stored": "DSP, stored graphs",
    "one-process": "One process",
    "data-parallel": "Data parallel",
}
_MODELS = {"resnet": "ResNet", "resnext": "ResNeXt", "vgg": "VGG", "wrn": "WRN", "densenet": "DenseNet"}
_DATA = {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100", "mnist": "MNIST", "imagenet": "ImageNet"}


def model_name(name: str) -> str:
    """`resnet20` as ResNet-20; a name that is not known stays as it is."""
    match = re.fullmatch(r"([a-z]+)[-_]?(\d+.*)", name)
    if match is None or match[1] not in _MODELS:
        return name
    return f"{_MODELS[match[1]]}-{match[2]}"


def data_name(name: str) -> str:
    """`cifar10` as CIFAR-10; a name that is not known stays as it is."""
    return _DATA.get(name.replace("-", "").replace("_", ""), name)


def method_name(name: str) -> str:
    """`dsp` as DSP; a name that is not known stays as it is."""
    return _METHODS.get(name, name)


def percent(fraction: float | None, decimals: int = 1) -> str:
    """0.9812 as 98.1%."""
    if fraction is None:
        return NOT_RECORDED
    return f"{100 * fraction:.{decimals}f}%" if math.isfinite(fraction) else str(fraction)


def count(value: float | None) -> str:
    """12345.6 as 12,346; below 100 with three significant digits."""
    if value is None:
        return NOT_RECORDED
    if not math.isfinite(value):
        return str(value)
    if float(value).is_integer() or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def plural(number: float, noun: str) -> str:
    """1 step, 8 steps, 1,200 batches."""
    ending = "" if number == 1 else "es" if noun.endswith(("ch", "ss")) and noun != "epoch" else "s"
    return f"{count(number)} {noun}{ending}"


def listed(words: Iterable[str]) -> str:
    """a, b and c."""
    *most, last = words
    return f"{', '.join(most)} and {last}" if most else last


def link(stage: int) -> str:
    """The link from a stage to the next one; it does not break over two lines."""
    return f"{stage}\u00a0→\u00a0{stage + 1}"


def duration(seconds: float | None) -> str:
    """A length of time with its unit: 38.9 ms, 4.20 s, 41.0 s, 12 min 5 s, 3 h 20 min."""
    if seconds is None:
        return NOT_RECORDED
    if not math.isfinite(seconds):
        return str(seconds)
    if seconds == 0:
        return "0 s"
    if round(seconds) >= 3600:
        minutes = round(seconds / 60)
        return f"{minutes // 60} h {minutes % 60} min"
    if seconds >= 99.95:
        return f"{round(seconds) // 60} min {round(seconds) % 60} s"
    for unit, scale in (("s", 1.0), ("ms", 1e3), ("µs", 1e6)):
        if seconds * scale >= 0.9995:
            return f"{_three_digits(seconds * scale)} {unit}"
    return f"{seconds * 1e9:.0f} ns"


def span(low: float, high: float) -> str:
    """Two lengths of time as a range: 37.7 to 40.2 ms."""
    first, last = duration(low), duration(high)
    unit = last.rpartition(" ")[2]
    return f"{first.removesuffix(f' {unit}') if first.count(' ') == 1 == last.count(' ') else first} to {last}"


def size(num_bytes: float | None) -> str:
    """256.0 KiB, 4.00 MiB."""
    if num_bytes is None:
        return NOT_RECORDED
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if num_bytes >= scale:
            return f"{_three_digits(num_bytes / scale)} {unit}"
    return f"{num_bytes:.0f} B"


def _three_digits(value: float) -> str:
    digits = 2 - math.floor(math.log10(float(f"{value:.3g}")))
    return f"{value:.{max(0, digits)}f}"
