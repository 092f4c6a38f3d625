"""The retention report: one HTML file that needs nothing else, every text in it escaped."""

from __future__ import annotations

import base64
import html
import io
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from PIL import Image

from tasks.curation import ledger, tiers
from tasks.curation.config import CurationConfig
from tasks.curation.sources.base import Account
from tasks.curation.summary import Histogram, Summary

# score column -> its thresholds in FilterConfig
THRESHOLDS = {
    "bytes_per_pixel": "min_bytes_per_pixel",
    "entropy_bits": "min_entropy_bits",
    "single_color_fraction": "max_single_color_fraction",
    "border_fraction": "max_border_fraction",
    "watermark": "max_watermark_score",
    "aesthetic": "min_aesthetic",
    "nsfw": "max_nsfw",
    "similarity": "min_image_text_similarity",
}

STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:62rem;margin:2rem auto;padding:0 1rem;color:#1c2733}
h1{font-size:1.6rem}h2{font-size:1.15rem;margin-top:2.2rem;border-bottom:1px solid #d5dce3}
table{border-collapse:collapse;margin:.6rem 0}td,th{padding:.15rem .8rem .15rem 0;text-align:left;vertical-align:top}
td.n,th.n{text-align:right;font-variant-numeric:tabular-nums}.row{display:flex;flex-wrap:wrap;gap:1.2rem}
figure{margin:0}figcaption{font-size:.8rem;color:#51606e;max-width:17rem;overflow-wrap:anywhere}
.shot{width:9rem}.shot img{border:1px solid #d5dce3}.shot figcaption{max-width:9rem}
.none{width:96px;height:96px;background:#eef1f4;color:#51606e;display:grid;place-items:center;font-size:.8rem}
"""


def render(summary: Summary, config: CurationConfig) -> str:
    """The whole page."""
    content = summary.content()
    total, kept = content["input"], content["kept"]
    rules = [(rule, step, content["rejected"][rule]) for step, names in ledger.STEPS.items() for rule in names]
    buckets = content["buckets"]
    all_words = sum(summary.words.values(), Counter())
    parts = [
        "<h1>Retention report</h1>",
        f"<p>{kept} of {total} records kept ({_percent(kept, total)}): {content['captions']} captions, "
        f"{content['splits']['train']} records to train on, {content['splits']['val']} held out. "
        "Each record is kept, or counted under the first rule that it breaks; the counts add up to the input.</p>",
        *_left_out(summary.account),
        "<h2>What survives each step</h2>",
        _bars([("input", total)] + [(step["step"], step["kept"]) for step in content["retention"]]),
        "<h2>Rejected, by rule</h2>",
        _table(
            ("rule", "step", "records", "share of input"),
            [(rule, step, n, _percent(n, total)) for rule, step, n in rules]
            + [("kept", "", kept, _percent(kept, total)), ("all", "", total, "100.0 %")],
        ),
        "<h2>Scores of the input, and their thresholds</h2><div class=row>",
        *(
            _histogram(summary.scores[column], column, getattr(config.filters, limit), limit)
            for column, limit in THRESHOLDS.items()
        ),
        _histogram(
            summary.scores["log2_short_side"],
            "shorter side, px",
            math.log2(config.filters.min_side_px),
            "min_side_px",
            shown=lambda x: f"{2**x:.0f}",
        ),
        "</div>",
        "<h2>Shapes: width over height</h2><div class=row>",
        _histogram(summary.scores["log2_aspect"], "input", None, "", shown=_ratio),
        _histogram(summary.shapes, "kept", None, "", shown=_ratio),
        "</div>",
        "<h2>Tiers and episodic buckets</h2>",
        _bars([(tier, n) for tier, n in content["tiers"].items()]),
        _table(
            ("bucket", *tiers.TIERS, "all"),
            [(name, *(summary.cells[name, tier] for tier in tiers.TIERS), n) for name, n in buckets.items()],
        ),
        "<h2>Caption lengths, in words</h2><div class=row>",
        _word_histogram(all_words, "all captions"),
        *(_word_histogram(words, f"tier {tier}") for tier, words in summary.words.items() if words),
        "</div>",
        "<h2>Examples of what was rejected</h2>",
        *(_examples(rule, summary.examples[rule]) for rule in ledger.RULES if summary.examples.get(rule)),
        "<h2>Thresholds</h2>",
        *(
            f"<h3>{_text(section)}</h3>" + _table(("key", "value"), [(k, str(v)) for k, v in values.items()])
            for section, values in config.model_dump(mode="json").items()
            if isinstance(values, dict)
        ),
    ]
    return (
        "<!doctype html><html lang=en><head><meta charset=utf-8><title>Retention report</title>"
        f"<style>{STYLE}</style></head><body>{''.join(parts)}</body></html>\n"
    )


def _left_out(account: Account) -> list[str]:
    """Nothing for sources that are made: they have no files."""
    if not account.seen:
        return []
    rows = [(reason, count, example) for reason, (count, example) in account.skipped.items()]
    rows.sort(key=lambda row: (-row[1], row[0]))
    return [
        "<h2>Files of the source</h2>",
        f"<p>{account.seen} files, archive members and table rows seen, {account.used} of them used, "
        f"{account.seen - account.used} left out; {account.records} records.</p>",
        _table(("left out", "files", "such as"), rows) if rows else "",
    ]


def _png(pixels: np.ndarray | None) -> str:
    """A data URI; "" where there is no picture."""
    if pixels is None:
        return ""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _ratio(log2: float) -> str:
    return f"{2**log2:.3g}:1" if log2 >= 0 else f"1:{2**-log2:.3g}"


def _word_histogram(words: Counter[int], name: str) -> str:
    histogram = Histogram(0.5, max(words, default=0) + 0.5)
    for n, count in words.items():
        histogram.add(n, count)
    return _histogram(histogram, name, None, "")


def _text(value: Any) -> str:
    return html.escape(str(value), quote=True)


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "-"


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    def cell(value: Any, tag: str = "td") -> str:
        return f"<{tag} class=n>{value}</{tag}>" if isinstance(value, int) else f"<{tag}>{_text(value)}</{tag}>"

    body = "".join(f"<tr>{''.join(cell(value) for value in row)}</tr>" for row in rows)
    return f"<table><tr>{''.join(cell(name, 'th') for name in head)}</tr>{body}</table>"


def _bars(items: list[tuple[str, int]]) -> str:
    """Horizontal bars, the longest full."""
    most = max((n for _, n in items), default=0) or 1
    rows = "".join(
        f'<text x="200" y="{24 * i + 16}" text-anchor="end">{_text(name)}</text>'
        f'<rect x="210" y="{24 * i + 3}" width="{460 * n / most:.1f}" height="17" fill="#3d7ea6"/>'
        f'<text x="{216 + 460 * n / most:.1f}" y="{24 * i + 16}">{n}</text>'
        for i, (name, n) in enumerate(items)
    )
    return f'<svg width="760" height="{24 * len(items) + 4}" font-size="13" role="img">{rows}</svg>'


def _histogram(
    histogram: Histogram,
    name: str,
    threshold: float | None,
    limit: str,
    shown: Callable[[float], str] = "{:.3g}".format,
) -> str:
    """Bars, and the threshold as a line where it falls inside the range."""
    if not histogram.total:
        return f"<figure><figcaption>{_text(name)}: not scored</figcaption></figure>"
    most, low, high = histogram.counts.max(), histogram.low, histogram.high
    bars = "".join(
        f'<rect x="{10 * i}" y="{90 - 80 * n / most:.1f}" width="9" height="{80 * n / most:.1f}" fill="#3d7ea6"/>'
        for i, n in enumerate(histogram.counts)
    )
    line = ""
    if threshold is not None and low <= threshold <= high:
        x = 240 * (threshold - low) / (high - low)
        line = f'<line x1="{x:.1f}" x2="{x:.1f}" y1="4" y2="90" stroke="#c0392b" stroke-width="2"/>'
    says = f"; {limit} {shown(threshold)}" if threshold is not None else ""
    return (
        f'<figure><svg width="244" height="108" font-size="11" role="img">{bars}{line}'
        f'<text x="0" y="104">{shown(low)}</text><text x="240" y="104" text-anchor="end">{shown(high)}</text></svg>'
        f"<figcaption>{_text(name)} ({histogram.total}){_text(says)}</figcaption></figure>"
    )


def _examples(rule: str, items: list[dict]) -> str:
    pictures = [_png(item["pixels"]) for item in items]
    shots = "".join(
        "<figure class=shot>"
        + (f'<img src="{picture}" alt="">' if picture else "<div class=none>no picture</div>")
        + f"<figcaption>{_text(item['file'])}: {_text(item['detail'])}</figcaption></figure>"
        for item, picture in zip(items, pictures, strict=True)
    )
    return f"<h3>{_text(rule)}</h3><div class=row>{shots}</div>"
