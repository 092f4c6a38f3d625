"""Scorers without a model: numpy only."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image

from tasks.curation.scorers.base import Sample


class PerImageScorer:
    """A scorer of one image at a time that fills one column."""

    def __init__(self, column: str, score: Callable[[Sample], float]) -> None:
        self.column, self._score = column, score

    def __call__(self, samples: Sequence[Sample]) -> dict[str, np.ndarray]:
        return {self.column: np.array([self._score(sample) for sample in samples], np.float32)}


def watermark_scorer() -> PerImageScorer:
    return PerImageScorer("watermark", lambda sample: watermark_score(sample.gray))


def aesthetic_scorer() -> PerImageScorer:
    return PerImageScorer("aesthetic", aesthetic_proxy)


# --- watermark -------------------------------------------------------------------------------------------------

FAINT = (5, 140)  # gray levels between a semi-transparent stroke and the ground
MIN_GROUND = 0.35  # minimum share of the commonest level: below it there is no plain ground
STROKE = 0.05  # of the shorter side: text strokes are thinner, drawn objects thicker
GUARD = 0.05  # of the shorter side, around objects: JPEG ringing, anti-aliasing, pointed tips
GRID = 4  # the overlay must show in many cells of a GRID x GRID raster


def watermark_score(gray: np.ndarray) -> float:
    """0 (none) to 1: amount and spread of faint thin strokes over a plain ground.

    A repeated, semi-transparent text breaks a plain ground into many small thin patches of low contrast. Regions with a
    thick core are objects of the picture and are left out, with a margin. For plain pictures only: a busy photograph
    has no ground and scores 0; use a model.

    Args:
        gray: uint8 [H, W], longer side at most 256 px.
    """
    height, width = gray.shape
    short = min(height, width)
    if short < 32:
        return 0.0
    levels = np.bincount(gray.ravel(), minlength=256)
    ground = int(np.convolve(levels, np.ones(5, int), mode="same").argmax())
    if levels[max(0, ground - 4) : ground + 5].sum() < MIN_GROUND * gray.size:
        return 0.0
    residual = np.abs(gray.astype(np.int16) - ground)
    # Above the ground's own noise: strokes cover well under a quarter of it, so its upper quartile is noise alone.
    flat = np.cumsum(np.bincount(residual[residual <= 10], minlength=11))
    mask = residual >= max(FAINT[0], 3 * int(np.searchsorted(flat, 0.75 * flat[-1])))
    thick = max(3, round(STROKE * short)) | 1
    core = _sliding(mask, np.logical_and, thick)
    # Objects: everything connected to a core, and a margin. A tip thinner than the stroke belongs to its object.
    patch, count = number_patches(mask)
    if count == 0:
        return 0.0
    has_core = np.zeros(count + 1, bool)
    has_core[patch[core]] = True
    near = _sliding(has_core[patch], np.logical_or, 2 * max(2, round(GUARD * short)) + 1)
    step = np.zeros_like(residual)
    step[:, :-1] = np.abs(np.diff(residual, axis=1))
    step[:-1] = np.maximum(step[:-1], np.abs(np.diff(residual, axis=0)))
    # Per patch, over the pixels of patches only: they are few.
    where = mask.ravel().nonzero()[0]
    where = where[np.argsort(patch.ravel()[where], kind="stable")]
    name = patch.ravel()[where]
    starts = np.flatnonzero(np.diff(name, prepend=0))
    area = np.diff(starts, append=len(name))
    loud = np.add.reduceat(residual.ravel()[where] > FAINT[1], starts, dtype=np.int64)
    beside = np.add.reduceat(near.ravel()[where], starts, dtype=np.int64)
    peak = np.maximum.reduceat(residual.ravel()[where], starts)
    edge = np.maximum.reduceat(step.ravel()[where], starts)
    # Specks of noise are smaller, print is bolder, ringing is next to an object, a blur has no edges.
    stroke = (area >= 4) & (loud < 0.1 * area) & (beside < 0.5 * area) & (edge >= 0.4 * peak) & ~has_core[1:]
    if stroke.sum() < 4:
        return 0.0
    strokes, free = np.concatenate([[False], stroke])[patch], ~near
    marked, usable = 0, 0
    for s_row, f_row in zip(np.array_split(strokes, GRID), np.array_split(free, GRID), strict=True):
        for s, f in zip(np.array_split(s_row, GRID, axis=1), np.array_split(f_row, GRID, axis=1), strict=True):
            if f.mean() >= 0.3:
                usable += 1
                marked += s.sum() >= 0.01 * f.sum()
    if usable < GRID:
        return 0.0
    return float(min(1.0, strokes.sum() / free.sum() / 0.02) * min(1.0, marked / usable / 0.4))


def number_patches(mask: np.ndarray) -> tuple[np.ndarray, int]:
    """int [H, W]: 0 outside of the mask, and the same number from 1 in pixels that neighbours, also diagonal ones, connect;
    and how many patches there are (scipy.ndimage.label, without SciPy in the image).

    Joins runs of pixels of neighbouring rows. In each round every patch's number becomes the smallest among those it touches.
    """
    height, width = mask.shape
    stride = width + 2  # a blank at both ends keeps the runs of two rows apart
    flat = np.pad(mask, ((0, 0), (1, 1))).ravel()
    edges = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    starts, ends = edges[::2], edges[1::2]
    first = np.searchsorted(ends, starts - stride)  # runs of the row above that touch, from `first`
    touching = np.searchsorted(starts, ends - stride, side="right") - first
    below = np.repeat(np.arange(len(starts)), touching)
    above = np.arange(len(below)) + np.repeat(first - np.cumsum(touching) + touching, touching)
    number = np.arange(len(starts))
    while (number[below] != number[above]).any():
        a, b = number[below], number[above]
        np.minimum.at(number, np.maximum(a, b), np.minimum(a, b))
        while (number != number[number]).any():
            number = number[number]
    names, number = np.unique(number, return_inverse=True)
    patches = np.zeros(flat.size, int)
    patches[flat] = np.repeat(number + 1, ends - starts)
    return patches.reshape(height, stride)[:, 1:-1], len(names)


def _sliding(x: np.ndarray, op: np.ufunc, size: int) -> np.ndarray:
    """Separable sliding and/or of bool [H, W] over an odd square window; pixels outside the image are ignored."""
    reach = size // 2
    padded = np.full((x.shape[0] + 2 * reach, x.shape[1] + 2 * reach), op is np.logical_and)
    padded[reach:-reach, reach:-reach] = x
    x = padded
    span = 1
    while span < size:  # windows grow by doubling: log2(size) passes
        shift = min(span, size - span)
        x = op(x[:-shift], x[shift:])
        x = op(x[:, :-shift], x[:, shift:])
        span += shift
    return x


# --- aesthetic -------------------------------------------------------------------------------------------------


COHERENT = 0.5  # correlation of neighbouring pixels below which a picture counts as noise; photographs have over 0.53
SCALES_PX = (256, 64, 32)  # longer sides at which it is measured: coarse noise is visible at the smaller ones


def aesthetic_proxy(sample: Sample) -> float:
    """0 to 10 from colourfulness (Hasler and Suesstrunk 2003), contrast and sharpness: a placeholder for an aesthetic
    model.

    Noise has all three: if neighbouring pixels hardly correlate, the score falls with their correlation, down to 0.
    """
    rgb = sample.pixels.astype(np.float32)
    red_green = rgb[..., 0] - rgb[..., 1]
    yellow_blue = 0.5 * (rgb[..., 0] + rgb[..., 1]) - rgb[..., 2]
    spread = math.hypot(float(red_green.std()), float(yellow_blue.std()))
    colourful = spread + 0.3 * math.hypot(float(red_green.mean()), float(yellow_blue.mean()))
    gray = sample.gray.astype(np.float32)
    laplacian = 0.0
    if min(gray.shape) >= 3:
        inner = 4 * gray[1:-1, 1:-1] - gray[:-2, 1:-1] - gray[2:, 1:-1] - gray[1:-1, :-2] - gray[1:-1, 2:]
        laplacian = float(inner.var())
    parts = (
        min(colourful / 80, 1),
        min(float(gray.std()) / 80, 1),
        min(math.log1p(laplacian) / math.log1p(2000), 1),
    )
    score = 10 * (0.3 * parts[0] + 0.4 * parts[1] + 0.3 * parts[2])
    coherence = min(neighbour_correlation(sample.gray, side_px) for side_px in SCALES_PX)
    return score if coherence >= COHERENT else score * max(0.0, coherence) / COHERENT


def neighbour_correlation(gray: np.ndarray, side_px: int) -> float:
    """The correlation of neighbouring pixels at a longer side of at most `side_px`, the lower of the two directions.

    1 for a plain picture, near 1 for a smooth one, 0 for noise, -1 for a checkerboard of single pixels.

    Args:
        gray: uint8 [H, W].
    """
    image = Image.fromarray(gray)
    scale = max(image.size) / side_px
    if scale > 1:
        image = image.resize([max(1, round(side / scale)) for side in image.size], Image.Resampling.BOX)
    levels = np.asarray(image, np.float64)
    variance = levels.var()
    if min(levels.shape) < 3 or variance < 1e-9:
        return 1.0
    return min(1 - float(np.square(np.diff(levels, axis=axis)).mean()) / (2 * variance) for axis in (0, 1))
