"""The counts of a curation, by SQL over its tables: only counts and a few examples reach Python."""

# ruff: noqa: S608 (SQL of our own names and numbers; texts are quoted by engines.quoted)
from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np

from tasks.curation import ledger
from tasks.curation.checks import CUTS
from tasks.curation.config import CaptionConfig, CurationConfig
from tasks.curation.decisions import rules, tiers
from tasks.curation.decisions.engines import PART, Engine, one, quoted, rows_of
from tasks.curation.reports import gallery
from tasks.curation.reports.gallery import Shown
from tasks.curation.scorers import COLUMNS, SCALARS, scorer_revisions
from tasks.curation.sources.base import Account

EXAMPLES = 6  # rejected pictures shown for each rule
SOURCES = 12  # sources and episodes with a separate figure
BINS = 24

# Column -> its threshold in FilterConfig.
LIMITS: dict[str, str] = {
    "bytes_per_pixel": "min_bytes_per_pixel",
    "entropy_bits": "min_entropy_bits",
    "single_color_fraction": "max_single_color_fraction",
    "border_fraction": "max_border_fraction",
    **{column: limit for limit, column in CUTS.items()},
}

# Histograms: column -> (lowest, highest); values out of range count in the outermost bin. Fixed, so that they can be
# filled shard by shard and compared between reports.
RANGES: dict[str, tuple[float, float]] = {
    "bytes_per_pixel": (0, 3),
    "entropy_bits": (0, 8),
    "single_color_fraction": (0, 1),
    "border_fraction": (0, 1),
    **{name: (COLUMNS[name].low, COLUMNS[name].high) for name in SCALARS if name != "faces"},
    "faces": (0, 24),
    "log2_short_side": (4, 13),  # 16 to 8,192 px
    "log2_aspect": (-3, 3),  # width over height, 1:8 to 8:1
}


class Histogram:
    """`BINS` equal bins over a fixed range."""

    def __init__(self, low: float, high: float) -> None:
        self.low, self.high = low, high
        self.counts = np.zeros(BINS, np.int64)

    def add(self, value: float, count: int = 1) -> None:
        place = int((value - self.low) / (self.high - self.low) * BINS)
        self.counts[min(BINS - 1, max(0, place))] += count

    @property
    def total(self) -> int:
        return int(self.counts.sum())


class Summary:
    """The content of report.json and report.html. A function of the tables, without times, so that equal input gives
    equal bytes."""

    def __init__(self, account: Account, config: CurationConfig, cuts: tuple[float, ...]) -> None:
        self.account, self.config, self.cuts = account, config, cuts
        self.revisions = scorer_revisions(config.scorers)
        self.input = self.kept = 0
        self.rejected: Counter[str] = Counter()
        self.by_source: dict[str, Counter[str]] = {}  # source -> records by rule, "" for kept ones
        self.examples: dict[str, list[Shown]] = {}  # by rule
        self.edges: dict[tuple[str, str], tuple[float, list[Shown], list[Shown]]] = {}  # (column, limit or tier)
        self.walls: dict[tuple[str, bool], tuple[int, list[Shown]]] = {}  # (tier, synthetic) -> count, examples
        self.duplicate_groups: list[tuple[int, int, list[Shown]]] = []  # keeper, number dropped for it, examples
        self.pixels: dict[int, np.ndarray] = {}  # position -> uint8 [h, w, 3] of shown records
        self.too_long_words: tuple[int, int] | None = None
        self.tiers: Counter[str] = Counter()
        self.cells: Counter[tuple[str, str]] = Counter()  # (episode, tier)
        self.sources: Counter[str] = Counter()
        self.splits: Counter[str] = Counter()
        self.words: dict[str, Counter[int]] = {tier: Counter() for tier in tiers.TIERS}  # of the kept captions
        self.episode_words: dict[str, Counter[int]] = {}
        self.shards = 0  # with a kept record
        self.scores = {name: Histogram(*bounds) for name, bounds in RANGES.items()}  # of every record that decodes
        self.shapes = Histogram(*RANGES["log2_aspect"])  # of the kept records

    @property
    def episodes(self) -> dict[str, int]:
        counts: Counter[str] = Counter()
        for (episode, _), count in self.cells.items():
            counts[episode] += count
        return dict(sorted(counts.items()))

    @property
    def source_counts(self) -> dict[str, int]:
        """Number of input records of each source."""
        return {name: counts.total() for name, counts in sorted(self.by_source.items())}

    def retention_of(self, source: str) -> list[dict]:
        """`ledger.retention` of one source."""
        counts = self.by_source[source]
        return ledger.retention(counts.total(), {rule: counts[rule] for rule in ledger.RULES})

    @staticmethod
    def largest(counts: dict[str, int]) -> list[str]:
        """The names with a separate figure, largest first."""
        return sorted(counts, key=lambda name: (-counts[name], name))[:SOURCES]

    def content(self) -> dict:
        """The content of report.json."""
        rejected = {rule: self.rejected[rule] for rule in ledger.RULES}
        assert self.input == self.kept + sum(rejected.values())
        words = Counter()
        for counts in self.words.values():
            words.update(counts)
        captions = sum(words.values())
        return {
            "input": self.input,
            "kept": self.kept,
            "rejected": rejected,
            "retention": ledger.retention(self.input, rejected),
            "examples": {
                rule: {"file": self.examples[rule][0].file, "detail": self.examples[rule][0].note}
                for rule in ledger.RULES
                if rule in self.examples
            },
            "too_long_words": list(self.too_long_words) if self.too_long_words else None,
            "account": self.account.to_json() | {"left_out": self.account.left_out()},
            "tiers": {tier: self.tiers[tier] for tier in tiers.TIERS},
            "tier_cuts": dict(zip(tiers.TIERS, self.cuts, strict=False)),
            "scorers": self.revisions,
            "retention_by_source": {name: self.retention_of(name) for name in self.largest(self.source_counts)},
            "buckets": self.episodes,  # under the name that stored summaries have
            "sources": dict(sorted(self.sources.items())),
            "splits": {name: self.splits[name] for name in ("train", "val")},
            "shards": self.shards,
            "captions": captions,
            "caption_words": {
                "min": min(words, default=0),
                "mean": sum(n * count for n, count in words.items()) / max(1, captions),
                "max": max(words, default=0),
            },
            "shapes": {
                "log2_aspect_from": self.shapes.low,
                "log2_aspect_to": self.shapes.high,
                "kept": self.shapes.counts.tolist(),
            },
        }


