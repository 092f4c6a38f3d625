from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from tasks.encoding.buckets import Bucket, cropped_fraction, fit, nearest_bucket, parse_ratio, stage_buckets

RATIOS = ("1:1", "16:9", "9:16", "4:3", "3:4", "3:2", "2:3")
RELEASED = ["1024x1024", "1344x768", "768x1344", "1184x896", "896x1184", "1248x832", "832x1248"]


def test_at_1024_px_the_buckets_are_the_released_list():
    assert [bucket.name for bucket in stage_buckets(1024, RATIOS)] == RELEASED


def test_at_512_px_every_bucket_is_half_of_the_released_one():
    assert stage_buckets(512, RATIOS) == [Bucket(w // 2, h // 2) for w, h in stage_buckets(1024, RATIOS)]


@pytest.mark.parametrize("size", [32, 48, 64, 96, 128, 256, 768, 1024])
def test_every_bucket_tiles_and_has_about_the_area_of_the_square(size):
    for bucket in stage_buckets(size, RATIOS):
        assert bucket.width % 16 == 0 and bucket.height % 16 == 0
        assert 0.6 <= bucket.width * bucket.height / size**2 <= 1.6


def test_small_stages_merge_ratios_that_fall_together():
    assert [bucket.name for bucket in stage_buckets(64, ("1:1", "4:3", "3:2", "2:3"))] == ["64x64", "64x48", "48x64"]
    assert [bucket.name for bucket in stage_buckets(32, ("1:1", "4:3", "3:2"))] == ["32x32", "48x32"]


def test_portrait_buckets_are_landscape_ones_turned():
    assert stage_buckets(256, ["9:16", "3:4"]) == [Bucket(h, w) for w, h in stage_buckets(256, ["16:9", "4:3"])]


def test_an_image_goes_to_the_bucket_of_the_nearest_ratio_on_a_log_scale():
    buckets = stage_buckets(1024, RATIOS)
    assert nearest_bucket(3000, 2000, buckets).name == "1248x832"
    assert nearest_bucket(2000, 3000, buckets).name == "832x1248"
    assert nearest_bucket(999, 1000, buckets).name == "1024x1024"
    # Between 1:1 and 2:1 the middle is the square root of 2, not 1.5.
    assert nearest_bucket(145, 100, [Bucket(16, 16), Bucket(32, 16)]) == Bucket(32, 16)


def test_fitting_keeps_the_centre_and_cuts_both_ends_alike():
    pixels = np.zeros((16, 48, 3), np.uint8)
    pixels[:, :16, 0] = pixels[:, 16:32, 1] = pixels[:, 32:, 2] = 255  # red, green, blue thirds
    fitted = np.asarray(fit(Image.fromarray(pixels), Bucket(16, 16)))
    assert fitted.shape == (16, 16, 3)
    assert (fitted[:, 2:-2] == (0, 255, 0)).all()
    assert cropped_fraction(48, 16, Bucket(16, 16)) == pytest.approx(2 / 3)


def test_fitting_an_image_of_the_bucket_changes_no_pixel():
    pixels = np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8)
    assert (np.asarray(fit(Image.fromarray(pixels), Bucket(48, 32))) == pixels).all()
    assert cropped_fraction(96, 64, Bucket(48, 32)) == 0


@pytest.mark.parametrize("name", ["4x3", "4:", ":3", "0:1", "-4:3", "1.5:1", ""])
def test_a_malformed_ratio_is_refused_with_an_example(name):
    with pytest.raises(ValueError, match="must look like 4:3"):
        parse_ratio(name)


def test_a_size_that_does_not_tile_is_refused():
    with pytest.raises(ValueError, match="image_size_px=72 must be a multiple of 16"):
        stage_buckets(72, ["1:1"])
    with pytest.raises(ValueError, match="aspect_ratios is empty"):
        stage_buckets(64, [])
