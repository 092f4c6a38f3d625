"""Perceptual hashes of one picture, as signed 64-bit integers, which every table engine can compare bit by bit.

pHash and dHash have the bits of imagehash's, the first as the highest. pHash-256 is imagehash's pHash of 16 x 16, in four
integers. `hash_margin` is the distance from a flat picture, whose bits are noise.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

from tasks.curation.scoring.cosine import cosine_transform

PHASH256 = ("phash256_a", "phash256_b", "phash256_c", "phash256_d")
HASHES = ("phash", "dhash", *PHASH256)
OVERSAMPLING = 4  # pHash uses the picture at 4 times its own size, as imagehash does


def picture_hashes(image: Image.Image) -> dict[str, int | float]:
    """The columns of `HASHES`, and hash_margin (gray levels): the median distance of pHash's coefficients from their median,
    without the constant one."""
    gray = image.convert("L")
    low = _low_frequencies(gray, 8)
    bits = {"phash": low > np.median(low)}
    small = np.asarray(gray.resize((9, 8), Image.Resampling.LANCZOS))
    bits["dhash"] = small[:, 1:] > small[:, :-1]
    fine = _low_frequencies(gray, 16)
    words = (fine > np.median(fine)).reshape(4, 64)
    bits |= dict(zip(PHASH256, words, strict=True))
    waves = low.ravel()[1:]
    margin = float(np.median(np.abs(waves - np.median(waves)))) / (OVERSAMPLING * 8)
    return {name: as_int64(value.ravel()) for name, value in bits.items()} | {"hash_margin": margin}


def _low_frequencies(gray: Image.Image, size: int) -> np.ndarray:
    """float64 [size, size]: the lowest coefficients of the cosine transform (imagehash.phash)."""
    side = size * OVERSAMPLING
    pixels = np.asarray(gray.resize((side, side), Image.Resampling.LANCZOS))
    return cosine_transform(cosine_transform(pixels.T).T)[:size, :size]


def as_int64(bits: np.ndarray) -> int:
    """bool [64] -> a signed integer, the first bit the highest."""
    return int.from_bytes(np.packbits(bits).tobytes(), "big", signed=True)
