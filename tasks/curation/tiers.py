"""Quality tiers A1 to A5, and the episodic bucket that cuts the corpus a second way, as SQL over columns of scores."""

from __future__ import annotations

from tasks.curation.config import TierConfig
from tasks.curation.engines import quoted

TIERS = ("A1", "A2", "A3", "A4", "A5")


def tier_sql(config: TierConfig) -> str:
    """The tier of a record.

    A record that was scored gets the first tier whose threshold it reaches, A5 if none; one without a score (NULL or NaN)
    is A5. Synthetic records bypass the score.

    Raises:
        ValueError: thresholds that do not fall.
    """
    if list(config.thresholds) != sorted(config.thresholds, reverse=True):
        raise ValueError(f"curation.tiers.thresholds={list(config.thresholds)} must fall from A1 to A4")
    reached = " ".join(
        f"WHEN aesthetic >= CAST({threshold!r} AS DOUBLE) THEN '{tier}'"
        for tier, threshold in zip(TIERS, config.thresholds, strict=False)
    )
    return (
        f"CASE WHEN synthetic THEN '{config.synthetic_tier}' WHEN aesthetic IS NULL OR isnan(aesthetic) THEN '{TIERS[-1]}' "
        f"{reached} ELSE '{TIERS[-1]}' END"
    )


def bucket_sql(config: TierConfig) -> str:
    """The episodic bucket of a record: `{source}-{n}`, n by hash of the record, evenly over the source's buckets.

    The paper shows tier x bucket (figure 9) without saying how buckets are cut. Here: by source, then at random by
    content, so that a stage may draw unseen records of the same kind, and a record's bucket never changes.
    """
    counts = " ".join(f"WHEN {quoted(source)} THEN {count}" for source, count in config.episodic_buckets.items())
    many = f"CASE source {counts} ELSE 1 END" if counts else "1"
    return f"concat(source, '-', hex_to_int(substr(record_id, 9, 8)) % ({many}))"
