"""The page holds everything it shows, escapes what it is given, and appears whole or not at all."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from report.synthetic import write_run
from report.test_run_folder import edit

from stalewise.errors import ConfigError
from stalewise.report import atomic, html, write_report
from stalewise.report.timeline import Timeline

_VOID = {"meta", "link", "br"}


class Page(HTMLParser):
    """The texts, elements and identifiers of a page whose tags must be balanced."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            assert not name.startswith("on"), "an event handler"
            if name == "id":
                self.ids.append(value or "")
            if name in ("href", "src"):
                self.links.append(value or "")
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if data.strip() and self.open[-1] != "style":
            self.texts.append(" ".join(data.split()))

    @property
    def text(self) -> str:
        return " ".join(self.texts)


def page_of(run_dir: Path) -> Page:
    return Page(write_report(run_dir).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Page:
    return page_of(write_run(tmp_path_factory.mktemp("page") / "digits"))


def test_page_is_self_contained(page: Page) -> None:
    assert "script" not in page.tags
    assert "img" not in page.tags
    assert all(link.startswith(("#", "data:")) for link in page.links)
    assert len(page.ids) == len(set(page.ids)), "identifiers repeat"
    assert page.tags.count("svg") == 5
    assert page.tags.count("h1") == 1


def test_page_refers_to_nothing_outside(run_dir: Path) -> None:
    text = write_report(run_dir).read_text(encoding="utf-8")
    text = text.replace('xmlns="http://www.w3.org/2000/svg"', "")
    assert "http" not in text.replace("http-equiv", "")
    assert "@import" not in text
    assert set(re.findall(r"url\((.)", text)) == {"#"}


def test_page_shows_the_numbers_of_the_folder(page: Page, finished_run: Path) -> None:
    timeline = Timeline.load(finished_run)
    usage = timeline.usage(timeline.window(100))
    assert "ResNet-20 on digits reached 98.0% test accuracy after 10 epochs" in page.text
    for stage in usage.stages:
        row = (
            f"stage {stage.stage} {100 * stage.utilisation:.1f}% {100 * stage.bubble:.1f}% "
            f"{100 * stage.shares[html.Activity.WAIT_ACTIVATION]:.1f}% "
            f"{100 * stage.shares[html.Activity.WAIT_GRADIENT]:.1f}%"
        )
        assert row in page.text
    assert "over 18 steps in steady state" in page.text
    assert "DSP(1,1,0;4,2,0)" in page.text
    assert "Stage 1 may run 2 batches ahead of stage 2 before it waits." in page.text
    assert "decoupled" in page.text
    assert "4 to 6 51,072" in page.text
    for value in ("bench-1", "2.13.0+cpu", "one-cycle", "3f2a9c1d7be04a55", "2 March 2025, 10:15 UTC"):
        assert value in page.text
    assert "stalewise train --model resnet20 --data digits --stages 3 --epochs 10 --seed 0" in page.text
    assert "What this report lacks" not in page.text


def test_report_is_reproducible(run_dir: Path) -> None:
    first = write_report(run_dir).read_bytes()
    assert write_report(run_dir).read_bytes() == first


def test_all_text_is_escaped(run_dir: Path) -> None:
    evil = '<script>alert("$x^2$")</script>&amp;'
    for name in ("config.json", "environment.json", "partition.json"):
        path = run_dir / name
        document = json.loads(path.read_text(encoding="utf-8"))
        for key, value in list(document.items()):
            if isinstance(value, str) and key != "engine":
                document[key] = evil
        document[evil] = evil
        document["nested"] = {"<b>": [evil, {"deep": evil}]}
        for layer in document.get("layers", []):
            layer["name"] = layer["type"] = evil
        if "devices" in document:
            document["devices"] = [evil] * 3
        path.write_text(json.dumps(document), encoding="utf-8")
    page = page_of(run_dir)
    assert "script" not in page.tags
    assert "b" not in page.tags
    assert page.text.count(evil) > 20


@pytest.mark.parametrize("missing", ["environment.json", "partition.json", "summary.json", "timeline"])
def test_missing_parts_are_named(run_dir: Path, missing: str) -> None:
    target = run_dir / missing
    if target.is_dir():
        for file in target.iterdir():
            file.unlink()
        missing = "The timeline"
    else:
        target.unlink()
    assert f"{missing} is missing" in page_of(run_dir).text.split("What this report lacks")[1]


def test_nearly_empty_folder_has_a_report(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    (tmp_path / "metrics.jsonl").write_text("", encoding="utf-8")
    text = page_of(tmp_path).text
    for sentence in ("No loss and no accuracy", "No timeline", "No partition", "No staleness", "No command"):
        assert f"{sentence} was recorded." in text


def test_null_in_every_field_is_no_error(run_dir: Path) -> None:
    for name in ("config.json", "environment.json", "summary.json", "partition.json"):
        path = run_dir / name
        edit(path, **dict.fromkeys(json.loads(path.read_text(encoding="utf-8"))))
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    keep = ("event", "batch", "epoch")
    bare = [{key: value if key in keep else None for key, value in line.items()} for line in lines]
    (run_dir / "metrics.jsonl").write_text("\n".join(map(json.dumps, bare)), encoding="utf-8")
    page = page_of(run_dir)
    assert "How the stages spent their time" in page.text
    assert page.tags.count("svg") == 2


def test_other_shapes_of_runs(tmp_path: Path) -> None:
    deep = write_run(tmp_path / "deep", staleness=(8, 6, 4, 2, 0), epochs=1, batches=40, scale=[1.0] * 5)
    (deep / "partition.json").unlink()
    assert "stage 4" in page_of(deep).text
    plain = write_run(tmp_path / "plain", staleness=(0, 0, 0), epochs=1, batches=12)
    edit(plain / "config.json", method="bp", queue=None, gradient_queue=None)
    text = page_of(plain).text
    assert "The method: Backpropagation" in text
    assert "Stage 0 waits for stage 1 within every step." in text
    short = write_run(tmp_path / "short", epochs=1, batches=3)
    assert "too few steps for a steady state" in page_of(short).text


def test_failure_leaves_the_old_report_alone(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_report(run_dir)
    before = path.read_bytes()
    (run_dir / "summary.json").unlink()

    def full(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(atomic.os, "replace", full)
    with pytest.raises(OSError, match="no space left"):
        write_report(run_dir)
    (run_dir / "config.json").write_text("{", encoding="utf-8")
    with pytest.raises(ConfigError, match="line 1"):
        write_report(run_dir)
    assert path.read_bytes() == before
    assert [entry.name for entry in run_dir.iterdir() if "tmp" in entry.name] == []


def test_import_is_light() -> None:
    code = "import sys, stalewise.report; print('matplotlib' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_trace_for_perfetto_is_named_where_it_is(run_dir: Path) -> None:
    assert "trace.json" not in page_of(run_dir).text
    (run_dir / "trace.json").write_text("{}", encoding="utf-8")
    assert "The whole run is in trace.json" in page_of(run_dir).text
