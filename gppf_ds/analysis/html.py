"""Pieces of the report's page."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from html import escape
from importlib.resources import files
from math import isnan
from typing import TYPE_CHECKING, Any

from gppf_ds.analysis.style import data_uri, line_look, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
"""What the page asks the browser to hold it to: it fetches nothing."""
_DASHES = {"-": "", "--": "8 4", ":": "2 3", "-.": "8 3 2 3"}
_CHART = (4.4, 2.75)
"""Inches: at the width of a phone's screen its letters are as large as the page's small print."""


def chart(draw: Callable[[Axes], None], description: str, size: tuple[float, float] = _CHART) -> str:
    """A picture that ``draw`` makes.

    Args:
        draw: draws into the axes that it is given.
        description: for those who cannot see it.
        size: in inches.
    """
    figure = new_figure(*size)
    draw(figure.subplots())
    return image(data_uri(figure), description)


def image(address: str, description: str, caption: str = "") -> str:
    """An image that the page itself holds."""
    below = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return f'<figure><img src="{address}" alt="{escape(description)}">{below}</figure>'


def line_legend(names: Iterable[str]) -> str:
    """Which line of the charts is which; see :func:`gppf_ds.analysis.style.line_look`."""
    parts = []
    for index, name in enumerate(names):
        look = line_look(index)
        stroke = f'stroke="{look["color"]}" stroke-dasharray="{_DASHES[look["linestyle"]]}"'
        line = f'<line x1="0" y1="5" x2="32" y2="5" {stroke}/>'
        parts.append(f'<span><svg width="32" height="10" stroke-width="3">{line}</svg> {escape(name)}</span>')
    return f'<div class="legend">{"".join(parts)}</div>'


def grid(parts: Iterable[str]) -> str:
    """Side by side where there is room, else one below the other."""
    return f'<div class="grid">{"".join(parts)}</div>'


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Numbers are aligned to the right; what is too wide scrolls."""
    rows = list(rows)
    kinds = [
        ' class="number"' if rows and isinstance(cell, int | float) else "" for cell in (rows[0] if rows else head)
    ]
    columns = "".join(f'<th scope="col"{kind}>{escape(cell)}</th>' for cell, kind in zip(head, kinds, strict=True))
    lines = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{columns}</tr></thead><tbody>{lines}</tbody></table></div>'


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f'<td class="number">{"" if isnan(value) else f"{value:.4f}"}</td>'
    if isinstance(value, int):
        return f'<td class="number">{value:,}</td>'
    return f"<td>{escape(str(value))}</td>"


def note(text: str) -> str:
    """A sentence."""
    return f'<p class="note">{escape(text)}</p>'


def preformatted(text: str) -> str:
    """Text as it is."""
    return f"<pre>{escape(text)}</pre>"


def folded(title: str, content: str) -> str:
    """Opens on a click; printed it is open."""
    return f"<details><summary>{escape(title)}</summary>{content}</details>"


def embedded(name: str, value: Any) -> str:
    """Data for the page's script."""
    # "<" could end the element.
    text = json.dumps(value, separators=(",", ":")).replace("<", "\\u003c")
    return f'<script type="application/json" id="{name}">{text}</script>'


def page(title: str, subtitle: str, sections: Sequence[tuple[str, str]]) -> str:
    """The whole document, which fetches nothing.

    Args:
        title: of the page.
        subtitle: below it.
        sections: titles and contents; contents are html.
    """
    links = "".join(f'<a href="#s{number}">{escape(name)}</a>' for number, (name, _) in enumerate(sections))
    bodies = "".join(
        f'<section id="s{number}"><h2>{escape(name)}</h2>{content}</section>'
        for number, (name, content) in enumerate(sections)
    )
    style, script = (files("gppf_ds.analysis").joinpath(f"page.{kind}").read_text() for kind in ("css", "js"))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        f"<title>{escape(title)}</title><style>{style}</style></head><body>"
        f"<header><h1>{escape(title)}</h1><p>{escape(subtitle)}</p><nav>{links}</nav></header>"
        f"<main>{bodies}</main><script>{script}</script></body></html>\n"
    )
