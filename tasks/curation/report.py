"""The retention report: one HTML file that needs nothing else, every text in it escaped."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd

from tasks.curation import filters, ledger, tiers
from tasks.curation.config import CurationConfig

EXAMPLES = 6  # rejected pictures shown for each rule
PICTURE_PX = 96
MAX_PICTURE_PIXELS = 4_000_000  # a report decodes no giants

# score column -> its thresholds in FilterConfig
HISTOGRAMS = {
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


def pick_examples(book: pd.DataFrame) -> dict[str, list[dict]]:
    """The first few records that each rule rejected: rule -> [{"key", "detail"}]."""
    rejected = book[~book["kept"]]
    return {
        rule: [{"key": row.key, "detail": row.detail} for row in part.head(EXAMPLES).itertuples()]
        for rule, part in rejected.groupby("rule")
    }


def picture(data: bytes, max_pixels: int) -> str:
    """A small PNG of a record as a data URI; empty if it does not decode."""
    try:
        image = filters.decode(data, min(max_pixels, MAX_PICTURE_PIXELS))
    except ValueError:
        return ""
    image.thumbnail((PICTURE_PX, PICTURE_PX))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def render(
    summary: dict,
    scores: pd.DataFrame,
    book: pd.DataFrame,
    curated: pd.DataFrame,
    gallery: dict[str, list[dict]],
    config: CurationConfig,
) -> str:
    """The whole page.

    Args:
        summary: as curate.summarise makes it.
        scores: the scores of every input record.
        book: the ledger.
        curated: the records kept.
        gallery: rule -> [{"key", "detail", "picture"}].
    """
    input_count, kept = summary["input"], summary["kept"]
    words = [len(text.split()) for captions in curated["captions"] for text in captions]
    by_tier = {
        tier: [len(text.split()) for captions in curated.loc[curated["tier"] == tier, "captions"] for text in captions]
        for tier in tiers.TIERS
    }
    rules = [(rule, step, summary["rejected"][rule]) for step, names in ledger.STEPS.items() for rule in names]
    buckets = sorted(summary["buckets"])
    cross = pd.crosstab(curated["bucket"], curated["tier"]).reindex(columns=tiers.TIERS, fill_value=0)
    short_side = scores[["width", "height"]].min(axis=1)
    parts = [
        "<h1>Retention report</h1>",
        f"<p>{kept} of {input_count} records kept ({_percent(kept, input_count)}): {summary['captions']} captions, "
        f"{summary['splits']['train']} records to train on, {summary['splits']['val']} held out. "
        "Each record is kept, or counted under the first rule that it breaks; the counts add up to the input.</p>",
        "<h2>What survives each step</h2>",
        _bars([("input", input_count)] + [(step["step"], step["kept"]) for step in summary["retention"]]),
        "<h2>Rejected, by rule</h2>",
        _table(
            ("rule", "step", "records", "share of input"),
            [(rule, step, n, _percent(n, input_count)) for rule, step, n in rules]
            + [("kept", "", kept, _percent(kept, input_count)), ("all", "", input_count, "100.0 %")],
        ),
        "<h2>Scores of the input, and their thresholds</h2><div class=row>",
        *(
            _histogram(scores[column].dropna(), column, getattr(config.filters, limit), limit)
            for column, limit in HISTOGRAMS.items()
        ),
        _histogram(short_side, "shorter side, px", config.filters.min_side_px, "min_side_px"),
        "</div>",
        "<h2>Tiers and episodic buckets</h2>",
        _bars([(tier, n) for tier, n in summary["tiers"].items()]),
        _table(
            ("bucket", *tiers.TIERS, "all"),
            [(name, *(int(n) for n in cross.loc[name]), summary["buckets"][name]) for name in buckets],
        ),
        "<h2>Caption lengths, in words</h2><div class=row>",
        _histogram(pd.Series(words), "all captions", None, ""),
        *(_histogram(pd.Series(found), f"tier {tier}", None, "") for tier, found in by_tier.items() if found),
        "</div>",
        "<h2>Examples of what was rejected</h2>",
        *(_examples(rule, gallery[rule]) for rule in ledger.RULES if gallery.get(rule)),
        "<h2>Thresholds</h2>",
        *(
            f"<h3>{_text(section)}</h3>" + _table(("key", "value"), [(k, str(v)) for k, v in values.items()])
            for section, values in config.model_dump(mode="json").items()
        ),
    ]
    return (
        "<!doctype html><html lang=en><head><meta charset=utf-8><title>Retention report</title>"
        f"<style>{STYLE}</style></head><body>{''.join(parts)}</body></html>\n"
    )


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


def _histogram(values: pd.Series, name: str, threshold: float | None, limit: str) -> str:
    """24 bins over what there is; the threshold as a line where it falls inside."""
    if not len(values):
        return f"<figure><figcaption>{_text(name)}: not scored</figcaption></figure>"
    data = values.to_numpy(float)
    low, high = float(data.min()), float(data.max())
    if threshold is not None and abs(threshold - low) < 2 * (high - low) + 1:
        low, high = min(low, threshold), max(high, threshold)
    if high <= low:
        low, high = low - 0.5, high + 0.5
    counts, _ = np.histogram(data, bins=24, range=(low, high))
    bars = "".join(
        f'<rect x="{10 * i}" y="{90 - 80 * n / counts.max():.1f}" width="9" height="{80 * n / counts.max():.1f}" '
        'fill="#3d7ea6"/>'
        for i, n in enumerate(counts)
    )
    line = ""
    if threshold is not None and low <= threshold <= high:
        x = 240 * (threshold - low) / (high - low)
        line = f'<line x1="{x:.1f}" x2="{x:.1f}" y1="4" y2="90" stroke="#c0392b" stroke-width="2"/>'
    says = f"; {limit} {threshold:g}" if threshold is not None else ""
    return (
        f'<figure><svg width="244" height="108" font-size="11" role="img">{bars}{line}'
        f'<text x="0" y="104">{low:.3g}</text><text x="240" y="104" text-anchor="end">{high:.3g}</text></svg>'
        f"<figcaption>{_text(name)} ({len(data)}){_text(says)}</figcaption></figure>"
    )


def _examples(rule: str, items: list[dict]) -> str:
    shots = "".join(
        "<figure class=shot>"
        + (f'<img src="{item["picture"]}" alt="">' if item["picture"] else "<div class=none>no picture</div>")
        + f"<figcaption>{_text(item['key'])}: {_text(item['detail'])}</figcaption></figure>"
        for item in items
    )
    return f"<h3>{_text(rule)}</h3><div class=row>{shots}</div>"
