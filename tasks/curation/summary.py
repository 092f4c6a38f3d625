"""The counts of a curation, collected shard by shard: of what passes through, only counts and a few examples stay."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np
import pandas as pd
import pyarrow as pa

from tasks.curation import ledger, tiers
from tasks.curation.captions import count_words
from tasks.curation.checks import CUTS
from tasks.curation.config import CurationConfig
from tasks.curation.gallery import Groups, Mosaic, Nearest, Shown
from tasks.curation.scorers import COLUMNS, SCALARS, scorer_revisions
from tasks.curation.sources.base import Account
from tasks.store import Part

EXAMPLES = 6  # rejected pictures shown for each rule
SOURCES = 12  # sources and buckets with a figure of their own; the others are counted together
BINS = 24

# Column -> its threshold in FilterConfig.
LIMITS: dict[str, str] = {
    "bytes_per_pixel": "min_bytes_per_pixel",
    "entropy_bits": "min_entropy_bits",
    "single_color_fraction": "max_single_color_fraction",
    "border_fraction": "max_border_fraction",
    **{column: limit for limit, column in CUTS.items()},
}

# Histograms: column -> (lowest, highest); what lies beyond counts in the outermost bin. Fixed, so that they can be
# filled shard by shard, and that two reports compare.
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

    def add(self, values: np.ndarray) -> None:
        values = values[~np.isnan(values)]
        self.counts += np.histogram(np.clip(values, self.low, self.high), BINS, (self.low, self.high))[0]

    @property
    def total(self) -> int:
        return int(self.counts.sum())


class Summary:
    """What report.json and report.html say. A function of the tables, without times, so that equal input gives equal
    bytes."""

    def __init__(self, scan: Account, config: CurationConfig, cuts: tuple[float, ...]) -> None:
        self.account, self.config, self.cuts = scan, config, cuts
        self.revisions = scorer_revisions(config.scorers)
        self.input = self.kept = 0
        self.rejected: Counter[str] = Counter()
        self.by_source: dict[str, Counter[str]] = {}  # source -> records by rule, "" for those that are kept
        self.examples: dict[str, list[Shown]] = {}  # by rule
        limits = {name: getattr(config.filters, limit) for name, limit in LIMITS.items()}
        self.nearest = {(name, LIMITS[name]): Nearest(value) for name, value in limits.items() if value is not None}
        self.nearest |= {("aesthetic", tier): Nearest(cut) for tier, cut in zip(tiers.TIERS, cuts, strict=False)}
        self.mosaics: dict[tuple[str, bool], Mosaic] = {}  # (tier, synthetic)
        self.groups = Groups()
        # What the report shows, once `fetch` chose it.
        self.edges: dict[tuple[str, str], tuple[float, list[Shown], list[Shown]]] = {}  # (column, limit or tier)
        self.walls: dict[tuple[str, bool], tuple[int, list[Shown]]] = {}  # (tier, synthetic) -> records, some of them
        self.duplicate_groups: list[tuple[int, int, list[Shown]]] = []  # keeper, records dropped for it, some of them
        self.pixels: dict[int, np.ndarray] = {}  # position -> uint8 [h, w, 3] of those that are shown
        self.too_long_words: tuple[int, int] | None = None
        self.tiers: Counter[str] = Counter()
        self.cells: Counter[tuple[str, str]] = Counter()  # (bucket, tier)
        self.sources: Counter[str] = Counter()
        self.splits: Counter[str] = Counter()
        self.words: dict[str, Counter[int]] = {tier: Counter() for tier in tiers.TIERS}  # of the kept captions
        self.bucket_words: dict[str, Counter[int]] = {}
        self.shards = 0  # with a kept record
        self.scores = {name: Histogram(*bounds) for name, bounds in RANGES.items()}  # of every record that decodes
        self.shapes = Histogram(*RANGES["log2_aspect"])  # of the kept records

    def add(self, scores: pd.DataFrame, rows: pa.Table, kept: pd.DataFrame, start: int, shows: bool) -> None:
        """Counts one shard.

        Args:
            scores: of every record. rows: of the ledger, in the same order. kept: see decide._kept_rows.
            start: position of the first record in the corpus. shows: whether its pictures may be shown.
        """
        self.input += len(scores)
        self.kept += len(kept)
        rules = np.asarray(rows["rule"].to_pylist(), object)
        for rule, count in Counter(rules[rules != ""]).items():
            self.rejected[rule] += count
            shown = self.examples.setdefault(rule, [])
            for row in np.flatnonzero(rules == rule)[: EXAMPLES - len(shown)].tolist():
                shown.append(Shown(start + row, rows["file"][row].as_py(), rows["detail"][row].as_py()))
        for (source, rule), count in Counter(zip(scores["source"], rules, strict=True)).items():
            self.by_source.setdefault(source, Counter())[rule] += count
        shortest = [min(scores["words"].iloc[i]) for i in np.flatnonzero(rules == ledger.CAPTION_TOO_LONG)]
        if shortest:
            low, high = self.too_long_words or (shortest[0], shortest[0])
            self.too_long_words = int(min(low, *shortest)), int(max(high, *shortest))
        for name, histogram in self.scores.items():
            if name in scores:
                histogram.add(scores[name].to_numpy(float))
        sized = scores[(scores["width"] > 0) & (scores["height"] > 0)]
        self.scores["log2_short_side"].add(np.log2(sized[["width", "height"]].min(axis=1).to_numpy(float)))
        self.scores["log2_aspect"].add(_log2_aspect(sized))
        self.shapes.add(_log2_aspect(kept))
        self.tiers.update(kept["tier"])
        self.cells.update(zip(kept["bucket"], kept["tier"], strict=True))
        self.sources.update(kept["source"])
        self.splits.update(kept["split"])
        self.shards += len(kept) > 0
        for tier, bucket, captions in zip(kept["tier"], kept["bucket"], kept["captions"], strict=True):
            words = [count_words(caption) for caption in captions]
            self.words[tier].update(words)
            self.bucket_words.setdefault(bucket, Counter()).update(words)
        self._choose(scores, kept, start, shows)

    def _choose(self, scores: pd.DataFrame, kept: pd.DataFrame, start: int, shows: bool) -> None:
        """Chooses records of the shard for the report's pictures."""
        row_of = {row: i for i, row in enumerate(scores["row"])}
        places = start + np.array([row_of[row] for row in kept["row"]], int)
        for (tier, synthetic), members in kept.groupby(["tier", "synthetic"]).indices.items():
            mosaic = self.mosaics.setdefault((tier, bool(synthetic)), Mosaic())
            if shows:
                chosen = kept.iloc[members]
                mosaic.add(chosen["record_id"].tolist(), places[members], chosen["locator"].tolist())
            else:
                mosaic.count += len(members)
        if not shows:
            return
        scored = ~kept["synthetic"].to_numpy(bool)
        for (column, name), nearest in self.nearest.items():
            table, positions = (kept[scored], places[scored]) if name in tiers.TIERS else (scores, None)
            if column in table:
                positions = start + np.arange(len(scores)) if positions is None else positions
                values = table[column].to_numpy(float)
                nearest.add(values, table["record_id"].tolist(), positions, table["locator"].tolist())

    def fetch(self, pictures: Callable[[np.ndarray], dict[int, np.ndarray]], shows: Callable[[int], bool]) -> None:
        """Fetches the pictures of the records that were chosen.

        Args:
            pictures: gives those of positions. shows: whether pictures of a position's shard may be shown.
        """
        self.edges = {key: (nearest.cut, *nearest.shown()) for key, nearest in self.nearest.items()}
        self.walls = {key: (mosaic.count, mosaic.shown()) for key, mosaic in sorted(self.mosaics.items())}
        self.duplicate_groups = self.groups.shown()
        chosen = {shown.position for examples in self.examples.values() for shown in examples if shows(shown.position)}
        chosen |= {shown.position for _, below, above in self.edges.values() for shown in (*below, *above)}
        chosen |= {shown.position for _, mosaic in self.walls.values() for shown in mosaic}
        for keeper, _, members in self.duplicate_groups:
            chosen |= {keeper, *(shown.position for shown in members)}
        self.pixels = pictures(np.array(sorted(p for p in chosen if p >= 0), np.int64))

    def add_failed(self, part: Part, file: str) -> None:
        """Counts a shard that could not be scored; it stands in the ledger in place of its records."""
        self.input += 1
        self.rejected[ledger.SHARD_FAILED] += 1
        shown = self.examples.setdefault(ledger.SHARD_FAILED, [])
        if len(shown) < EXAMPLES:
            shown.append(Shown(-1, file, part.error))

    def add_account(self, account: Account) -> None:
        self.account = self.account + account

    @property
    def buckets(self) -> dict[str, int]:
        counts: Counter[str] = Counter()
        for (bucket, _), count in self.cells.items():
            counts[bucket] += count
        return dict(sorted(counts.items()))

    @property
    def source_counts(self) -> dict[str, int]:
        """Records of the input of each source."""
        return {name: counts.total() for name, counts in sorted(self.by_source.items())}

    def retention_of(self, source: str) -> list[dict]:
        """`ledger.retention` of one source."""
        counts = self.by_source[source]
        return ledger.retention(counts.total(), {rule: counts[rule] for rule in ledger.RULES})

    @staticmethod
    def largest(counts: dict[str, int]) -> list[str]:
        """The names with a figure of their own, largest first."""
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
            "buckets": self.buckets,
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


def _log2_aspect(frame: pd.DataFrame) -> np.ndarray:
    return np.log2(frame["width"].to_numpy(float) / frame["height"].to_numpy(float))
