"""Figures of the retention report: bars, histograms, heat maps, pictures (eval/html_page.py has the page itself)."""

from __future__ import annotations

import io
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
from PIL import Image

from eval.html_page import data_uri, text
from tasks.curation.reports.summary import Histogram

INK, MARK = "#3d7ea6", "#c0392b"
STYLE = """
.row{display:flex;flex-wrap:wrap;gap:1.2rem}
figcaption{font-size:.8rem;color:#51606e;max-width:17rem;overflow-wrap:anywhere}
.shot{width:6.5rem}.shot img{width:6rem;height:6rem;object-fit:contain;background:#eef1f4;border:1px solid #d5dce3}
.shot figcaption{max-width:6.5rem}.wall{display:flex;flex-wrap:wrap;gap:2px}
.wall img{width:4rem;height:4rem;object-fit:cover;display:block}
.none{width:6rem;height:6rem;background:#eef1f4;color:#51606e;display:grid;place-items:center;font-size:.8rem}
.cut{border-left:3px solid #c0392b;padding-left:.8rem}.side{display:flex;flex-wrap:wrap;gap:.5rem}
.heat td{text-align:right;padding:.3rem .7rem;font-variant-numeric:tabular-nums}.heat th{padding:.3rem .7rem}
"""


def percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "-"


def bars(items: Sequence[tuple[str, int]], title: str = "", width: int = 760) -> str:
    """Horizontal bars, with shares of the first, which is 100%."""
    most = max((n for _, n in items), default=0) or 1
    room = width - 330
    rows = "".join(
        f'<text x="170" y="{22 * i + 16}" text-anchor="end">{text(name)}</text>'
        f'<rect x="178" y="{22 * i + 3}" width="{room * n / most:.1f}" height="16" fill="{INK}"/>'
        f'<text x="{184 + room * n / most:.1f}" y="{22 * i + 16}">{n:,} ({percent(n, items[0][1])})</text>'
        for i, (name, n) in enumerate(items)
    )
    svg = f'<svg width="{width}" height="{22 * len(items) + 4}" font-size="12" role="img">{rows}</svg>'
    return f"<figure>{svg}<figcaption>{text(title)}</figcaption></figure>" if title else svg


def histogram(
    counts: Histogram,
    name: str,
    cuts: Mapping[str, float] | None = None,
    shown: Callable[[float], str] = "{:.3g}".format,
) -> str:
    """Bars, and each threshold in `cuts` (name -> value) as a line if it is inside the range."""
    cuts = cuts or {}
    most, low, high = max(1, counts.counts.max()), counts.low, counts.high
    step = 240 / len(counts.counts)
    drawn = "".join(
        f'<rect x="{step * i:.1f}" y="{90 - 80 * n / most:.1f}" width="{step - 1:.1f}" height="{80 * n / most:.1f}" '
        f'fill="{INK}"/>'
        for i, n in enumerate(counts.counts)
    )
    for value in cuts.values():
        if low <= value <= high:
            x = 240 * (value - low) / (high - low)
            drawn += f'<line x1="{x:.1f}" x2="{x:.1f}" y1="4" y2="90" stroke="{MARK}" stroke-width="2"/>'
    limits = "".join(f"; {text(key)} {text(shown(value))}" for key, value in cuts.items())
    return (
        f'<figure><svg width="244" height="108" font-size="11" role="img">{drawn}'
        f'<text x="0" y="104">{text(shown(low))}</text><text x="240" y="104" text-anchor="end">{text(shown(high))}</text>'
        f"</svg><figcaption>{text(name)} ({counts.total:,}){limits}</figcaption></figure>"
    )


def lengths(rows: Mapping[str, Counter[int]]) -> str:
    """A box plot for each name: 5% to 95% of the captions' words as a line, the middle half as a box, the median as a
    mark."""
    filled = {name: counts for name, counts in rows.items() if counts}
    top = max((_quantile(counts, 0.95) for counts in filled.values()), default=0) or 1
    drawn = ""
    for i, (name, counts) in enumerate(filled.items()):
        low, first, middle, third, high = (_quantile(counts, q) for q in (0.05, 0.25, 0.5, 0.75, 0.95))
        x = [180 + 380 * value / top for value in (low, first, middle, third, high)]
        y = 26 * i + 13
        drawn += (
            f'<text x="170" y="{y + 4}" text-anchor="end">{text(name)}</text>'
            f'<line x1="{x[0]:.1f}" x2="{max(x[4], x[0] + 1):.1f}" y1="{y}" y2="{y}" stroke="{INK}"/>'
            f'<rect x="{x[1]:.1f}" y="{y - 7}" width="{max(2.0, x[3] - x[1]):.1f}" height="14" fill="#a9c9dc"/>'
            f'<line x1="{x[2]:.1f}" x2="{x[2]:.1f}" y1="{y - 8}" y2="{y + 8}" stroke="{INK}" stroke-width="3"/>'
            f'<text x="{x[4] + 8:.1f}" y="{y + 4}">{middle} words ({low} to {high}), {sum(counts.values()):,} captions</text>'
        )
    return f'<svg width="860" height="{26 * len(filled) + 4}" font-size="12" role="img">{drawn}</svg>'


def _quantile(counts: Counter[int], share: float) -> int:
    left = share * sum(counts.values())
    for value in sorted(counts):
        left -= counts[value]
        if left <= 0:
            return value
    return 0


def heat_map(names: Sequence[str], columns: Sequence[str], cells: Mapping[tuple[str, str], int]) -> str:
    """Counts of (name, column); colours by the logarithm, so that small cells differ from empty ones."""
    most = math.log1p(max(cells.values(), default=0)) or 1
    total = sum(cells.values())
    rows = ""
    for name in names:
        tds = ""
        for column in columns:
            n = cells.get((name, column), 0)
            heat = math.log1p(n) / most
            ink = "#fff" if heat > 0.65 else "#1c2733"
            shade = [round(255 + (end - 255) * heat) for end in (0x1F, 0x5F, 0x8B)]
            tds += f'<td style="background:rgb({shade[0]},{shade[1]},{shade[2]});color:{ink}" title="{percent(n, total)}">{n:,}</td>'
        whole = sum(cells.get((name, column), 0) for column in columns)
        rows += f"<tr><th>{text(name)}</th>{tds}<td>{whole:,}</td></tr>"
    head = "".join(f"<th class=n>{text(column)}</th>" for column in [*columns, "all"])
    return f"<table class=heat><tr><th></th>{head}</tr>{rows}</table>"


def picture(pixels: np.ndarray | None) -> str:
    """A data URI of a JPEG; "" without a picture."""
    if pixels is None:
        return ""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=82)
    return data_uri(buffer.getvalue(), "jpeg")


def shot(pixels: np.ndarray | None, caption: str) -> str:
    """A picture with a caption under it."""
    source = picture(pixels)
    image = f'<img src="{source}" alt="">' if source else "<div class=none>no picture</div>"
    return f"<figure class=shot>{image}<figcaption>{text(caption)}</figcaption></figure>"


def wall(pictures: Iterable[tuple[np.ndarray | None, str]]) -> str:
    """Pictures side by side; the file is their title."""
    images = "".join(
        f'<img src="{picture(pixels)}" alt="" title="{text(file)}">' for pixels, file in pictures if pixels is not None
    )
    return f"<div class=wall>{images}</div>"
