"""What the report of a curation shows: bounded samples on either side of each cut, by tier, source and episode."""

from __future__ import annotations

import re

import numpy as np
import pytest
from score_tables import good_row, random_hashes, tables_of

from tasks.curation.config import CurationConfig, EpisodeConfig, FilterConfig, TierConfig
from tasks.curation.decisions import decide
from tasks.curation.reports import report
from tasks.curation.reports.gallery import GROUP_SIZE, GROUPS, MOSAIC, NEAREST, PICTURE_SHARDS, picture_shards
from tasks.curation.reports.summary import EXAMPLES, LIMITS, summarize
from tasks.curation.sources.base import Account

CONFIG = CurationConfig(
    filters=FilterConfig(min_aesthetic=4.0, max_nsfw=0.5),
    tiers=TierConfig(thresholds=(7.0, 6.0, 5.0, 4.5), synthetic_tier="A2", accept_proxy=True),
    buckets=(EpisodeConfig(name="dark", where="entropy_bits < 4"),),
)


def rows(count: int) -> list[dict]:
    rng = np.random.default_rng(0)
    made = []
    for i in range(count):
        columns = {"aesthetic": float(3 + 6 * rng.random()), "nsfw": float(rng.random() * 0.7), "source": "ab"[i % 2]}
        columns |= {"synthetic": i % 5 == 0, "entropy_bits": 3.5 if i % 3 else 6.0, "hash_margin": 0.0}
        made.append(good_row(i, **columns))
    return made


def summary_of(made: list[dict], config: CurationConfig = CONFIG):
    def pictures(positions: np.ndarray) -> dict[int, np.ndarray]:
        return {int(p): np.full((8, 8, 3), p % 251, np.uint8) for p in positions}

    with tables_of(made) as tables:
        cuts = decide.decide_records(tables, config, pictures)
        return summarize(tables, config, Account(), cuts, 1, pictures)


@pytest.fixture(scope="module")
def summary():
    return summary_of(rows(600))


def test_the_nearest_records_on_either_side_of_a_cut_are_shown(summary):
    values = {row["row"]: row for row in rows(600)}
    cut, below, above = summary.edges["aesthetic", "min_aesthetic"]
    scores = np.array([row["aesthetic"] for row in values.values()])
    assert cut == 4.0 and len(below) == len(above) == NEAREST
    assert [shown.position for shown in below] == np.argsort(np.where(scores < 4, 4 - scores, 99))[:NEAREST].tolist()
    assert [shown.position for shown in above] == np.argsort(np.where(scores >= 4, scores - 4, 99))[:NEAREST].tolist()
    for tier, low in (("A1", 7.0), ("A4", 4.5)):
        _, below, above = summary.edges["aesthetic", tier]
        for shown in (*below, *above):
            row = values[shown.position]
            assert not row["synthetic"] and row["aesthetic"] >= 4 and row["nsfw"] <= 0.5, (
                "kept, and tiered by its score"
            )
            assert (row["aesthetic"] >= low) == (shown in above)


def test_real_and_synthetic_records_of_a_tier_are_counted_separately(summary):
    assert {key for key in summary.walls if key[1]} == {("A2", True)}
    assert {tier for tier, synthetic in summary.walls if not synthetic} == {"A1", "A2", "A3", "A4", "A5"}
    assert sum(count for count, _ in summary.walls.values()) == summary.kept
    assert all(len(shown) == min(MOSAIC, count) for count, shown in summary.walls.values())
    assert all(shown.position % 5 == 0 for shown in summary.walls["A2", True][1])


def test_retention_by_source_adds_up_to_the_whole(summary):
    content = summary.content()
    for step in range(len(content["retention"])):
        kept = [steps[step]["kept"] for steps in content["retention_by_source"].values()]
        assert sum(kept) == content["retention"][step]["kept"] and len(kept) == 2


def test_captions_are_counted_by_tier_and_by_episode(summary):
    assert set(summary.episode_words) == {"dark", "rest"}
    assert sum(map(sum, (words.values() for words in summary.episode_words.values()))) == summary.content()["captions"]
    assert summary.content()["tier_cuts"] == {"A1": 7.0, "A2": 6.0, "A3": 5.0, "A4": 4.5}
    assert summary.content()["scorers"]["aesthetic"].startswith("proxy, code ")


@pytest.mark.slow
def test_the_page_stays_as_large_for_ten_times_the_records(summary):
    small, large = report.render(summary), report.render(summary_of(rows(6000)))
    cuts = len(LIMITS) + 4
    most = 2 * NEAREST * cuts + 10 * MOSAIC + GROUPS * (GROUP_SIZE + 1) + EXAMPLES * 30
    assert large.count("<img") <= most and len(large) < 1.5 * len(small)
    assert not re.search(r"(?:src|href)=.(?!data:)", large) and "<script" not in large
    for heading in (
        "figure 5",
        "figures 6 and 7",
        "figure 8",
        "figure 9",
        "Near duplicates",
        "On either side of each cut",
    ):
        assert heading in large


def test_near_duplicates_are_shown_with_the_record_that_is_kept():
    same = {"phash": 77, "dhash": 99, "hash_margin": 50.0}
    others = zip(random_hashes(12, 1).tolist(), random_hashes(12, 2).tolist(), strict=True)
    made = [
        good_row(i, **(same if i in (3, 8, 9) else {"phash": phash, "dhash": dhash, "hash_margin": 50.0}))
        for i, (phash, dhash) in enumerate(others)
    ]
    summary = summary_of(made)
    ((keeper, dropped, shown),) = summary.duplicate_groups
    assert dropped == 2 and {keeper, *(item.position for item in shown)} == {3, 8, 9}
    assert "kept; 2 dropped for it" in report.render(summary)


def test_pictures_are_of_a_bounded_number_of_shards_spread_evenly():
    assert picture_shards(5) == [0, 1, 2, 3, 4]
    chosen = picture_shards(70_000)
    assert len(chosen) == PICTURE_SHARDS and chosen[0] == 0 and chosen[-1] > 68_000
