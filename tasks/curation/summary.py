"""The counts of a curation, collected shard by shard: of what passes through, only counts and a few examples stay."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np
import pandas as pd
import pyarrow as pa

from tasks.curation import ledger, tiers
from tasks.curation.captions import count_words
from tasks.curation.sources.base import Account
from tasks.store import Part

EXAMPLES = 6  # rejected pictures shown for each rule
BINS = 24

# Histograms: column -> (lowest, highest); what lies beyond counts in the outermost bin. Fixed, so that they can be
# filled shard by shard, and that two reports compare.
RANGES: dict[str, tuple[float, float]] = {
    "bytes_per_pixel": (0, 3),
    "entropy_bits": (0, 8),
    "single_color_fraction": (0, 1),
    "border_fraction": (0, 1),
    "watermark": (0, 1),
    "aesthetic": (0, 10),
    "nsfw": (0, 1),
    "similarity": (-1, 1),
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

    def __init__(self, scan: Account, cuts: tuple[float, ...] = ()) -> None:
        self.account, self.cuts = scan, cuts
        self.input = self.kept = 0
        self.rejected: Counter[str] = Counter()
        self.examples: dict[str, list[dict]] = {}  # rule -> [{"file", "detail", "pixels": uint8 [h, w, 3] or None}]
        self.too_long_words: tuple[int, int] | None = None
        self.tiers: Counter[str] = Counter()
        self.cells: Counter[tuple[str, str]] = Counter()  # (bucket, tier)
        self.sources: Counter[str] = Counter()
        self.splits: Counter[str] = Counter()
        self.words: dict[str, Counter[int]] = {tier: Counter() for tier in tiers.TIERS}  # of the kept captions
        self.shards = 0  # with a kept record
        self.scores = {name: Histogram(*bounds) for name, bounds in RANGES.items()}  # of every record that decodes
        self.shapes = Histogram(*RANGES["log2_aspect"])  # of the kept records

    def add(
        self,
        scores: pd.DataFrame,
        rows: pa.Table,
        kept: pd.DataFrame,
        thumbnails: Callable[[np.ndarray], dict[int, np.ndarray]],
    ) -> None:
        """Counts one shard.

        Args:
            scores: of every record. rows: of the ledger, in the same order. kept: see decide._kept_rows.
            thumbnails: gives the pictures of rows of `scores`, by position in the corpus, in the same order.
        """
        self.input += len(scores)
        self.kept += len(kept)
        rules = np.asarray(rows["rule"].to_pylist(), object)
        for rule, count in Counter(rules[rules != ""]).items():
            self.rejected[rule] += count
            shown = self.examples.setdefault(rule, [])
            at = np.flatnonzero(rules == rule)[: EXAMPLES - len(shown)]
            for row in at.tolist():
                pixels = next(iter(thumbnails(np.array([row])).values()), None)
                shown.append(
                    {"file": rows["file"][row].as_py(), "detail": rows["detail"][row].as_py(), "pixels": pixels}
                )
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
        for tier, captions in zip(kept["tier"], kept["captions"], strict=True):
            self.words[tier].update(count_words(text) for text in captions)

    def add_failed(self, part: Part, file: str) -> None:
        """Counts a shard that could not be scored; it stands in the ledger in place of its records."""
        self.input += 1
        self.rejected[ledger.SHARD_FAILED] += 1
        shown = self.examples.setdefault(ledger.SHARD_FAILED, [])
        if len(shown) < EXAMPLES:
            shown.append({"file": file, "detail": part.error, "pixels": None})

    def add_account(self, account: Account) -> None:
        self.account = self.account + account

    @property
    def buckets(self) -> dict[str, int]:
        counts: Counter[str] = Counter()
        for (bucket, _), count in self.cells.items():
            counts[bucket] += count
        return dict(sorted(counts.items()))

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
                rule: {"file": self.examples[rule][0]["file"], "detail": self.examples[rule][0]["detail"]}
                for rule in ledger.RULES
                if rule in self.examples
            },
            "too_long_words": list(self.too_long_words) if self.too_long_words else None,
            "account": self.account.to_json() | {"left_out": self.account.left_out()},
            "tiers": {tier: self.tiers[tier] for tier in tiers.TIERS},
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
