"""Quality tiers A1 to A5, and the episode that cuts the corpus a second way, as SQL over columns of scores."""

from __future__ import annotations

import numpy as np

from model.config import TIERS
from tasks.curation.config import CurationConfig, EpisodeConfig, TierConfig
from tasks.curation.decisions.conditions import Condition, case_sql
from tasks.curation.decisions.engines import Engine, rows_of
from tasks.curation.decisions.rules import rule_sql
from tasks.curation.scorers.base import COLUMNS

BEST = ("A1", "A2")  # tiers for which `best_where` must hold
REST = "rest"  # the episode of records that are in no other
BINS = 20_000  # of the range of a score: quantiles are exact to a bin


def tier_cuts(engine: Engine, config: CurationConfig) -> tuple[float, ...]:
    """The lowest score of A1, A2, A3 and A4: the thresholds, or the quantiles of the table `scores`."""
    check_cuts(config.tiers)
    if config.tiers.quantiles is None:
        return config.tiers.thresholds
    column = COLUMNS["aesthetic"]
    bounds = f"CAST({column.low} AS DOUBLE), CAST({column.high} AS DOUBLE)"
    query = (
        f"SELECT bin_of(aesthetic, {bounds}, {BINS}) AS k, count(*) AS n "  # noqa: S608
        f"FROM (SELECT aesthetic, synthetic, {rule_sql(config)} AS rule FROM scores) scored "
        "WHERE rule = '' AND NOT synthetic AND NOT isnan(aesthetic) GROUP BY 1"
    )
    counts = np.zeros(BINS, np.int64)
    for row in rows_of(engine, query):
        counts[row["k"]] += row["n"]
    return quantile_cuts(counts, config.tiers.quantiles)


def quantile_cuts(counts: np.ndarray, shares: tuple[float, ...]) -> tuple[float, ...]:
    """For each share the lowest score of that share of the records.

    Args:
        counts: records in each of `BINS` equal bins of the range of aesthetic scores.
    """
    low, high = COLUMNS["aesthetic"].low, COLUMNS["aesthetic"].high
    above = np.cumsum(counts[::-1])[::-1]  # of each bin and those over it
    cuts = []
    for share in shares:
        if share == 0 or not above[0]:
            cuts.append(high + 1)  # which no record reaches
        else:
            cuts.append(low + (high - low) * int(np.flatnonzero(above >= share * above[0])[-1]) / BINS)
    return tuple(cuts)


def check_cuts(config: TierConfig) -> None:
    """
    Raises:
        ValueError: thresholds that do not fall, or quantiles that do not rise.
    """
    if config.quantiles is not None and list(config.quantiles) != sorted(config.quantiles):
        raise ValueError(
            f"curation.tiers.quantiles={list(config.quantiles)} must rise: the share of A1, of A1 and A2, and so on"
        )
    if config.quantiles is None and list(config.thresholds) != sorted(config.thresholds, reverse=True):
        raise ValueError(f"curation.tiers.thresholds={list(config.thresholds)} must fall from A1 to A4")


def tier_sql(config: TierConfig, cuts: tuple[float, ...]) -> str:
    """The tier of a record.

    A record that was scored gets the first tier whose cut it reaches, A5 if none; one without a score (NULL or NaN) is A5.
    Where `best_where` does not hold, A1 and A2 become A3. Synthetic records bypass the score.

    Args:
        cuts: see `tier_cuts`.
    """
    condition = best_condition(config)
    best = f" AND {condition.sql}" if condition is not None else ""
    reached = " ".join(
        f"WHEN aesthetic >= CAST({float(cut)!r} AS DOUBLE){best if tier in BEST else ''} THEN '{tier}'"
        for tier, cut in zip(TIERS, cuts, strict=False)
    )
    return (
        f"CASE WHEN synthetic THEN '{config.synthetic_tier}' WHEN aesthetic IS NULL OR isnan(aesthetic) THEN '{TIERS[-1]}' "
        f"{reached} ELSE '{TIERS[-1]}' END"
    )


def best_condition(config: TierConfig) -> Condition | None:
    return None if config.best_where is None else Condition(config.best_where, "curation.tiers.best_where")


def episode_conditions(episodes: tuple[EpisodeConfig, ...], tier: str = "tier") -> list[tuple[str, Condition]]:
    """
    Args:
        tier: SQL of the record's tier.

    Raises:
        ValueError: a condition is not valid, or two episodes have one name.
    """
    names = [episode.name for episode in episodes]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"curation.buckets names {name!r} twice")
    return [(e.name, Condition(e.where, f"curation.buckets[{i}].where", tier)) for i, e in enumerate(episodes)]


def episode_sql(config: CurationConfig, cuts: tuple[float, ...]) -> str:
    """The episode of a record: the first whose condition holds, else `REST`.

    The paper shows tier x episodic bucket (figure 9) without saying how these are cut. Here an episode is a named condition
    over columns, so that a recipe can say what it is for, and a stage can weight it.
    """
    return case_sql(episode_conditions(config.buckets, f"({tier_sql(config.tiers, cuts)})"), REST)
