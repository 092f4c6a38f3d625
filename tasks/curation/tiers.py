"""Quality tiers A1 to A5, and the episodic bucket that cuts the corpus a second way."""

from __future__ import annotations

import numpy as np
import pandas as pd

from tasks.curation.config import TierConfig

TIERS = ("A1", "A2", "A3", "A4", "A5")


def assign_tiers(aesthetic: pd.Series, synthetic: pd.Series, config: TierConfig) -> np.ndarray:
    """A tier for each record.

    A record that was scored gets the first tier whose threshold it reaches, A5 if none; one without a score (NaN)
    is A5, since nothing speaks for it. Synthetic records bypass the score.

    Raises:
        ValueError: thresholds that do not fall.
    """
    thresholds = np.array(config.thresholds)
    if (np.diff(thresholds) > 0).any():
        raise ValueError(f"curation.tiers.thresholds={list(config.thresholds)} must fall from A1 to A4")
    score = aesthetic.to_numpy(float)
    reached = np.nan_to_num(score, nan=-np.inf)[:, None] >= thresholds
    index = np.where(reached.any(axis=1), reached.argmax(axis=1), len(TIERS) - 1)
    tier = np.array(TIERS, object)[index]
    tier[synthetic.to_numpy(bool)] = config.synthetic_tier
    return tier


def assign_buckets(source: pd.Series, record_id: pd.Series, config: TierConfig) -> np.ndarray:
    """The episodic bucket of each record: `{source}-{n}`, n by hash of the record, evenly over the source's buckets.

    The paper shows tier x bucket (figure 9) without saying how buckets are cut. Here: by source, then at random by
    content, so that a stage may draw unseen records of the same kind, and a record's bucket never changes.
    """
    return np.array(
        [
            f"{name}-{int(digest[8:16], 16) % config.episodic_buckets.get(name, 1)}"
            for name, digest in zip(source, record_id, strict=True)
        ],
        object,
    )
