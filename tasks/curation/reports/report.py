"""The report of a curation: one self-contained HTML file.

For a corpus of any size it shows counts, and pictures of a bounded sample (gallery.py). Figure numbers are those of the
paper (arXiv 2604.12163) that show the same.
"""

from __future__ import annotations

import math
from collections import Counter

from eval.html_page import page, table, text
from tasks.curation import ledger
from tasks.curation.decisions import tiers
from tasks.curation.reports.report_parts import (
    STYLE,
    bars,
    heat_map,
    histogram,
    lengths,
    percent,
    shot,
    wall,
)
from tasks.curation.reports.summary import LIMITS, RANGES, SOURCES, Summary
from tasks.curation.sources.base import Account


def render(summary: Summary) -> str:
    """The whole page."""
    content = summary.content()
    total, kept = content["input"], content["kept"]
    parts = [
        "<h1>Retention report</h1>",
        f"<p>{kept:,} of {total:,} records kept ({percent(kept, total)}): {content['captions']:,} captions, "
        f"{content['splits']['train']:,} records to train on, {content['splits']['val']:,} held out. "
        "Each record is kept, or counted under the first rule that it breaks; the counts add up to the input.</p>",
        *_files(summary.account),
        "<h2>What survives each step, by source (figure 5)</h2>",
        *_retention(summary, content),
        "<h2>Rejected, by rule</h2>",
        table(
            ("rule", "step", "records", "share of input"),
            [
                *(
                    (rule, step, content["rejected"][rule], percent(content["rejected"][rule], total))
                    for step, names in ledger.STEPS.items()
                    for rule in names
                ),
                ("kept", "", kept, percent(kept, total)),
                ("all", "", total, "100.0 %"),
            ],
        ),
        "<h2>Scores of the input, and their cuts</h2>",
        *_scores(summary),
        "<h2>On either side of each cut</h2>",
        *_edges(summary),
        "<h2>Tiers (figures 6 and 7)</h2>",
        *_tiers(summary, content),
        "<h2>Tiers and episodes (figure 9)</h2>",
        *_episodes(summary, content),
        "<h2>Words of the kept captions, by tier and episode (figure 8)</h2>",
        *_captions(summary),
        "<h2>Near duplicates</h2>",
        *_duplicates(summary),
        "<h2>Examples of what was rejected</h2>",
        *_examples(summary),
        "<h2>Thresholds and settings</h2>",
        *(
            f"<h3>{text(section)}</h3>" + table(("key", "value"), [(k, str(v)) for k, v in values.items()])
            for section, values in summary.config.model_dump(mode="json").items()
            if isinstance(values, dict)
        ),
    ]
    return page("Retention report", "".join(parts), STYLE)


def _files(account: Account) -> list[str]:
    """Empty for made sources, which have no files."""
    if not account.seen:
        return []
    rows = [(reason, count, example) for reason, (count, example) in account.skipped.items()]
    rows.sort(key=lambda row: (-row[1], row[0]))
    return [
        "<h2>Files of the source</h2>",
        f"<p>{account.seen:,} files, archive members and table rows seen, {account.used:,} of them used, "
        f"{account.seen - account.used:,} left out; {account.records:,} records.</p>",
        table(("left out", "files", "such as"), rows) if rows else "",
    ]


def _retention(summary: Summary, content: dict) -> list[str]:
    figures = [("all", content["input"], content["retention"])]
    if len(summary.by_source) > 1:
        counts = summary.source_counts
        figures += [(name, counts[name], summary.retention_of(name)) for name in summary.largest(counts)]
    drawn = [
        bars(
            [("input", records), *((step["step"], step["kept"]) for step in steps if step["step"] != ledger.SHARDS)],
            name if len(figures) > 1 else "",
            620,
        )
        for name, records, steps in figures
    ]
    more = len(summary.by_source) - SOURCES
    note = f"<p class=note>{more} smaller sources are in the first figure only.</p>" if more > 0 else ""
    return ["<div class=row>", *drawn, "</div>", note]


def _scores(summary: Summary) -> list[str]:
    filters = summary.config.filters
    drawn = []
    empty = [column for column in LIMITS if not summary.scores[column].total]
    for column, limit in LIMITS.items():
        cut = getattr(filters, limit)
        if column in empty:
            continue
        cuts = {} if cut is None else {limit: cut}
        if column == "aesthetic":
            cuts |= dict(zip(tiers.TIERS, summary.cuts, strict=False))
        drawn.append(histogram(summary.scores[column], column, cuts))
    if summary.scores["faces"].total:
        drawn.append(histogram(summary.scores["faces"], "faces"))
    side = {"min_side_px": math.log2(filters.min_side_px)}
    drawn.append(histogram(summary.scores["log2_short_side"], "shorter side, px", side, shown=lambda x: f"{2**x:.0f}"))
    drawn.append(histogram(summary.scores["log2_aspect"], "Shapes of the input, width over height", shown=_ratio))
    drawn.append(histogram(summary.shapes, "Shapes of what is kept", shown=_ratio))
    note = f"<p class=note>Not scored: {text(', '.join(empty))}. Nothing is cut by these.</p>" if empty else ""
    return ["<div class=row>", *drawn, "</div>", note]


