"""The report of a comparison: one HTML file that holds everything it shows, and links to the reports of its runs."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from urllib.parse import quote

from stalewise._version import __version__
from stalewise.report import comparison_bars, comparison_curves
from stalewise.report.atomic import atomic_text
from stalewise.report.comparison_columns import Cell, Column, columns
from stalewise.report.comparison_data import Comparison, TableRow
from stalewise.report.comparison_words import TERMS, key_numbers, lead, target_words, warnings
from stalewise.report.figures import stage_colour
from stalewise.report.page import (
    Markup,
    cards,
    element,
    figure,
    listing,
    page,
    pairs,
    section,
    table,
)
from stalewise.report.page import (
    columns as side_by_side,
)
from stalewise.report.wording import (
    NOT_RECORDED,
    data_name,
    listed,
    model_name,
    plural,
)

__all__ = ["write_comparison_report"]

_WORK = ("utilisation", "staleness_first", "staleness_all", "gradient_difference")
_MEMORY = ("memory", "memory_predicted", "resident")
"""Columns that have tables of their own."""
_HEADS = {"memory": "Peak memory", "memory_predicted": "Predicted", "resident": "Resident"}


def write_comparison_report(comparison: Comparison, path: Path) -> Path:
    """Write the report; it needs no other file, no script and no network.

    Args:
        comparison: what is shown.
        path: of the HTML file; it appears only when it is complete.

    Returns:
        The path.
    """
    settings = comparison.settings
    model, data = str(settings.get("model") or ""), str(settings.get("data") or "")
    title = f"{model_name(model)} on {data_name(data)}" if model and data else "Comparison"
    methods = [row for row in comparison.rows if not row.baseline]
    subject = f"{title}: {plural(len(methods), 'method')} compared"
    text = page(
        f"{subject} · stalewise",
        element(
            "header",
            element("div", _byline(comparison), class_="eyebrow"),
            element("h1", subject),
            element("p", lead(comparison), class_="lead"),
            cards(key_numbers(comparison)),
        ),
        *(
            element("div", element("p", element("strong", head), f": {text}"), class_="finding")
            for head, text in warnings(comparison)
        ),
        _overview(comparison),
        _results(comparison),
        _curves(comparison),
        _stages(comparison),
        _memory(comparison),
        _runs(comparison),
        _settings(comparison),
        element("footer", element("p", TERMS, class_="muted")),
        style=_STYLE,
    )
    with atomic_text(path) as file:
        file.write(text)
    return path


def _byline(comparison: Comparison) -> str:
    settings = comparison.settings
    parts = [f"stalewise {__version__} comparison"]
    if stages := settings.get("stages"):
        parts.append(plural(stages, "stage"))
    if epochs := settings.get("epochs"):
        parts.append(plural(epochs, "epoch"))
    parts.append(plural(comparison.seeds, "seed"))
    return " · ".join(parts)


def _overview(comparison: Comparison) -> Markup:
    several = comparison.seeds > 1
    over = f" Means over {comparison.seeds} seeds; lines show the range." if several else " One seed."
    shown = [
        figure(comparison_bars.speed_bars(comparison), "Samples per second while training.", title="Speed"),
        figure(comparison_bars.accuracy_dots(comparison), f"After the last epoch.{over}", title="Test accuracy"),
    ]
    if any(row.memory_total for row in comparison.rows):
        stages = max(len(row.memory) for row in comparison.rows)
        ticks = " The tick is the prediction." if any(row.memory_predicted for row in comparison.rows) else ""
        caption = element("span", "Stages", *_stage_key(stages), f".{ticks}")
        shown.append(figure(comparison_bars.memory_bars(comparison), caption, title="Peak memory"))
    return section("At a glance", element("div", *shown, class_="panels"))


def _stage_key(stages: int) -> list[Markup]:
    return [
        Markup(
            f'<span class="stage"><span class="swatch" style="background:{stage_colour(stage)}"></span>{stage}</span>'
        )
        for stage in range(stages)
    ]


def _results(comparison: Comparison) -> Markup:
    shown = [column for column in columns(comparison) if column.key not in (*_WORK, *_MEMORY)]
    over = (
        f"Means over {comparison.seeds} seeds, with the range from the lowest to the highest."
        if (comparison.seeds > 1)
        else "One seed each: differences of a point in accuracy may be chance."
    )
    remarks = [
        element("li", element("strong", row.title), f": {row.remark.rstrip('.')}.")
        for row in comparison.rows
        if row.remark
    ]
    return section(
        "Results",
        _table(comparison, shown),
        element("p", f"{over} {target_words(comparison)}", class_="muted"),
        *([element("ul", *remarks, class_="muted")] if remarks else []),
    )


def _table(comparison: Comparison, shown: Iterable[Column]) -> Markup:
    shown = list(shown)
    fastest = max((row.samples_per_s.mean for row in comparison.rows if row.samples_per_s), default=0.0)

    def cell(row: TableRow, column: Column) -> Markup:
        content = _cell(column.cell(row))
        if column.key == "utilisation":
            return _utilisation(row)
        if column.key == "samples_per_s" and row.samples_per_s and fastest:
            width = 100 * row.samples_per_s.mean / fastest
            return Markup(f'<span class="meter"><i style="width:{width:.0f}%"></i></span>{content}')
        return content

    rows = [[_name(row), *(cell(row, column) for column in shown)] for row in comparison.rows]
    heads = ["Method", *(_HEADS.get(column.key, column.head) for column in shown)]
    return element("div", table(heads, rows), class_="compared")


def _name(row: TableRow) -> Markup:
    plain = row.title.lower().replace(" ", "-") == row.name
    return element("span", row.title, *([] if plain else [element("span", row.name, class_="spread")]))


def _cell(cell: Cell) -> Markup:
    return element("span", cell.text, *([element("span", cell.spread, class_="spread")] if cell.spread else []))


def _curves(comparison: Comparison) -> Markup:
    shown = [row for row in comparison.rows if row.curves]
    if not shown:
        return section("Training", element("p", "No run has ended yet.", class_="muted"))
    key = element(
        "div",
        *(
            element("span", Markup(comparison_curves.key_line(comparison, row)), row.name, class_="entry")
            for row in shown
        ),
        class_="key",
    )
    band = (
        element("p", "Lines are means over seeds, bands reach from the lowest to the highest.", class_="muted")
        if comparison.seeds > 1
        else Markup("")
    )
    wild = comparison_curves.beyond_the_picture(comparison)
    gone = f" {listed(wild)} {'leaves' if len(wild) == 1 else 'leave'} the picture at the top." if wild else ""
    pictures = (
        ("accuracy", "epoch", "Test accuracy by epoch", "What a method makes of the same number of samples."),
        ("accuracy", "time", "Test accuracy by time", "What it makes of the same time: speed and staleness together."),
        ("loss", "epoch", "Training loss by epoch", f"Mean over the batches of each epoch.{gone}"),
        ("loss", "time", "Training loss by time", "Time since the run began, evaluations included."),
    )
    return section(
        "Training",
        key,
        side_by_side(
            *(
                figure(comparison_curves.curves(comparison, what, over), caption, title=title)
                for what, over, title, caption in pictures
            )
        ),
        band,
    )


def _stages(comparison: Comparison) -> Markup:
    shown = [column for column in columns(comparison) if column.key in _WORK]
    if not shown:
        return section("Stage by stage", element("p", "No run recorded what its stages did.", class_="muted"))
    return section("Stage by stage", _table(comparison, shown), element("p", _STROKES, class_="muted"))


def _memory(comparison: Comparison) -> Markup:
    shown = [column for column in columns(comparison) if column.key in _MEMORY]
    if not shown:
        return Markup("")
    content = []
    if any(stage.measured for row in comparison.rows for stage in row.memory):
        caption = "Each stage at the moment when it held the most, between two of its actions."
        if any(stage.predicted for row in comparison.rows for stage in row.memory):
            caption += " The tick is the predicted peak."
        content.append(figure(comparison_bars.memory_categories(comparison), caption, wide=True))
    return section("Memory", *content, _table(comparison, shown), element("p", _STROKES, class_="muted"))


_STROKES = "Numbers with strokes between them are of stages 0, 1, 2 and so on."


def _utilisation(row: TableRow) -> Markup:
    if not any(row.utilisation):
        return Markup(NOT_RECORDED)
    bars = "".join(
        f'<i style="height:{0 if stage is None else 100 * min(stage.mean, 1.0):.0f}%"></i>' for stage in row.utilisation
    )
    shares = " / ".join(NOT_RECORDED if stage is None else f"{100 * stage.mean:.0f}" for stage in row.utilisation)
    return Markup(f'<span class="bars" aria-hidden="true">{bars}</span><span>{shares}%</span>')


def _runs(comparison: Comparison) -> Markup:
    rows = []
    for row in comparison.rows:
        cells = []
        for run in row.runs:
            label = f"seed {run.seed}"
            if run.state == "done":
                cells.append(element("a", label, href=f"{quote(run.folder)}/report.html"))
            else:
                cells.append(element("span", f"{label}: {run.state}", class_=f"run-{run.state}"))
        rows.append([_name(row), element("span", *cells, class_="links")])
    return section("Reports of the runs", table(["Method", "Reports"], rows, text=(0, 1)))


def _settings(comparison: Comparison) -> Markup:
    settings = {**comparison.settings, "cuts": None if comparison.cuts is None else list(comparison.cuts)}
    content = [
        side_by_side(
            element("div", element("h3", "What all runs share"), pairs(_named(settings))),
            element("div", element("h3", "Machine"), pairs(_named(comparison.machine))),
        )
    ]
    if comparison.command:
        content += [element("h3", "Command"), listing(comparison.command)]
    return section("How it was compared", *content)


def _named(values: Mapping[str, object]) -> list[tuple[str, str]]:
    return [(name.replace("_", " "), _value(value)) for name, value in values.items() if value not in (None, "", [])]


def _value(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return value if isinstance(value, str) else json.dumps(value)


_STYLE = """
.panels { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 300px), 1fr)); gap: 16px;
  align-items: start; }
