"""The report of a comparison: one file, nothing from outside, every text escaped, and the numbers that it is given."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest

from stalewise.report import comparison_bars, comparison_curves
from stalewise.report.comparison import write_comparison_report
from stalewise.report.comparison_columns import columns
from stalewise.report.comparison_data import Comparison, Curve, RunLine, Spread, StageMemory, TableRow
from stalewise.report.comparison_words import key_numbers, lead, warnings

NASTY = '<script>alert("1")</script> & co'


def curve(final: float, pace: float) -> Curve:
    epochs = (1, 2, 3)
    return Curve(
        epoch=epochs,
        time_s=tuple(pace * epoch for epoch in epochs),
        loss=tuple(2.0 / epoch for epoch in epochs),
        accuracy=tuple(final * epoch / 3 for epoch in epochs),
    )


def make_row(name: str, rate: float, finals: tuple[float, ...], **more: object) -> TableRow:
    total = Spread((2.0**20,) * len(finals))
    values: dict[str, object] = {
        "title": name.upper(),
        "baseline": False,
        "runs": tuple(
            RunLine(seed=seed, folder=f"runs/{name}-seed{seed}", state="done") for seed in range(len(finals))
        ),
        "test_accuracy": Spread(finals),
        "best_accuracy": Spread(finals),
        "samples_per_s": Spread((rate,) * len(finals)),
        "speed_up": Spread((rate / 100,) * len(finals)),
        "epoch_s": Spread((1000 / rate,) * len(finals)),
        "target_s": Spread((2000 / rate,) * len(finals)),
        "target_reached": len(finals),
        "memory": (StageMemory(measured={"weights": total, "total": total}, predicted={"total": 2**19}, resident=None),)
        * 2,
        "memory_total": Spread((2.0**21,) * len(finals)),
        "memory_predicted": 2.0**20,
        "utilisation": (Spread((0.25,)), Spread((0.75,))),
        "staleness_mean": (Spread((1.5,)), Spread((0.0,))),
        "staleness_max": (2, 0),
        "gradient_difference": (Spread((0.125,)), None),
        "curves": tuple(curve(final, 100 / rate) for final in finals),
    }
    return TableRow(name=name, **{**values, **more})  # type: ignore[arg-type]


@pytest.fixture
def compared() -> Comparison:
    failed = RunLine(seed=0, folder="runs/dni-seed0", state="failed", error=NASTY)
    return Comparison(
        rows=(
            make_row("bp", 100, (0.90, 0.92)),
            make_row("dsp", 250, (0.88, 0.90), title="DSP(1,0;2,0)"),
            TableRow(name="dni", title="DNI", baseline=False, runs=(failed, replace(failed, seed=1))),
            make_row("one-process", 60, (0.90, 0.92), baseline=True, note="in one process"),
        ),
        settings={"model": "resnet8", "data": "digits", "stages": 2, "epochs": 3, "engine": "distributed"},
        seeds=2,
        cuts=(2,),
        target_accuracy=0.84,
        machine={"processor": NASTY, "cores": 4, "gpus": []},
        command="stalewise compare --methods bp,dsp",
    )


def written(comparison: Comparison, folder: Path) -> str:
    return write_comparison_report(comparison, folder / "report.html").read_text(encoding="utf-8")


class Tags(HTMLParser):
    """Whether tags nest, which links there are, and the text."""

    VOID = frozenset({"meta", "link", "br"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.text = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in self.VOID:
            self.open.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("href", "src")]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [value or "" for name, value in attrs if name in ("href", "src")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_report_needs_nothing_from_outside(compared: Comparison, tmp_path: Path) -> None:
    page = Tags(written(compared, tmp_path))
    inside = {link for link in page.links if link.startswith("#")}
    reports = {f"runs/{row}-seed{seed}/report.html" for row in ("bp", "dsp", "one-process") for seed in (0, 1)}
    assert set(page.links) - inside - {"data:,"} == reports
    assert not (tmp_path / ".report.html").exists()
    assert written(compared, tmp_path) == written(compared, tmp_path), "the same each time"


def test_everything_is_escaped(compared: Comparison, tmp_path: Path) -> None:
    """Names of rows, reasons of failures, machines, models, data: nothing of a user becomes markup."""
    nasty = replace(
        compared,
        rows=tuple(replace(row, name=f"{NASTY}{place}", title=NASTY) for place, row in enumerate(compared.rows)),
        settings={**compared.settings, "model": NASTY, "data": NASTY},
        command=NASTY,
    )
    text = written(nasty, tmp_path)
    assert "<script" not in text
    assert NASTY in Tags(text).text


def test_all_columns_are_on_the_page(compared: Comparison, tmp_path: Path) -> None:
    page = Tags(written(compared, tmp_path)).text
    for column in columns(compared):
        if column.key not in ("memory", "memory_predicted"):
            assert column.head in page
        for row in compared.rows:
            assert column.cell(row).text in page
    assert "91.00%" in page
    assert "90.00–92.00%" in page
    assert "failed with seed 0, 1" in page


def test_the_lead_says_what_came_out(compared: Comparison) -> None:
    assert lead(compared) == (
        "DSP(1,0;2,0) trains fastest: 2.50 times as many samples per second as backpropagation over the same 2 stages, "
        "and ends 2.0 points below it in test accuracy. BP reaches the highest test accuracy, 91.00%."
    )
    assert [(label, value) for label, value, _ in key_numbers(compared)] == [
        ("Fastest", "2.50×"),
        ("Most accurate", "91.00%"),
        ("First to 84%", "8.00 s"),
        ("Least memory", "2.00 MiB"),
    ]
    quick = replace(compared.rows[3], title="One process", samples_per_s=Spread((500.0,)))
    assert "One process, which needs no pipeline, is 2.00 times as fast as that." in lead(
        replace(compared, rows=(*compared.rows[:3], quick))
    )
    assert lead(replace(compared, rows=compared.rows[2:])) == "No method has a result yet."


def test_what_forbids_to_read_the_numbers_is_said(compared: Comparison) -> None:
    assert [head for head, _ in warnings(compared)] == ["Not every run has a result"]
    complete = replace(compared, rows=compared.rows[:2])
    assert warnings(complete) == []
    few = replace(complete, machine={"cores": 1})
    assert [head for head, _ in warnings(few)] == ["2 stages shared 1 core"]
    probed = replace(complete, settings={**complete.settings, "gradient_difference_every": 8})
    assert [head for head, _ in warnings(probed)] == ["The runs measured gradient differences"]
    alone = replace(few, settings={**few.settings, "engine": "sequential"})
    assert [head for head, _ in warnings(alone)] == ["The stages took turns in one process"]


def test_figures_are_valid_and_do_not_share_identifiers(compared: Comparison) -> None:
    pictures = [
        comparison_bars.speed_bars(compared),
        comparison_bars.accuracy_dots(compared),
        comparison_bars.memory_bars(compared),
        comparison_bars.memory_categories(compared),
        *(
            comparison_curves.curves(compared, what, over)
            for what in ("accuracy", "loss")
            for over in ("epoch", "time")
        ),
        *(comparison_curves.key_line(compared, row) for row in compared.rows),
    ]
    used: set[str] = set()
    for picture in pictures:
        root = ElementTree.fromstring(picture)
        names = {element.get("id") or "" for element in root.iter()} - {""}
        assert names.isdisjoint(used)
        used |= names
        assert set(re.findall(r'(?:url\(|href=")#([^)"]+)', picture)) == names
    texts = [
        "".join(element.itertext()) for element in ElementTree.fromstring(pictures[0]).iter() if "text" in element.tag
    ]
    assert "250" in texts
    assert "2.50×" in texts
    assert "failed" in texts


def test_rows_keep_their_look_in_every_curve(compared: Comparison) -> None:
    fewer = replace(compared, rows=compared.rows[:2])
    for row in fewer.rows:
        colours = re.findall(r"stroke: (#[0-9a-f]{6})", comparison_curves.key_line(compared, row))
        assert colours[0] == re.findall(r"stroke: (#[0-9a-f]{6})", comparison_curves.key_line(fewer, row))[0]
        assert colours[0] in comparison_curves.curves(compared, "loss", "time")


def test_a_wild_loss_leaves_the_picture_and_the_caption_says_so(compared: Comparison, tmp_path: Path) -> None:
    assert comparison_curves.beyond_the_picture(compared) == []
    wild = replace(curve(0.1, 1.0), loss=(3.0, 40.0, 90.0))
    rows = (*compared.rows[:2], replace(compared.rows[2], curves=(wild,)))
    assert comparison_curves.beyond_the_picture(replace(compared, rows=rows)) == ["dni"]
    assert "dni leaves the picture at the top." in Tags(written(replace(compared, rows=rows), tmp_path)).text


def test_what_is_missing_leaves_a_report_all_the_same(compared: Comparison, tmp_path: Path) -> None:
    """No result at all; a single epoch; losses that are not finite; no memory and no timeline."""
    nothing = replace(compared, rows=(compared.rows[2],), target_accuracy=None, cuts=None)
    assert "No method has a result yet." in Tags(written(nothing, tmp_path)).text
    assert "No method has a result yet." in Tags(written(Comparison(rows=(compared.rows[2],)), tmp_path)).text
    short = Curve(epoch=(1,), time_s=(None,), loss=(math.nan,), accuracy=(0.5,))
    bare = make_row(
        "bp",
        100,
        (math.nan,),
        memory=(),
        memory_total=None,
        memory_predicted=None,
        utilisation=(),
        staleness_mean=(),
        staleness_max=(),
        gradient_difference=(),
        curves=(short,),
    )
    page = Tags(written(replace(compared, rows=(bare,), seeds=1), tmp_path)).text
    assert "No run recorded what its stages did." in page