def _edges(summary: Summary) -> list[str]:
    """Pictures on both sides of each threshold, nearest first."""
    drawn = []
    for (column, name), (cut, below, above) in summary.edges.items():
        if (not below and not above) or cut <= RANGES[column][0]:
            continue
        limit = f"tier {name}" if name in tiers.TIERS else name
        sides = (
            "rejected | kept"
            if name.startswith("min_")
            else "kept | rejected"
            if name.startswith("max_")
            else "below | at or above"
        )
        shots = [
            "".join(shot(summary.pixels.get(shown.position), f"{shown.note} {shown.file}") for shown in side)
            for side in (reversed(below), above)
        ]
        drawn.append(
            f"<h3>{text(column)}: {text(limit)} {cut:.4g} <span class=note>({sides})</span></h3><div class=row><div class=side>{shots[0]}</div>"
            f"<div class='side cut'>{shots[1]}</div></div>"
        )
    return drawn or ["<p class=note>No record that was scored is near a cut.</p>"]


def _tiers(summary: Summary, content: dict) -> list[str]:
    config = summary.config.tiers
    scorer = summary.revisions.get("aesthetic", "none: unscored records are A5")
    cuts = ", ".join(f"{tier} from {cut:.4g}" for tier, cut in zip(tiers.TIERS, summary.cuts, strict=False))
    by = "quantiles" if config.quantiles is not None else "thresholds"
    proxy = " The proxy knows contrast, colour and sharpness, and no taste." if scorer.startswith("proxy") else ""
    best = f" A1 and A2 only where {text(config.best_where)}." if config.best_where else ""
    drawn = [
        f"<p>By the aesthetic score of {text(scorer)}, by {by}: {cuts}.{best}{proxy} Synthetic records bypass the score and are "
        f"{config.synthetic_tier}.</p>",
        bars([("kept", content["kept"]), *content["tiers"].items()], width=620),
    ]
    for synthetic, name in ((False, "real"), (True, "synthetic")):
        for tier in tiers.TIERS:
            count, shown = summary.walls.get((tier, synthetic), (0, []))
            if count:
                drawn.append(f"<h3>{tier}, {name}: {count:,} records</h3>")
                drawn.append(wall((summary.pixels.get(item.position), item.file) for item in shown))
    return drawn


def _episodes(summary: Summary, content: dict) -> list[str]:
    names = summary.largest(content["buckets"])
    conditions = [(episode.name, episode.where) for episode in summary.config.buckets]
    return [
        heat_map(names, tiers.TIERS, summary.cells),
        f"<p class=note>{len(content['buckets']) - SOURCES} smaller episodes are not shown.</p>"
        if len(content["buckets"]) > SOURCES
        else "",
        table(("episode", "where"), conditions)
        if conditions
        else "<p class=note>The recipe has no curation.buckets.</p>",
    ]


def _captions(summary: Summary) -> list[str]:
    by_episode = {name: counts for name, counts in summary.episode_words.items() if counts}
    names = summary.largest({name: counts.total() for name, counts in by_episode.items()})
    rows: dict[str, Counter[int]] = {f"tier {tier}": words for tier, words in summary.words.items()}
    if len(names) > 1:
        rows |= {f"episode {name}": by_episode[name] for name in names}
    return [
        lengths(rows),
        "<p class=note>Line: 5% to 95% of the captions; box: the middle half; mark: the median.</p>",
    ]


def _duplicates(summary: Summary) -> list[str]:
    drawn = []
    for keeper, size, members in summary.duplicate_groups:
        shots = shot(summary.pixels.get(keeper), f"kept; {size} dropped for it")
        shots += "".join(shot(summary.pixels.get(shown.position), shown.note) for shown in members)
        drawn.append(f"<div class=side>{shots}</div>")
    return drawn or ["<p class=note>There are none.</p>"]


def _examples(summary: Summary) -> list[str]:
    drawn = []
    for rule in ledger.RULES:
        if shown := summary.examples.get(rule):
            shots = "".join(shot(summary.pixels.get(item.position), f"{item.file}: {item.note}") for item in shown)
            drawn.append(f"<h3>{text(rule)}</h3><div class=row>{shots}</div>")
    return drawn


def _ratio(log2: float) -> str:
    return f"{2**log2:.3g}:1" if log2 >= 0 else f"1:{2**-log2:.3g}"
