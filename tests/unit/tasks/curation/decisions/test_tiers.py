import functools
import math

import numpy as np
import pytest
import skimage.data
from PIL import Image
from pydantic import ValidationError
from score_tables import good_row, records_of

from tasks.curation.config import CurationConfig, EpisodeConfig, FilterConfig, TierConfig
from tasks.curation.decisions.tiers import episode_conditions, quantile_cuts
from tasks.curation.scorers import Sample
from tasks.curation.scorers.classical import COHERENT, SCALES_PX, aesthetic_scorer, neighbour_correlation
from tasks.curation.scoring import filters
from tasks.recipe import load_recipe


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


def test_quantiles_give_each_tier_its_share_of_the_records_that_pass():
    scores = np.random.default_rng(0).normal(5, 1, 2000).round(3)
    rows = [good_row(i, aesthetic=float(score)) for i, score in enumerate(scores)]
    rows += [good_row(2000 + i, aesthetic=9.9, width=1) for i in range(500)]  # rejected: they do not count
    rows += [good_row(2500 + i, aesthetic=9.9, synthetic=True) for i in range(500)]
    rows += [good_row(3000 + i, aesthetic=math.nan) for i in range(500)]
    config = CurationConfig(tiers=TierConfig(quantiles=(0.05, 0.2, 0.5, 0.8)))
    records = records_of(rows, config)
    assert [row["tier"] for row in records] == [row["tier"] for row in records_of(rows, config)]
    tier = np.array([row["tier"] for row in records[:2000]])
    for name, share in zip(("A1", "A2", "A3", "A4", "A5"), (0.05, 0.15, 0.3, 0.3, 0.2), strict=True):
        assert (tier == name).mean() == pytest.approx(share, abs=0.005), name
    assert {row["tier"] for row in records[2500:3000]} == {"A3"} and {row["tier"] for row in records[3000:]} == {"A5"}


def test_without_scores_no_record_reaches_a_quantile():
    counts = np.zeros(20_000, int)
    counts[[-1, -2000]] = 1  # scores of 10 and 9
    assert quantile_cuts(counts, (0, 0.5, 1, 1)) == pytest.approx((11, 9.9995, 9, 9))
    assert quantile_cuts(np.zeros(20_000, int), (0.1, 0.2, 0.3, 0.4)) == (11, 11, 11, 11)


def test_records_that_do_not_meet_best_where_are_a3_at_best():
    config = CurationConfig(tiers=TierConfig(synthetic_tier="A1", best_where="quality < 45"))
    scores = [(9.0, 10.0), (9.0, 80.0), (6.2, math.nan), (5.2, 80.0)]
    rows = [good_row(i, aesthetic=score, quality=quality) for i, (score, quality) in enumerate(scores)]
    rows.append(good_row(4, aesthetic=1.0, quality=80.0, synthetic=True))
    assert [row["tier"] for row in records_of(rows, config)] == ["A1", "A3", "A3", "A4", "A1"]


def test_a_record_is_in_the_first_episode_whose_condition_it_meets_and_else_in_the_rest():
    rows = [
        good_row(0, width=100, height=100, aesthetic=7.0),
        good_row(1, width=900, height=800, aesthetic=7.0),
        good_row(2, width=100, height=100, aesthetic=1.0, words=[2, 90]),
        good_row(3, width=100, height=100, aesthetic=1.0),
    ]
    episodes = (
        EpisodeConfig(name="large", where="short_side >= 400"),
        EpisodeConfig(name="best", where="tier == 'A1'"),
        EpisodeConfig(name="long", where="max_words >= 60 and min_words == 2"),
    )
    for chosen, expected in (
        (episodes, ["best", "large", "long", "rest"]),
        (episodes[1:], ["best", "best", "long", "rest"]),
    ):
        config = CurationConfig(buckets=chosen, filters=FilterConfig(min_side_px=32))
        assert [row["bucket"] for row in records_of(rows, config)] == expected
    assert [row["bucket"] for row in records_of(rows, CurationConfig())] == ["rest"] * 4


def test_two_episodes_cannot_have_one_name():
    with pytest.raises(ValueError, match="'rest' is the episode of records that are in no other"):
        EpisodeConfig(name="rest", where="width > 1")
    with pytest.raises(ValueError, match="names 'a' twice"):
        episode_conditions((EpisodeConfig(name="a", where="width > 1"), EpisodeConfig(name="a", where="width > 2")))


def noises():
    """Pictures of noise and checkerboards, of many grains: colourful, sharp and full of contrast."""
    rng = np.random.default_rng(0)
    for side in (256, 640, 1024):
        yield f"colour {side}", rng.integers(0, 256, (side, side, 3), dtype=np.uint8)
        yield f"gray {side}", np.repeat(rng.integers(0, 256, (side, side, 1), dtype=np.uint8), 3, 2)
        yield f"normal {side}", np.clip(rng.normal(128, 80, (side, side, 3)), 0, 255).astype(np.uint8)
        yield f"salt {side}", np.repeat(255 * (rng.random((side, side, 1)) < 0.5), 3, 2).astype(np.uint8)
    for grain in (2, 4, 8, 16):
        blocks = rng.integers(0, 256, (512 // grain, 512 // grain, 3), dtype=np.uint8)
        yield f"blocks of {grain}", blocks.repeat(grain, 0).repeat(grain, 1)
        checks = ((np.indices((512, 512)) // grain).sum(0) % 2 * 255).astype(np.uint8)
        yield f"checks of {grain}", np.repeat(checks[..., None], 3, 2)


@pytest.mark.parametrize(("name", "pixels"), list(noises()), ids=lambda value: value if isinstance(value, str) else "")
def test_noise_is_never_of_the_two_best_tiers(name, pixels):
    (score,) = aesthetic_scorer()([seen(pixels)])["aesthetic"]
    assert score < lowest_of_a2()


@functools.cache
def lowest_of_a2() -> float:
    tiers = [TierConfig(), *(load_recipe(recipe).curation.tiers for recipe in ("smoke", "tiny"))]
    lowest = min(each.thresholds[1] for each in tiers)
    assert tiers_of([lowest, lowest - 0.001], thresholds=(9.9, lowest, 0.0, 0.0)) == ["A2", "A3"]
    return lowest


def test_the_guard_against_noise_does_not_reject_photographs():
    for photo in (skimage.data.astronaut(), skimage.data.coffee(), skimage.data.chelsea(), skimage.data.rocket()):
        sample = seen(photo)
        assert min(neighbour_correlation(sample.gray, side) for side in SCALES_PX) > COHERENT


def seen(pixels) -> Sample:
    image = filters.reduced(Image.fromarray(pixels), 384)
    view = filters.reduced(image, filters.ANALYSIS_PX)
    return Sample(image, np.asarray(view), np.asarray(view.convert("L")), ())
