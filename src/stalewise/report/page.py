"""Pieces of an HTML page: escaping, tables, cards and the style sheet.

Text is escaped where it enters a piece; only `Markup`, which the pieces themselves return, passes as it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

__all__ = [
    "Markup",
    "cards",
    "columns",
    "details",
    "element",
    "figure",
    "listing",
    "page",
    "pairs",
    "section",
    "table",
]


class Markup(str):
    """HTML that is already escaped."""

    __slots__ = ()


def element(tag: str, *content: str, **attributes: str) -> Markup:
    """An element; `class_` stands for `class`."""
    names = "".join(f' {name.rstrip("_")}="{escape(value)}"' for name, value in attributes.items() if value)
    return Markup(f"<{tag}{names}>{_join(content)}</{tag}>")


def section(title: str, *content: str) -> Markup:
    """A part of the page under a heading."""
    return Markup(f"\n<section>\n{element('h2', title)}\n{_join(content, chr(10))}\n</section>")


def table(head: Sequence[str], rows: Iterable[Sequence[str]], *, text: Sequence[int] = (0,)) -> Markup:
    """A table that scrolls sideways on a narrow screen.

    Args:
        head: the headings.
        rows: cells; the first of each row is its heading.
        text: columns of text, aligned to the left; the others hold numbers.
    """

    def cells(row: Sequence[str], tag: str, scope: str) -> str:
        return "".join(
            element(tag if index == 0 or scope == "col" else "td", cell, class_="" if index in text else "number")
            for index, cell in enumerate(row)
        )

    body = "\n".join(f"<tr>{cells(row, 'th', 'row')}</tr>" for row in rows)
    return Markup(
        f'<div class="scroll sheet"><table>\n<thead><tr>{cells(head, "th", "col")}</tr></thead>\n'
        f"<tbody>\n{body}\n</tbody>\n</table></div>"
    )


def pairs(rows: Iterable[tuple[str, str]]) -> Markup:
    """Names and values."""
    lines = "\n".join(f"<div>{element('dt', name)}{element('dd', value)}</div>" for name, value in rows)
    return Markup(f'<dl class="pairs">\n{lines}\n</dl>')


def cards(entries: Iterable[tuple[str, str, str]]) -> Markup:
    """Key numbers: label, value, note."""
    boxes = "\n".join(
        element(
            "div",
            element("div", label, class_="label"),
            element("div", value, class_="value"),
            element("div", note, class_="note") if note else Markup(""),
            class_="card",
        )
        for label, value, note in entries
    )
    return Markup(f'<div class="cards">\n{boxes}\n</div>')


def figure(svg: str, caption: str, *, wide: bool = False, title: str = "") -> Markup:
    """A figure on a light card; a wide one keeps a readable width and scrolls on a narrow screen."""
    heading = element("h3", title) if title else ""
    return Markup(
        f'<figure class="{"wide" if wide else "narrow"}">{heading}<div class="scroll">{svg}</div>'
        f"{element('figcaption', caption)}</figure>"
    )


def columns(*content: str) -> Markup:
    """Pieces side by side where there is room."""
    return Markup(f'<div class="columns">{_join(content, chr(10))}</div>')


def details(summary: str, *content: str) -> Markup:
    """Content that is folded until asked for."""
    return Markup(f"<details>{element('summary', summary)}{_join(content)}</details>")


def listing(text: str) -> Markup:
    """Text as typed."""
    return element("pre", element("code", text), tabindex="0")


def page(title: str, *content: str, style: str = "") -> str:
    """A whole page; its policy forbids it any script and any request.

    Args:
        title: of the window.
        content: of the body.
        style: rules beyond those that all pages share.
    """
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; style-src 'unsafe-inline'; img-src data:\">\n"
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n<link rel="icon" href="data:,">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}{style}</style>\n</head>\n<body>\n<main>\n"
        f"{_join(content, chr(10))}\n</main>\n</body>\n</html>\n"
    )


def _join(content: Iterable[str], separator: str = "") -> str:
    return separator.join(piece if isinstance(piece, Markup) else escape(piece) for piece in content)


_STYLE = """
:root {
  --paper: #f7f7f4; --card: #ffffff; --ink: #1d2530; --muted: #5d6875; --line: #e2e4e6; --accent: #2f5d9b;
  --tint: #eef3f9;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #14171b; --card: #1d2127; --ink: #e5e7ea; --muted: #9ba5b1; --line: #30363f; --accent: #8fb6e6;
    --tint: #1b2632;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body {
  margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
}
main { max-width: 1128px; margin: 0 auto; padding: 44px 24px 72px; }
h1 { font-size: clamp(1.8rem, 4.2vw, 2.5rem); line-height: 1.15; letter-spacing: -0.02em;
  margin: 0.1em 0 0.35em; }