# Every record of `records` with its final rule and detail; those of duplicates are in `dropped`.
FATES = (
    "SELECT r.part, r.row, r.position, r.key, r.record_id, r.locator, r.source, r.synthetic, r.width, r.height, r.tier, r.bucket, r.split, "
    "r.words, r.chance, r.shortest, coalesce(d.rule, r.rule) AS rule, coalesce(d.detail, r.detail) AS detail "
    "FROM records r LEFT JOIN dropped d ON r.position = d.position"
)
SIZED = "width > 0 AND height > 0"
LOG2_SIDE = "log2(CAST(least(width, height) AS DOUBLE))"
LOG2_ASPECT = "log2(CAST(width AS DOUBLE) / height)"


def summarize(
    engine: Engine,
    config: CurationConfig,
    account: Account,
    cuts: tuple[float, ...],
    shards: int,
    thumbnails: Callable[[np.ndarray], dict[int, np.ndarray]],
) -> Summary:
    """Summarises the tables that decide.py made.

    Args:
        account: of the source and of all shards. cuts: of the tiers. shards: their number.
        thumbnails: returns the pictures of positions.
    """
    summary = Summary(account, config, cuts)
    for rule, count in _counts(engine, f"SELECT rule AS k, count(*) AS n FROM ({FATES}) f GROUP BY rule"):
        summary.rejected[rule] = count
    summary.kept = summary.rejected.pop("", 0)
    failed = list(rows_of(engine, "SELECT file, error AS detail FROM parts WHERE error <> '' ORDER BY part"))
    if failed:
        summary.rejected[ledger.SHARD_FAILED] = len(failed)
        summary.examples[ledger.SHARD_FAILED] = [Shown(-1, row["file"], row["detail"]) for row in failed[:EXAMPLES]]
    summary.input = summary.kept + sum(summary.rejected.values())
    for source, rule, count in _counts(
        engine, f"SELECT source, rule, count(*) AS n FROM ({FATES}) f GROUP BY source, rule"
    ):
        summary.by_source.setdefault(source, Counter())[rule] += count
    _examples(engine, summary)
    bounds = f"FROM ({FATES}) f WHERE rule = '{rules.CAPTION_TOO_LONG}'"
    if summary.rejected[rules.CAPTION_TOO_LONG]:
        low, high = (one(engine, f"SELECT {way}(shortest) AS n {bounds}") for way in ("min", "max"))
        summary.too_long_words = low, high
    for name, histogram in summary.scores.items():
        value, where = {"log2_short_side": (LOG2_SIDE, SIZED), "log2_aspect": (LOG2_ASPECT, SIZED)}.get(
            name, (name, f"NOT isnan({name})")
        )
        _fill(engine, histogram, value, f"scores WHERE {where}")
    _fill(engine, summary.shapes, LOG2_ASPECT, f"({FATES}) f WHERE rule = ''")
    _kept(engine, summary, config.captions)
    _choose(engine, summary, gallery.picture_shards(shards), thumbnails)
    return summary


def _counts(engine: Engine, query: str) -> list[tuple]:
    return [tuple(row.values()) for row in rows_of(engine, query)]


