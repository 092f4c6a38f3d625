"""Shared by the HTML reports: frame and style of a page, escaped text, tables and inlined pictures.

A page is one file that loads nothing from elsewhere and runs no script: its Content-Security-Policy forbids both.
The reasons are in docs/decisions/structure.md.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Sequence
from typing import Any

STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:66rem;margin:2rem auto;padding:0 1rem;color:#1c2733}
h1{font-size:1.6rem;margin-bottom:.2em}h2{font-size:1.15rem;margin-top:2rem;border-bottom:1px solid #d5dce3}
h3{font-size:1rem;margin:1rem 0 .3rem}code{font-size:.9em;overflow-wrap:anywhere}img{max-width:100%}
table{border-collapse:collapse;margin:.6rem 0}
td,th{padding:.15rem .8rem .15rem 0;text-align:left;vertical-align:top;border-bottom:1px solid #e3e8ec}
td.n,th.n{text-align:right;font-variant-numeric:tabular-nums}
figure{margin:0}.note{color:#51606e;font-size:.9rem}
"""
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


class Markup(str):
    """HTML that is inserted unchanged; every other value is escaped."""


def text(value: Any) -> str:
    """A value as escaped text, or `Markup` unchanged."""
    return value if isinstance(value, Markup) else html.escape(str(value), quote=True)


def page(title: str, body: str, style: str = "") -> str:
    """A whole document.

    Args:
        title: plain text.
        body: HTML.
        style: CSS in addition to `STYLE`.
    """
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}"><meta name="viewport" content="width=device-width">'
        f"<title>{text(title)}</title><style>{STYLE}{style}</style></head><body>{body}</body></html>\n"
    )


def table(head: Sequence[Any], rows: Iterable[Sequence[Any]]) -> str:
    """A table; integers are aligned to the right, with commas."""

    def cell(value: Any, tag: str = "td") -> str:
        if isinstance(value, int) and not isinstance(value, bool):
            return f"<{tag} class=n>{value:,}</{tag}>"
        return f"<{tag}>{text(value)}</{tag}>"

    body = "".join(f"<tr>{''.join(cell(value) for value in row)}</tr>" for row in rows)
    return f"<table><tr>{''.join(cell(name, 'th') for name in head)}</tr>{body}</table>"


def data_uri(content: bytes, kind: str = "png") -> str:
    """A picture as a URI that contains it. kind: "png" or "jpeg"."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def image(content: bytes, alt: str = "", kind: str = "png") -> Markup:
    return Markup(f'<img alt="{text(alt)}" src="{data_uri(content, kind)}">')
