import hashlib
import math

import numpy as np
import pytest
from pydantic import ValidationError
from score_tables import good_row, records_of

from tasks.curation.config import CurationConfig, TierConfig


def tiers_of(scores, synthetic=False, **fields) -> list[str]:
    rows = [good_row(i, aesthetic=score, synthetic=synthetic) for i, score in enumerate(scores)]
    return [row["tier"] for row in records_of(rows, CurationConfig(tiers=TierConfig(**fields)))]


def test_a_score_on_a_threshold_reaches_its_tier():
    assert tiers_of([9, 6.5, 6.4, 6.0, 5.5, 5.0, 4.99]) == ["A1", "A1", "A2", "A2", "A3", "A4", "A5"]


def test_synthetic_records_bypass_the_score():
    assert tiers_of([9, 0, math.nan], synthetic=True, synthetic_tier="A2") == ["A2", "A2", "A2"]


@pytest.mark.parametrize("missing", [math.nan, None])
def test_an_unscored_record_is_of_the_lowest_tier(missing):
    assert tiers_of([missing]) == ["A5"]


def test_thresholds_that_rise_are_refused():
    with pytest.raises(ValueError, match="must fall from A1 to A4"):
        tiers_of([5.0], thresholds=(5.0, 5.5, 6.0, 6.5))
    with pytest.raises(ValidationError):
        TierConfig(synthetic_tier="B1")


def buckets_of(sources: list[str], ids: list[str], buckets: dict) -> list[str]:
    config = CurationConfig(tiers=TierConfig(episodic_buckets=buckets))
    rows = [good_row(i, source=source, record_id=name) for i, (source, name) in enumerate(zip(sources, ids))]
    return [row["bucket"] for row in records_of(rows, config)]


def test_buckets_cut_a_source_evenly_and_by_content_alone():
    ids = [hashlib.sha256(str(i).encode()).hexdigest() for i in range(4000)]
    names = buckets_of(["scenes"] * 4000, ids, {"scenes": 4})
    kinds, counts = np.unique(names, return_counts=True)
    assert list(kinds) == [f"scenes-{i}" for i in range(4)]
    assert counts.min() > 900
    assert buckets_of(["scenes"] * 4000, ids[::-1], {"scenes": 4}) == names[::-1]


def test_a_source_without_an_entry_is_one_bucket():
    ids = ["ab" * 32, "cd" * 32, "ef" * 32]
    assert buckets_of(["elsewhere"] * 3, ids, {"scenes": 4}) == ["elsewhere-0"] * 3
    assert buckets_of(["it's"] * 3, ids, {"it's": 1}) == ["it's-0"] * 3