def _fill(engine: Engine, histogram: Histogram, value: str, rows: str) -> None:
    bounds = f"CAST({histogram.low} AS DOUBLE), CAST({histogram.high} AS DOUBLE)"
    query = f"SELECT bin_of({value}, {bounds}, {BINS}) AS k, count(*) AS n FROM {rows} GROUP BY 1"
    for place, count in _counts(engine, query):
        histogram.counts[place] += count


def _examples(engine: Engine, summary: Summary) -> None:
    """The first few records of each rule."""
    query = (
        "SELECT rule, locator AS file, detail, position FROM (SELECT rule, locator, detail, position, row_number() OVER "
        f"(PARTITION BY rule ORDER BY position) AS place FROM ({FATES}) f WHERE rule <> '') x "
        f"WHERE place <= {EXAMPLES} ORDER BY rule, place"
    )
    for row in rows_of(engine, query):
        summary.examples.setdefault(row["rule"], []).append(Shown(row["position"], row["file"], row["detail"]))


def _choose(
    engine: Engine,
    summary: Summary,
    shards: list[int],
    thumbnails: Callable[[np.ndarray], dict[int, np.ndarray]],
) -> None:
    """Chooses the records of `shards` whose pictures the report shows, and fetches the pictures."""
    scored = f"SELECT *, part * {PART} + row AS position, locator AS file FROM scores"
    tiered = (
        "SELECT f.part, f.position, f.record_id, f.locator AS file, s.aesthetic "
        f"FROM ({FATES}) f JOIN scores s ON f.part = s.part AND f.row = s.row WHERE f.rule = '' AND NOT f.synthetic"
    )
    for column, limit in LIMITS.items():
        cut = getattr(summary.config.filters, limit)
        if cut is not None and summary.scores[column].total:
            summary.edges[column, limit] = (cut, *gallery.nearest(engine, column, cut, scored, shards))
    for tier, cut in zip(tiers.TIERS, summary.cuts, strict=False):
        summary.edges["aesthetic", tier] = (cut, *gallery.nearest(engine, "aesthetic", cut, tiered, shards))
    kinds = f"SELECT tier, synthetic, count(*) AS n FROM ({FATES}) f WHERE rule = '' GROUP BY tier, synthetic"
    for tier, synthetic, count in sorted(_counts(engine, kinds)):
        where = f"rule = '' AND tier = {quoted(tier)} AND synthetic = {str(synthetic).upper()}"
        summary.walls[tier, synthetic] = count, gallery.mosaic(engine, FATES, where, shards)
    summary.duplicate_groups = gallery.duplicate_groups(engine)
    chosen = {shown.position for examples in summary.examples.values() for shown in examples}
    chosen = {position for position in chosen if gallery.shard_of(position) in shards}
    chosen |= {shown.position for _, below, above in summary.edges.values() for shown in (*below, *above)}
    chosen |= {shown.position for _, wall in summary.walls.values() for shown in wall}
    for keeper, _, members in summary.duplicate_groups:
        chosen |= {keeper, *(shown.position for shown in members)}
    summary.pixels = thumbnails(np.array(sorted(chosen), np.int64))


def _kept(engine: Engine, summary: Summary, config: CaptionConfig) -> None:
    """Counts of the kept records, and of the words of their captions."""
    engine.create(
        "kept",
        "SELECT f.part, f.source, f.tier, f.bucket, f.split, f.chance, coalesce(m.words, f.words) AS words "
        f"FROM ({FATES}) f LEFT JOIN merged m ON f.position = m.position WHERE f.rule = ''",
    )
    for *names, count in _counts(
        engine, "SELECT source, tier, bucket, split, count(*) AS n FROM kept GROUP BY source, tier, bucket, split"
    ):
        source, tier, episode, split = names
        summary.sources[source] += count
        summary.tiers[tier] += count
        summary.cells[episode, tier] += count
        summary.splits[split] += count
    summary.shards = one(engine, "SELECT count(DISTINCT part) AS n FROM kept")
    for tier, words in summary.words.items():
        chosen = " UNION ALL ".join(
            f"SELECT bucket, {words_sql} AS w FROM kept WHERE tier = '{tier}' AND {where}"
            for words_sql, where in _chosen_words(config.per_tier[tier])
        )
        query = f"SELECT bucket, w, count(*) AS n FROM ({chosen}) x GROUP BY bucket, w"
        for episode, number, count in _counts(engine, query):
            words[number] += count
            summary.episode_words.setdefault(episode, Counter())[number] += count


def _chosen_words(limit: int) -> list[tuple[str, str]]:
    """SQL of the word counts of the captions that captions.choose_captions keeps, and of the records to which each
    applies."""
    more = f"size(words) > {limit}"
    if limit == 1:
        return [("nth(words, 1)", "size(words) = 1"), ("nth(words, 1 + chance % size(words))", more)]
    ranks = [f"1 + round_half_even({i} * ((size(words) - 1) / CAST({limit - 1} AS DOUBLE)))" for i in range(limit)]
    return [("explode(words)", f"size(words) <= {limit}"), *((f"nth(words, {rank})", more) for rank in ranks)]
