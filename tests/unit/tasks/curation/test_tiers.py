import hashlib

import numpy as np
import pandas as pd
import pytest
from pydantic import ValidationError

from tasks.curation.config import TierConfig
from tasks.curation.tiers import assign_buckets, assign_tiers


def tiers_of(scores, synthetic=False, **fields) -> list[str]:
    scores = pd.Series(scores, dtype=float)
    return list(assign_tiers(scores, pd.Series([synthetic] * len(scores)), TierConfig(**fields)))


def test_a_score_on_a_threshold_reaches_its_tier():
    assert tiers_of([9, 6.5, 6.4, 6.0, 5.5, 5.0, 4.99]) == ["A1", "A1", "A2", "A2", "A3", "A4", "A5"]


def test_synthetic_records_bypass_the_score():
    assert tiers_of([9, 0, np.nan], synthetic=True, synthetic_tier="A2") == ["A2", "A2", "A2"]


def test_an_unscored_record_is_of_the_lowest_tier():
    assert tiers_of([np.nan]) == ["A5"]


def test_thresholds_that_rise_are_refused():
    with pytest.raises(ValueError, match="must fall from A1 to A4"):
        tiers_of([5.0], thresholds=(5.0, 5.5, 6.0, 6.5))
    with pytest.raises(ValidationError):
        TierConfig(synthetic_tier="B1")


def test_buckets_cut_a_source_evenly_and_by_content_alone():
    ids = [hashlib.sha256(str(i).encode()).hexdigest() for i in range(4000)]
    source = pd.Series(["scenes"] * 4000)
    config = TierConfig(episodic_buckets={"scenes": 4})
    names = assign_buckets(source, pd.Series(ids), config)
    counts = pd.Series(names).value_counts()
    assert sorted(counts.index) == [f"scenes-{i}" for i in range(4)]
    assert counts.min() > 900
    assert list(assign_buckets(source[::-1], pd.Series(ids[::-1]), config)) == list(names[::-1])


def test_a_source_without_an_entry_is_one_bucket():
    config = TierConfig(episodic_buckets={"scenes": 4})
    assert (
        list(assign_buckets(pd.Series(["elsewhere"] * 3), pd.Series(["ab" * 32, "cd" * 32, "ef" * 32]), config))
        == ["elsewhere-0"] * 3
    )
