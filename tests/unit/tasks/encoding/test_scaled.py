"""All held-out images are scored at smaller sizes."""

from __future__ import annotations

import numpy as np

from tasks.encoding.buckets import Bucket
from tasks.encoding.components import _scaled


def test_buckets_that_become_one_keep_the_images_of_both():
    images = {
        Bucket(64, 64): np.full((3, 64, 64, 3), 10, np.uint8),
        Bucket(64, 48): np.full((2, 48, 64, 3), 20, np.uint8),
    }
    scaled = _scaled(images, 0.25)  # 16x12 is rounded to 16x16
    assert [(bucket, pixels[:, 0, 0, 0].tolist()) for bucket, pixels in scaled.items()] == [
        ((16, 16), [10] * 3 + [20] * 2)
    ]
