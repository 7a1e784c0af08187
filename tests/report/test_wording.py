"""Numbers and names as people read them."""

from __future__ import annotations

import math

import pytest

from stalewise.report import wording


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, "–"),
        (0, "0 s"),
        (3e-9, "3 ns"),
        (4.2e-6, "4.20 µs"),
        (0.0389, "38.9 ms"),
        (0.9996, "1.00 s"),
        (4.2, "4.20 s"),
        (41.0, "41.0 s"),
        (99.9, "99.9 s"),
        (99.97, "1 min 40 s"),
        (725.4, "12 min 5 s"),
        (3599.6, "1 h 0 min"),
        (12_000, "3 h 20 min"),
        (math.inf, "inf"),
    ],
)
def test_duration(seconds: float | None, text: str) -> None:
    assert wording.duration(seconds) == text


def test_span() -> None:
    assert wording.span(0.0377, 0.0402) == "37.7 to 40.2 ms"
    assert wording.span(0.9, 1.2) == "900 ms to 1.20 s"
    assert wording.span(61 * 2, 61 * 3) == "2 min 2 s to 3 min 3 s"


def test_numbers() -> None:
    assert [wording.count(value) for value in (None, 5, 5.0, 12_345.6, 0.05749, math.nan)] == [
        "–",
        "5",
        "5",
        "12,346",
        "0.0575",
        "nan",
    ]
    assert [wording.percent(value) for value in (None, 0.9812, 1, math.nan)] == [
        "–",
        "98.1%",
        "100.0%",
        "nan",
    ]
    assert [wording.size(value) for value in (None, 12, 262_144, 4_194_304, 3 * 2**30)] == [
        "–",
        "12 B",
        "256 KiB",
        "4.00 MiB",
        "3.00 GiB",
    ]
    assert [wording.plural(*pair) for pair in ((1, "step"), (2, "epoch"), (1200, "batch"))] == [
        "1 step",
        "2 epochs",
        "1,200 batches",
    ]


def test_names() -> None:
    assert [wording.model_name(name) for name in ("resnet20", "vgg19_bn", "mine", "cnn7")] == [
        "ResNet-20",
        "VGG-19_bn",
        "mine",
        "cnn7",
    ]
    assert [wording.data_name(name) for name in ("cifar10", "digits")] == ["CIFAR-10", "digits"]
    assert [wording.method_name(name) for name in ("dsp", "other")] == ["DSP", "other"]
