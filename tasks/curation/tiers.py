"""Quality tiers A1 to A5, and the episodic bucket that cuts the corpus a second way."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pyarrow as pa

from tasks.curation import conditions
from tasks.curation.conditions import Condition
from tasks.curation.config import BucketConfig, TierConfig
from tasks.curation.scorers.base import COLUMNS

TIERS = ("A1", "A2", "A3", "A4", "A5")
BEST = 2  # tiers for which `best_where` must hold: A1 and A2
REST = "rest"  # the bucket of records that are in no other
BINS = 20_000  # of the range of a score: quantiles are exact to a bin


class ScoreCounts:
    """Counts the scores of a corpus in `BINS` bins, so that quantiles need neither a second reading nor memory that grows."""

    def __init__(self, column: str = "aesthetic") -> None:
        self.low, self.high = COLUMNS[column].low, COLUMNS[column].high
        self.counts = np.zeros(BINS, np.int64)

    def add(self, scores: np.ndarray) -> None:
        scores = scores[~np.isnan(scores)]
        self.counts += np.histogram(np.clip(scores, self.low, self.high), BINS, (self.low, self.high))[0]

    def cut(self, share: float) -> float:
        """The lowest score of the best `share` of the records."""
        above = np.cumsum(self.counts[::-1])[::-1]  # of each bin and those over it
        if share == 0 or not above[0]:
            return self.high + 1  # which no record reaches
        lower = int(np.flatnonzero(above >= share * above[0])[-1])
        return self.low + (self.high - self.low) * lower / BINS


def tier_cuts(config: TierConfig, counts: ScoreCounts | None = None) -> tuple[float, ...]:
    """The lowest score of A1, A2, A3 and A4.

    Args:
        counts: of the records that pass the filters and are not synthetic; needed for quantiles.

    Raises:
        ValueError: thresholds that do not fall, or quantiles that do not rise.
    """
    if config.quantiles is None:
        if list(config.thresholds) != sorted(config.thresholds, reverse=True):
            raise ValueError(f"curation.tiers.thresholds={list(config.thresholds)} must fall from A1 to A4")
        return config.thresholds
    if list(config.quantiles) != sorted(config.quantiles):
        raise ValueError(
            f"curation.tiers.quantiles={list(config.quantiles)} must rise: the share of A1, of A1 and A2, and so on"
        )
    assert counts is not None, "quantiles need the counts of all scores"
    return tuple(counts.cut(share) for share in config.quantiles)


def assign_tiers(
    aesthetic: pd.Series,
    synthetic: pd.Series,
    config: TierConfig,
    cuts: tuple[float, ...] | None = None,
    best: np.ndarray | None = None,
) -> np.ndarray:
    """A tier for each record.

    A record that was scored gets the first tier whose cut it reaches, A5 if none; one without a score (NaN) is A5. Synthetic
    records bypass the score.

    Args:
        cuts: see `tier_cuts`; by default the thresholds.
        best: bool [N], where `best_where` holds; elsewhere A1 and A2 become A3.
    """
    cuts = tier_cuts(config) if cuts is None else cuts
    score = aesthetic.to_numpy(float)
    reached = np.nan_to_num(score, nan=-np.inf)[:, None] >= np.array(cuts)
    index = np.where(reached.any(axis=1), reached.argmax(axis=1), len(TIERS) - 1)
    if best is not None:
        index = np.where(best, index, np.maximum(index, BEST))
    tier = np.array(TIERS, object)[index]
    tier[synthetic.to_numpy(bool)] = config.synthetic_tier
    return tier


def best_condition(config: TierConfig) -> Condition | None:
    return None if config.best_where is None else Condition(config.best_where, "curation.tiers.best_where")


def bucket_conditions(buckets: tuple[BucketConfig, ...]) -> list[tuple[str, Condition]]:
    """
    Raises:
        ValueError: a condition is none, or two buckets have one name.
    """
    names = [bucket.name for bucket in buckets]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"curation.buckets names {name!r} twice")
    return [(b.name, Condition(b.where, f"curation.buckets[{i}].where")) for i, b in enumerate(buckets)]


def assign_buckets(records: pa.Table, buckets: tuple[BucketConfig, ...]) -> np.ndarray:
    """The episodic bucket of each record: the first whose condition holds, else `REST`.

    The paper shows tier x bucket (figure 9) without saying how buckets are cut. Here a bucket is a named condition over
    columns, so that a recipe can say what it is for, and a stage can weight it.
    """
    if not buckets:
        return np.full(len(records), REST, object)
    return conditions.evaluate(records, conditions.case_sql(bucket_conditions(buckets), REST))