h2 { font-size: 1.3rem; letter-spacing: -0.01em; margin: 0 0 14px; }
h3 { font-size: 0.95rem; margin: 0 0 10px; }
p { margin: 0 0 12px; max-width: 76ch; }
section { margin-top: 52px; }
.eyebrow { color: var(--muted); font-size: 0.85rem; letter-spacing: 0.02em; }
.lead { font-size: clamp(1.06rem, 1.9vw, 1.22rem); line-height: 1.5; max-width: 70ch; margin: 0 0 22px; }
.muted, figcaption, .note { color: var(--muted); font-size: 0.875rem; line-height: 1.45; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(158px, 1fr)); gap: 12px;
  margin: 24px 0 14px; }
.card, .finding, figure, .sheet, .pairs, pre {
  background: var(--card); border: 1px solid var(--line); border-radius: 10px;
}
.card { padding: 14px 16px 13px; }
.card .label { color: var(--muted); font-size: 0.8rem; }
.card .value { font-size: 1.65rem; font-weight: 650; letter-spacing: -0.02em; line-height: 1.3;
  white-space: nowrap; font-variant-numeric: tabular-nums; }
.card .note { font-size: 0.8rem; }
.finding { padding: 15px 18px 5px; margin: 0 0 12px; background: var(--tint); border-color: transparent;
  border-left: 4px solid var(--accent); border-radius: 4px 10px 10px 4px; }
.finding p { margin: 0 0 9px; }
.columns { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 420px), 1fr)); gap: 16px;
  align-items: start; }
figure { margin: 0 0 16px; padding: 18px 20px 15px; background: #ffffff; color: #1d2530; }
figure figcaption { margin-top: 8px; color: #5d6875; max-width: 96ch; }
figure svg { display: block; width: 100%; height: auto; }
figure svg text { font-family: inherit !important; font-variant-numeric: tabular-nums; }
.wide svg { min-width: 760px; }
.scroll { overflow-x: auto; margin: 0 0 16px; }
figure .scroll { margin: 0; }
table { border-collapse: separate; border-spacing: 0; width: 100%; font-size: 0.9rem; line-height: 1.4;
  font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 9px 12px; border-top: 1px solid var(--line); vertical-align: baseline; }
th { font-weight: 550; }
thead th { border-top: 0; color: var(--muted); font-size: 0.8rem; font-weight: 500; vertical-align: bottom;
  white-space: normal; }
.number { text-align: right; }
td.number { white-space: nowrap; }
td:last-child:not(.number) { min-width: 15em; }
th, td:has(.meter) { white-space: nowrap; }
.swatch { display: inline-block; width: 0.72em; height: 0.72em; border-radius: 3px; margin-right: 0.5em; }
.meter { display: inline-block; width: 52px; height: 7px; border-radius: 4px; background: var(--line);
  margin-right: 9px; overflow: hidden; vertical-align: 1px; }
.meter i { display: block; height: 100%; background: var(--accent); }
.pairs { margin: 0; padding: 4px 16px; font-size: 0.9rem; }
.pairs div { display: grid; grid-template-columns: minmax(110px, 34%) 1fr; gap: 12px; padding: 7px 0;
  border-top: 1px solid var(--line); }
.pairs div:first-child { border-top: 0; }
dt { color: var(--muted); }
dd { margin: 0; overflow-wrap: anywhere; font-variant-numeric: tabular-nums; }
pre { margin: 0 0 10px; padding: 14px 16px; overflow-x: auto; font-size: 0.875rem; line-height: 1.5; }
code { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, "Liberation Mono", monospace; }
details { margin: 0 0 16px; }
summary { cursor: pointer; color: var(--accent); font-size: 0.9rem; margin-bottom: 10px; }
ul { margin: 0 0 12px; padding-left: 1.2em; max-width: 78ch; }
li { margin-bottom: 5px; }
footer { margin-top: 56px; padding-top: 16px; border-top: 1px solid var(--line); }
@media (max-width: 620px) {
  main { padding: 26px 15px 48px; }
  section { margin-top: 40px; }
  .cards { grid-template-columns: 1fr 1fr; gap: 10px; }
  .card { padding: 11px 13px; }
  .card .value { font-size: 1.35rem; }
  figure { padding: 13px 12px 12px; }
  th, td { padding: 8px 10px; }
}
@media print {
  :root { --paper: #ffffff; --card: #ffffff; --ink: #000000; }
  section, figure, .card { break-inside: avoid; }
}
"""
