"""Functions of curation that replace SciPy's in its image, against SciPy's."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.fftpack
from scipy import ndimage

from tasks.curation.scorers.classical import number_patches
from tasks.curation.scoring.cosine import cosine_transform


@pytest.mark.parametrize("size", [4, 8, 32, 64])
def test_the_cosine_transform_has_every_bit_of_scipys(size):
    random = np.random.default_rng(size).integers(0, 256, (20, size, size), np.uint8)
    mirrored = np.where(np.arange(size) < size // 2, random, random[..., ::-1])
    flat = np.full((1, size, size), 37, np.uint8)
    ramp = np.broadcast_to(np.arange(size, dtype=np.uint8), (1, size, size))
    for pixels in np.concatenate([random, mirrored, flat, ramp]):
        expected = scipy.fftpack.dct(scipy.fftpack.dct(pixels, axis=0), axis=1)
        np.testing.assert_array_equal(cosine_transform(cosine_transform(pixels.T).T), expected)


def test_the_cosine_transform_refuses_lengths_at_which_a_bit_may_differ():
    with pytest.raises(AssertionError):
        cosine_transform(np.zeros(6))


def test_patches_have_the_numbers_that_scipy_gives_them():
    random = np.random.default_rng(0)
    masks = [random.random(random.integers(1, 50, 2)) < random.random() for _ in range(200)]
    spiral = np.zeros((31, 31), bool)
    for inset in range(0, 15, 2):  # rings, joined into one long path
        spiral[inset : 31 - inset, [inset, 30 - inset]] = spiral[[inset, 30 - inset], inset : 31 - inset] = True
        spiral[inset + 1, inset] = inset > 0
        spiral[inset + 1, inset + 1] = True
    for mask in [*masks, spiral, spiral[::-1], np.zeros((3, 4), bool), np.ones((3, 4), bool)]:
        patches, count = number_patches(mask)
        expected, expected_count = ndimage.label(mask, structure=np.ones((3, 3), int))
        assert count == expected_count
        np.testing.assert_array_equal(patches, expected)
