import numpy as np
import pandas as pd
import pytest
import skimage.data
from PIL import Image
from pydantic import ValidationError

from tasks.curation import filters
from tasks.curation.config import TierConfig
from tasks.curation.scorers import Sample
from tasks.curation.scorers.classical import COHERENT, SCALES_PX, aesthetic_scorer, neighbour_correlation
from tasks.curation.tiers import ScoreCounts, assign_tiers, tier_cuts
from tasks.recipe import load_recipe


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


def test_quantiles_give_each_tier_its_share_whatever_the_order_and_the_shards():
    scores = np.random.default_rng(0).normal(5, 1, 20_000)
    config = TierConfig(quantiles=(0.05, 0.2, 0.5, 0.8))
    cuts = []
    for pieces in ([scores], np.array_split(np.random.default_rng(1).permutation(scores), 7)):
        counts = ScoreCounts()
        for piece in pieces:
            counts.add(np.concatenate([piece, [np.nan]]))
        cuts.append(tier_cuts(config, counts))
    assert cuts[0] == cuts[1]
    tier = assign_tiers(pd.Series(scores), pd.Series([False] * len(scores)), config, cuts[0])
    for name, share in zip(("A1", "A2", "A3", "A4", "A5"), (0.05, 0.15, 0.3, 0.3, 0.2), strict=True):
        assert (tier == name).mean() == pytest.approx(share, abs=0.005), name


def test_a_quantile_of_nothing_is_reached_by_nobody():
    counts = ScoreCounts()
    counts.add(np.array([10.0, 9.0]))
    cuts = tier_cuts(TierConfig(quantiles=(0, 0.5, 1, 1)), counts)
    assert list(assign_tiers(pd.Series([10.0, 9.0]), pd.Series([False] * 2), TierConfig(), cuts)) == ["A2", "A3"]
    with pytest.raises(ValueError, match="must rise"):
        tier_cuts(TierConfig(quantiles=(0.5, 0.2, 0.8, 0.9)), counts)


def test_records_for_which_best_where_does_not_hold_are_a3_at_best():
    scores, synthetic = pd.Series([9.0, 9.0, 6.2, 5.2, 9.0]), pd.Series([False] * 4 + [True])
    tier = assign_tiers(scores, synthetic, TierConfig(synthetic_tier="A1"), best=np.array([True] + [False] * 4))
    assert list(tier) == ["A1", "A3", "A3", "A4", "A1"]


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
    for recipe in ("smoke", "tiny"):
        tier = tiers_of([score], thresholds=load_recipe(recipe).curation.tiers.thresholds)
        assert tier[0] not in ("A1", "A2"), (name, score)
    assert tiers_of([score])[0] not in ("A1", "A2")


def test_the_guard_against_noise_leaves_photographs_alone():
    for photo in (skimage.data.astronaut(), skimage.data.coffee(), skimage.data.chelsea(), skimage.data.rocket()):
        sample = seen(photo)
        assert min(neighbour_correlation(sample.gray, side) for side in SCALES_PX) > COHERENT


def seen(pixels) -> Sample:
    image = filters.reduced(Image.fromarray(pixels), 384)
    view = filters.reduced(image, filters.ANALYSIS_PX)
    return Sample(image, np.asarray(view), np.asarray(view.convert("L")), ())