.panels figure { padding: 16px 16px 13px; margin: 0; height: 100%; }
.spread { display: block; color: var(--muted); font-size: 0.78rem; font-weight: 400; }
.compared th, .compared td { padding-left: 8px; padding-right: 8px; }
.compared th:first-child { padding-left: 14px; }
.compared td:last-child, .compared th:last-child { padding-right: 14px; }
.compared .meter { width: 44px; margin-right: 4px; }
.compared tbody th { position: sticky; left: 0; background: var(--card); z-index: 1; }
.compared thead th { vertical-align: bottom; min-width: 5.4em; }
.compared td { vertical-align: top; }
.compared th { vertical-align: top; }
td:has(.meter) .spread { display: block; }
td:has(.meter) > span:last-child { display: inline-block; vertical-align: top; min-width: 4em; }
.columns figure { margin-bottom: 0; }
.columns + p { margin-top: 14px; }
.key { display: flex; flex-wrap: wrap; gap: 6px 20px; margin: 0 0 14px; padding: 11px 16px; background: #ffffff;
  color: #1d2530; border: 1px solid var(--line); border-radius: 10px; font-size: 0.9rem; }
.key .entry { display: inline-flex; align-items: center; gap: 8px; white-space: nowrap; }
.key svg { width: 34px; height: 12px; overflow: visible; }
.bars { display: inline-flex; align-items: flex-end; gap: 2px; height: 16px; margin-right: 10px; vertical-align: -2px; }
.bars i { width: 7px; background: var(--accent); border-radius: 1.5px 1.5px 0 0; min-height: 1px; }
.stage { margin-left: 0.5em; white-space: nowrap; }
.stage .swatch { margin-right: 0.3em; }
.links { display: flex; flex-wrap: wrap; gap: 4px 18px; }
a { color: var(--accent); }
@media (max-width: 620px) {
  .compared tbody th { white-space: normal; min-width: 8em; max-width: 10em; }
}
.run-failed { color: #b45343; }
.run-missing { color: var(--muted); }
"""
