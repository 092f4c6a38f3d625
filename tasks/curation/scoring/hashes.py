"""Perceptual hashes of one picture, as signed 64-bit integers, which every table engine can compare bit by bit.

pHash and dHash have the bits of imagehash's, the first as the highest. pHash-256 is imagehash's pHash of 16 x 16, in four
integers. `hash_margin` is the distance from a flat picture, whose bits are noise; a picture that is flat but for one mark, such as a
logo, counts as flat.
"""

from __future__ import annotations

import functools

import numpy as np
from PIL import Image

from tasks.curation.scoring.cosine import cosine_transform

PHASH256 = ("phash256_a", "phash256_b", "phash256_c", "phash256_d")
HASHES = ("phash", "dhash", *PHASH256)
OVERSAMPLING = 4  # pHash uses the picture at 4 times its own size, as imagehash does
GRAY_PX = 8 * OVERSAMPLING
PATCH_PX, STRIDE_PX = 8, 4  # of these, a patch that may be a mark: a quarter of the side


def picture_hashes(image: Image.Image) -> dict[str, int | float]:
    """The columns of `HASHES`, and hash_margin (gray levels, in thousandths): the median distance of pHash's coefficients from
    their median, without the constant one, if that patch is filled smoothly from what is around it for which this is least."""
    gray = image.convert("L")
    pixels = _square(gray, 8)
    low = _low_frequencies(pixels, 8)
    bits = {"phash": low > np.median(low)}
    small = np.asarray(gray.resize((9, 8), Image.Resampling.LANCZOS))
    bits["dhash"] = small[:, 1:] > small[:, :-1]
    fine = _low_frequencies(_square(gray, 16), 16)
    words = (fine > np.median(fine)).reshape(4, 64)
    bits |= dict(zip(PHASH256, words, strict=True))
    return {name: as_int64(value.ravel()) for name, value in bits.items()} | {"hash_margin": _margin(pixels, low)}


def _square(gray: Image.Image, size: int) -> np.ndarray:
    side = size * OVERSAMPLING
    return np.asarray(gray.resize((side, side), Image.Resampling.LANCZOS))


def _low_frequencies(pixels: np.ndarray, size: int) -> np.ndarray:
    """float64 [size, size]: the lowest coefficients of the cosine transform (imagehash.phash)."""
    return cosine_transform(cosine_transform(pixels.T).T)[:size, :size]


def _margin(pixels: np.ndarray, low: np.ndarray) -> float:
    """See `picture_hashes`; pixels: [GRAY_PX, GRAY_PX], low: their lowest coefficients.

    A white box on a sky has a plain hash, which any other sky with this box has, too. The transform is linear, so that
    a filled patch changes the coefficients by those of its change.
    """
    padded = np.pad(pixels.astype(np.float64), 1)
    windows = np.lib.stride_tricks.sliding_window_view(padded, (PATCH_PX + 2, PATCH_PX + 2))[::STRIDE_PX, ::STRIDE_PX]
    fill = _fills() @ windows.reshape(*windows.shape[:2], -1, 1)
    change = windows[..., 1:-1, 1:-1] - fill.reshape(*windows.shape[:2], PATCH_PX, PATCH_PX)
    waves = _WAVES[:, _PATCHES].transpose(1, 0, 2)  # [patches of a side, 8, PATCH_PX]
    filled = low - waves[:, None] @ change @ waves[None].transpose(0, 1, 3, 2)
    every = np.concatenate([low[None], filled.reshape(-1, 8, 8)]).reshape(-1, 64)[:, 1:]
    spread = np.median(np.abs(every - np.median(every, axis=1, keepdims=True)), axis=1)
    return round(float(spread.min()) / GRAY_PX, 3)


@functools.cache
def _fills() -> np.ndarray:
    """float64 [patches of a side, patches of a side, PATCH_PX**2, (PATCH_PX + 2)**2]: from a patch and the pixels around
    it, the plane through those around it that are in the picture (least squares), at the pixels of the patch."""
    y, x = np.mgrid[-1 : PATCH_PX + 1, -1 : PATCH_PX + 1]
    plane = np.stack([np.ones_like(x), x, y], axis=-1).reshape(-1, 3).astype(np.float64)
    inner = ((x >= 0) & (x < PATCH_PX) & (y >= 0) & (y < PATCH_PX)).ravel()
    fills = np.zeros((len(_PATCHES), len(_PATCHES), PATCH_PX**2, plane.shape[0]))
    for i, top in enumerate(_PATCHES[:, 0]):
        for j, left in enumerate(_PATCHES[:, 0]):
            inside = (y + top >= 0) & (y + top < GRAY_PX) & (x + left >= 0) & (x + left < GRAY_PX)
            ring = inside.ravel() & ~inner
            fills[i, j][:, ring] = plane[inner] @ np.linalg.pinv(plane[ring])
    return fills


_PATCHES = np.arange(0, GRAY_PX - PATCH_PX + 1, STRIDE_PX)[:, None] + np.arange(PATCH_PX)
_WAVES = cosine_transform(np.eye(GRAY_PX)).T[:8]  # [8, GRAY_PX]


def as_int64(bits: np.ndarray) -> int:
    """bool [64] -> a signed integer, the first bit the highest."""
    return int.from_bytes(np.packbits(bits).tobytes(), "big", signed=True)
