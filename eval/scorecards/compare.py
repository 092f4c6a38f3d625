"""Compares two scorecards prompt by prompt, with a verdict: `python -m eval.cli compare A B`.

    A/scores.parquet, B/scores.parquet --same prompts--> differences --stats.compare--> better, worse, equal, cannot tell

The verdict is about these two sets of weights and settings. Whether their recipes differ also depends on training
seeds, whose noise more prompts or images do not reduce: tasks.compare takes several trainings.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from eval import stats
from eval.benchmarks.base import Pooling
from eval.judging.run import Row, prompt_scores, read_rows
from eval.scorecards import card as cards
from eval.scorecards.card import Scorecard

SCORES = "scores.parquet"
# Settings that may differ without being the compared change, such as derived ones.
CONSEQUENCES = {"images_sha256", "versions", "prompt_set_sha256"}


class Compared(BaseModel):
    """One difference, B minus A, in the benchmark's own scale. `p` of a category is adjusted for their number (Holm)."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    a: float
    b: float
    difference: float
    interval: tuple[float, float]
    p: float
    visible: float
    verdict: str
    prompts: int


class Comparison(BaseModel):
    """B against A. `differing`: settings that differ, which may explain the difference."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: str
    overall: Compared
    categories: dict[str, Compared]
    held_out: Compared | None
    differing: dict[str, tuple[Any, Any]]
    sentence: str


def read_scores(folder: str | Path) -> tuple[Scorecard, list[Row]]:
    """
    Raises:
        ValueError: no scorecard there, or no table of its images.
    """
    folder = Path(folder)
    folder = folder.parent if folder.is_file() else folder
    return cards.load(folder), read_rows(folder / SCORES)


def prompt_means(rows: Sequence[Row], pooling: Pooling, split: str = "seen") -> dict[str, dict[str, float]]:
    """category -> prompt id -> mean score over its images and seeds."""
    mine = [row for row in rows if (row["split"] == "held_out") == (split == "held_out")]
    units = prompt_scores(mine, pooling)
    return {name: {i: sum(v) / len(v) for i, v in sorted(units[name].items())} for name in sorted(units)}


def pairs(a: Mapping[str, Mapping[str, float]], b: Mapping[str, Mapping[str, float]]) -> stats.Pairs:
    """(score of A, of B) of the prompts that both have, by category; categories that one lacks are left out."""
    both = {name: sorted(a[name].keys() & b[name].keys()) for name in sorted(a.keys() & b.keys())}
    return {name: [(a[name][i], b[name][i]) for i in ids] for name, ids in both.items() if ids}


def compare_runs(a: str | Path, b: str | Path, margin: float | None = None) -> Comparison:
    """B against A.

    Args:
        a, b: folders with scorecard.json and scores.parquet.
        margin: differences below it count as "equal", in the benchmark's own scale; None: no verdict "equal".

    Raises:
        ValueError: a folder has no scorecard, or the two have different prompts or judges.
    """
    (card_a, rows_a), (card_b, rows_b) = read_scores(a), read_scores(b)
    if reason := cards.not_comparable(card_a, card_b):
        raise ValueError(f"{a} and {b} cannot be compared: {reason}")
    scale, pooling = card_a.scale, "prompts" if card_a.pooling == "prompts" else "categories"
    margin = None if margin is None else margin / scale
    seen = pairs(prompt_means(rows_a, card_a.pooling), prompt_means(rows_b, card_a.pooling))
    if not seen:
        raise ValueError(f"{a} and {b} have no scored prompt in common")
    overall = stats.compare(seen, pooling, margin=margin)
    each = {name: stats.compare({name: values}, pooling, margin=margin) for name, values in seen.items()}
    adjusted = dict(zip(each, stats.holm([d.p for d in each.values()]), strict=True))
    held_out = pairs(*(prompt_means(rows, card_a.pooling, "held_out") for rows in (rows_a, rows_b)))
    held = stats.compare(held_out, pooling, margin=margin) if held_out else None
    result = _compared(overall, seen, pooling, scale)
    return Comparison(
        name=card_a.name if card_a.name == card_b.name else f"{card_a.name} and {card_b.name}",
        overall=result,
        categories={name: _compared(d, {name: seen[name]}, pooling, scale, adjusted[name]) for name, d in each.items()},
        held_out=_compared(held, held_out, pooling, scale) if held else None,
        differing=_differing(card_a, card_b),
        sentence=_sentence(result, card_a.name, margin and margin * scale),
    )


def _compared(d: stats.Difference, values: stats.Pairs, pooling: str, scale: float, p: float | None = None) -> Compared:
    sides = []
    for side in (0, 1):
        means = [[pair[side] for pair in of] for of in values.values()]
        if pooling == "prompts":
            means = [[v for of in means for v in of]]
        sides.append(scale * sum(sum(of) / len(of) for of in means) / len(means))
    verdict = d.verdict
    if p is not None and p > 1 - stats.LEVEL and verdict in ("better", "worse"):
        verdict = "cannot tell"  # not after one test per category
    return Compared(
        a=sides[0],
        b=sides[1],
        difference=scale * d.mean,
        interval=(scale * d.low, scale * d.high),
        p=d.p if p is None else p,
        visible=scale * d.visible,
        verdict=verdict,
        prompts=d.n_prompts,
    )


def _sentence(c: Compared, name: str, margin: float | None) -> str:
    numbers = f"{name} {c.a:.3f} to {c.b:.3f}, difference {c.difference:+.3f} ({c.interval[0]:+.3f} to {c.interval[1]:+.3f}), p {c.p:.3f}, {c.prompts} prompts"  # fmt: skip
    if c.verdict == "equal":
        return f"equal within +-{margin:g}: {numbers}"
    if c.verdict == "cannot tell":
        return f"cannot tell: {numbers}; the smallest visible difference is {c.visible:.3f}"
    return f"{c.verdict}: {numbers}"


def _differing(a: Scorecard, b: Scorecard) -> dict[str, tuple[Any, Any]]:
    sides = [card.settings.model_dump(mode="json") for card in (a, b)]
    return {k: (sides[0][k], sides[1][k]) for k in sides[0] if sides[0][k] != sides[1][k] and k not in CONSEQUENCES}


def lines(comparison: Comparison) -> list[str]:
    """The comparison as lines of text."""
    lines = [comparison.sentence]
    rows = dict(comparison.categories)
    if comparison.held_out:
        rows["held out"] = comparison.held_out
    for name, c in rows.items():
        interval = f"({c.interval[0]:+.3f} to {c.interval[1]:+.3f})"
        lines.append(f"  {name:<20} {c.a:.3f} to {c.b:.3f}  {c.difference:+.3f} {interval}  p {c.p:.3f}  {c.verdict}")
    for key, (one, other) in comparison.differing.items():
        lines.append(f"  differs: {key}: {one} | {other}")
    return lines


def compare_to_incumbent(incumbent: str | Path, current: str | Path) -> tuple[str | None, str]:
    """(the verdict on `current`, None if the cards cannot be compared; a sentence about it)."""
    (card_a, _), (card_b, _) = read_scores(incumbent), read_scores(current)
    if reason := cards.not_comparable(card_a, card_b):
        return None, f"{card_b.name}: not compared with the incumbent: {reason}"
    comparison = compare_runs(incumbent, current)
    changed = [name for name in comparison.differing if name != "model_digests"]
    note = f"; settings that differ, too: {', '.join(changed)}" if changed else ""
    return comparison.overall.verdict, comparison.sentence + note
