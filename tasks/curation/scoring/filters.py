"""Passes 1 and 2: statistics of one image. score.py fills the columns; rules.py decides on them.

decoding.py makes the pixels.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

ANALYSIS_PX = 256  # longer side of the image from which statistics are computed
NEAR_COLOR = 10  # of 255, per channel: visually one colour, despite JPEG and faint noise
BAR_NOISE = 20  # of 255: JPEG rings on both sides of a bar's edge
EDGE_LINES = 3


# --- statistics ------------------------------------------------------------------------------------------------


def reduced(image: Image.Image, max_side_px: int) -> Image.Image:
    """`image`, box-filtered down so that its longer side is at most `max_side_px`; small images are unchanged."""
    return shrunk(image, max(image.size) / max_side_px)


def shrunk(image: Image.Image, scale: float) -> Image.Image:
    """`image` divided by `scale`, if that is over 1: by whole numbers first, which is four times as fast."""
    if scale <= 1:
        return image
    size = tuple(max(1, round(side / scale)) for side in image.size)
    return image.resize(size, Image.Resampling.BOX, reducing_gap=1.0)


def entropy_bits(gray: np.ndarray) -> float:
    """Shannon entropy of the 256-bin histogram of uint8 [H, W], bits: 0 (one level) to 8."""
    p = np.bincount(gray.ravel(), minlength=256) / gray.size
    p = p[p > 0]
    return max(0.0, float(-(p * np.log2(p)).sum()))


def single_color_fraction(pixels: np.ndarray) -> float:
    """The share of uint8 [H, W, 3] within `NEAR_COLOR` per channel of its commonest colour."""
    planes = np.ascontiguousarray(pixels.reshape(-1, 3).T)
    coarse = planes >> 4
    code = (coarse[0].astype(np.uint16) << 8) | (coarse[1].astype(np.uint16) << 4) | coarse[2]
    # The mean of the fullest cell, refined once: faint noise may straddle cells.
    near = _near(planes, _mean_color(planes, code == np.bincount(code, minlength=4096).argmax()))
    if near.any():
        near = _near(planes, _mean_color(planes, near))
    return float(np.count_nonzero(near) / near.size)


def _mean_color(planes: np.ndarray, where: np.ndarray) -> np.ndarray:
    count = np.count_nonzero(where)
    return np.array([plane[where].sum(dtype=np.int64) / count for plane in planes])


def _near(planes: np.ndarray, color: np.ndarray, within: int = NEAR_COLOR) -> np.ndarray:
    """Whether uint8 [3, ...] is within `within` levels of a colour, bool [...]."""
    low = np.clip(np.rint(color) - within, 0, 255).astype(np.uint8)
    high = np.clip(np.rint(color) + within, 0, 255).astype(np.uint8)
    near = (planes[0] >= low[0]) & (planes[0] <= high[0])
    for channel in (1, 2):
        near &= (planes[channel] >= low[channel]) & (planes[channel] <= high[channel])
    return near


def border_fraction(pixels: np.ndarray) -> float:
    """The area of bars (letterbox, frame) around the picture, as a share of uint8 [H, W, 3].

    A bar has one colour and ends in a straight edge along the whole picture. So the plain background around an object
    is not a bar, nor is that around one flat rectangle.
    """
    height, width = pixels.shape[:2]
    corners = pixels[[0, 0, -1, -1], [0, -1, 0, -1]].astype(np.int16)
    if np.abs(corners[0] - corners).max() > NEAR_COLOR:
        # Bars on two opposite sides share their corners; bars of one side only are not a letterbox.
        return 0.0
    picture = ~_near(np.moveaxis(pixels, -1, 0), corners.mean(axis=0), BAR_NOISE)
    if not picture.any():
        return 0.0  # one colour everywhere: the blank rule handles it
    rows, columns = ((count >= 0.1 * count.max()).nonzero()[0] for count in (picture.sum(axis=1), picture.sum(axis=0)))
    top, bottom, left, right = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
    margin = (top, width - right, height - bottom, left)  # in the order in which np.rot90 rotates them to the top
    for k, bar in enumerate(margin):
        if bar and not _is_bar_edge(np.rot90(picture, k), np.rot90(pixels, k), bar, margin[k - 1], margin[k - 3]):
            return 0.0
    core = pixels[top + EDGE_LINES : bottom - EDGE_LINES, left + EDGE_LINES : right - EDGE_LINES]  # excludes soft edges
    if not any(margin) or not core.size or single_color_fraction(core) > 0.995:
        return 0.0
    return 1 - (bottom - top) * (right - left) / (height * width)


def _is_bar_edge(picture: np.ndarray, pixels: np.ndarray, bar: int, before: int, after: int) -> bool:
    """Whether the bar of `bar` lines at the top ends abruptly, along the whole picture under it.

    `before` and `after`: columns of bars to the left and right of the picture.
    """
    columns = slice(before, picture.shape[1] - after)
    # A dark picture touches its black bar here and there: a few lines together must cover the edge.
    if picture[bar : bar + EDGE_LINES, columns].any(axis=0).mean() < 0.96:
        return False
    across = pixels[max(0, bar - EDGE_LINES) : bar + EDGE_LINES, columns].astype(np.float32)
    across = np.abs(across - across[0].mean(axis=0)).mean(axis=(1, 2))  # differs from the bar, line by line
    return bool(np.abs(np.diff(across)).max(initial=0) >= 0.45 * np.ptp(across))
