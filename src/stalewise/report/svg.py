"""From what is drawn on a matplotlib figure to the SVG text of a page.

A figure scales with the page, carries its title for screen readers, and is a function of its arguments alone:
no date, no random identifier, no state shared between figures. Text stays text, so it is small, can be
searched, and takes the font of the page.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from html import escape
from io import StringIO
from typing import Any

__all__ = ["FAINT", "HATCH", "INK", "MUTED", "draw_svg"]

INK, MUTED, FAINT, HATCH = "#1f2937", "#6b7280", "#e5e7eb", "#c5cad3"

_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "stalewise",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 11,
    "text.parse_math": False,
    "text.color": INK,
    "axes.edgecolor": "#9ca3af",
    "axes.labelcolor": MUTED,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.8,
    "hatch.color": HATCH,
    "hatch.linewidth": 1.0,
    "xtick.color": "#9ca3af",
    "ytick.color": "#9ca3af",
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "xtick.labelsize": 10,
    "ytick.labelsize": 10,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "legend.fontsize": 10.5,
    "path.simplify": True,
}


def draw_svg(draw: Callable[[Any], None], width: int, height: int, name: str, title: str) -> str:
    """What `draw` puts on a figure, as SVG without anything that a page does not need.

    Args:
        draw: gets an empty matplotlib figure.
        width: in units of the page; font sizes are in the same units.
        height: likewise.
        name: of the figure, unique on its page.
        title: for screen readers.
    """
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE), warnings.catch_warnings():
        # Widths are measured with one font, but the text is drawn by the reader's, which may have the glyph.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        # 72 dots per inch make one unit of the SVG one point of the font sizes.
        figure = Figure(figsize=(width / 72, height / 72), dpi=72)
        FigureCanvasSVG(figure)
        draw(figure)
        buffer = StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return _slim(buffer.getvalue(), width, height, name, title)


def _slim(svg: str, width: int, height: int, name: str, title: str) -> str:
    body = svg[svg.index("<svg") :]
    body = body[body.index(">") + 1 :]
    for clutter in (r"<metadata>.*?</metadata>", r"<defs>\s*<style.*?</style>\s*</defs>", r"<!--.*?-->"):
        body = re.sub(clutter, "", body, flags=re.DOTALL)
    # Two figures on one page must not share identifiers, and what nothing refers to needs none.
    used = set(re.findall(r'(?:url\(|href=")#([^)"]+)', body))
    body = re.sub(r' id="([^"]*)"', lambda match: f' id="{name}-{match[1]}"' if match[1] in used else "", body)
    body = re.sub(r'(url\(|xlink:href=")#', rf"\1#{name}-", body).replace("xlink:href", "href")
    body = re.sub(r"'DejaVu Sans'[^;\"]*", "system-ui, sans-serif", body)
    body = re.sub(r"\n\s*", "\n", body).replace("\n\n", "\n").strip()
    title = escape(title)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="{title}" style="stroke-linejoin: round"><title>{title}</title>\n{body}\n'
    )
