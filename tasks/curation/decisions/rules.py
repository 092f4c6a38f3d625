"""The rules of passes 1 to 3 and of captions, as SQL over the columns of scores: no image is read, and no row is in Python.

A rule names the records that it rejects (`where`) and says why in one sentence (`detail`); both depend on the recipe alone.
A missing value (NULL or NaN) rejects nothing. The SQL is for both table engines (engines.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

from tasks.curation.config import CurationConfig
from tasks.curation.decisions.engines import quoted
from tasks.curation.sources.base import PROBLEMS

SOURCE, PASS1, PASS2, PASS3, CAPTIONS = (
    "source",
    "format and geometry",
    "histogram and orientation",
    "models",
    "captions",
)
DEDUP, DUPLICATES = "deduplication", ("exact_duplicate", "near_duplicate")
NO_CAPTION, CAPTION_TOO_LONG = "no_caption", "caption_too_long"


@dataclass(frozen=True)
class Rule:
    """`where` and `detail` are SQL expressions, BOOLEAN and STRING."""

    name: str
    step: str
    where: Callable[[CurationConfig], str]
    detail: Callable[[CurationConfig], str]


def _problem(name: str) -> Rule:
    return Rule(name, SOURCE, lambda c: f"problem = '{name}'", lambda c: "problem_detail")


def _limit(name: str, step: str, column: str, limit: str, sign: str) -> Rule:
    """Rejects values beyond a limit of `FilterConfig`; one that is None rejects nothing. NaN is SQL's largest number."""
    side = "over" if sign == ">" else "under"

    def where(config: CurationConfig) -> str:
        value = getattr(config.filters, limit)
        return "FALSE" if value is None else f"({column} {sign} {_double(value)} AND NOT isnan({column}))"

    def detail(config: CurationConfig) -> str:
        value = getattr(config.filters, limit)
        return _sentence(f"{column} ", f"number_text({column})", f" is {side} {limit} {_number(value or 0)}")

    return Rule(name, step, where, detail)


def _above(name: str, step: str, column: str, limit: str) -> Rule:
    return _limit(name, step, column, limit, ">")


def _below(name: str, step: str, column: str, limit: str) -> Rule:
    return _limit(name, step, column, limit, "<")


def _sentence(*parts: str) -> str:
    """SQL that joins texts and expressions, in turns, a text first."""
    return f"concat({', '.join(part if i % 2 else quoted(part) for i, part in enumerate(parts))})"


def _double(value: float) -> str:
    return f"CAST({float(value)!r} AS DOUBLE)"


def _number(value: float) -> str:
    return f"{value:g}"


def _listed(values: Iterable[Any]) -> str:
    return ", ".join(quoted(str(value)) for value in values) or "''"


SIZE = "width, 'x', height"

# The order is the order of rejection: the ledger names the first rule that a record breaks.
RULES: tuple[Rule, ...] = (
    *(_problem(name) for name in PROBLEMS),
    Rule(
        "too_many_pixels",
        PASS1,
        lambda c: f"(error_rule = 'too_many_pixels' OR width * height > {c.filters.max_pixels})",
        lambda c: (
            f"CASE WHEN error <> '' THEN error ELSE concat({SIZE}, ' is over max_pixels {c.filters.max_pixels}') END"
        ),
    ),
    Rule("undecodable", PASS1, lambda c: "error_rule = 'undecodable'", lambda c: "error"),
    Rule(
        "format",
        PASS1,
        lambda c: f"format NOT IN ({_listed(c.filters.formats)})",
        lambda c: f"concat(format, {quoted(' is not one of ' + ', '.join(c.filters.formats))})",
    ),
    Rule(
        "mode",
        PASS1,
        lambda c: f"mode NOT IN ({_listed(c.filters.modes)})",
        lambda c: f"concat(mode, {quoted(' is not one of ' + ', '.join(c.filters.modes))})",
    ),
    Rule(
        "animated",
        PASS1,
        lambda c: "animated" if c.filters.animated == "reject" else "FALSE",
        lambda c: "'more than one frame; curation.filters.animated=first_frame keeps the first'",
    ),
    Rule(
        "min_side",
        PASS1,
        lambda c: f"least(width, height) < {c.filters.min_side_px}",
        lambda c: f"concat({SIZE}, ' px: a side is under min_side_px {c.filters.min_side_px}')",
    ),
    Rule(
        "aspect_ratio",
        PASS1,
        lambda c: f"greatest(width, height) > {_double(c.filters.max_aspect_ratio)} * least(width, height)",
        lambda c: f"concat({SIZE}, ' is longer than max_aspect_ratio {_number(c.filters.max_aspect_ratio)}')",
    ),
    _below("bytes_per_pixel", PASS1, "bytes_per_pixel", "min_bytes_per_pixel"),
    _above("single_color", PASS2, "single_color_fraction", "max_single_color_fraction"),
    _below("low_entropy", PASS2, "entropy_bits", "min_entropy_bits"),
    _above("border", PASS2, "border_fraction", "max_border_fraction"),
    _above("nsfw", PASS3, "nsfw", "max_nsfw"),
    _above("watermark", PASS3, "watermark", "max_watermark_score"),
    _above("text_area", PASS3, "text_area", "max_text_area"),
    _above("quality", PASS3, "quality", "max_quality"),
    _below("aesthetic", PASS3, "aesthetic", "min_aesthetic"),
    _below("image_text_similarity", PASS3, "similarity", "min_image_text_similarity"),
    # Before deduplication, so that a record without a caption never displaces its twin that has one.
    Rule(
        NO_CAPTION,
        CAPTIONS,
        lambda c: f"(size(words) = 0 AND problem NOT IN ({_listed(DUPLICATES)}))" if c.captions.required else "FALSE",
        lambda c: "CASE WHEN problem_detail <> '' THEN problem_detail ELSE 'no caption' END",
    ),
    Rule(
        CAPTION_TOO_LONG,
        CAPTIONS,
        lambda c: f"array_min(words) > {c.captions.max_words}",
        lambda c: (
            f"concat('every caption is over max_words {c.captions.max_words} (the shortest has ', array_min(words), ')')"
        ),
    ),
    # Found by deduplication before the others were given captions (captioning/run.py).
    *(replace(_problem(name), step=DEDUP) for name in DUPLICATES),
)


def rule_sql(config: CurationConfig) -> str:
    """The name of the first rule that a row of scores breaks, '' if none."""
    cases = " ".join(f"WHEN {rule.where(config)} THEN '{rule.name}'" for rule in RULES)
    return f"CASE {cases} ELSE '' END"


def detail_sql(config: CurationConfig) -> str:
    """The sentence of the rule in the column `rule`, '' if none."""
    cases = " ".join(f"WHEN '{rule.name}' THEN {rule.detail(config)}" for rule in RULES)
    return f"CASE rule {cases} ELSE '' END"
