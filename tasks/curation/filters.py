"""Passes 1 and 2, and every rule of passes 1 to 3: statistics of one image, then decisions on columns alone.

decoding.py makes the pixels, score.py fills the columns. `decide` is a pure function of the columns, so that a new
threshold reruns no decoding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd
from PIL import Image

from tasks.curation.config import FilterConfig
from tasks.curation.sources.base import PROBLEMS

ANALYSIS_PX = 256  # longer side of what the statistics look at
NEAR_COLOR = 10  # of 255, per channel: one colour to the eye, through JPEG and faint noise
BAR_NOISE = 20  # of 255: JPEG rings on both sides of a bar's edge
EDGE_LINES = 3


# --- statistics ------------------------------------------------------------------------------------------------


def reduced(image: Image.Image, max_side_px: int) -> Image.Image:
    """`image`, box-filtered down so that its longer side is at most `max_side_px`; small images as they are."""
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
    """Where uint8 [3, ...] is within so many levels of a colour, bool [...]."""
    low = np.clip(np.rint(color) - within, 0, 255).astype(np.uint8)
    high = np.clip(np.rint(color) + within, 0, 255).astype(np.uint8)
    near = (planes[0] >= low[0]) & (planes[0] <= high[0])
    for channel in (1, 2):
        near &= (planes[channel] >= low[channel]) & (planes[channel] <= high[channel])
    return near


def border_fraction(pixels: np.ndarray) -> float:
    """The area of bars (letterbox, frame) around the picture, as a share of uint8 [H, W, 3].

    A bar is of one colour, and ends on a straight edge that runs along the whole picture. So the plain background
    around an object is no bar; nor is that around one flat rectangle, which is an object too.
    """
    height, width = pixels.shape[:2]
    corners = pixels[[0, 0, -1, -1], [0, -1, 0, -1]].astype(np.int16)
    if np.abs(corners[0] - corners).max() > NEAR_COLOR:
        # Bars on two opposite sides share their corners; bars of one side only are no letterbox.
        return 0.0
    picture = ~_near(np.moveaxis(pixels, -1, 0), corners.mean(axis=0), BAR_NOISE)
    if not picture.any():
        return 0.0  # one colour all over: the blank rule's business
    rows, columns = ((count >= 0.1 * count.max()).nonzero()[0] for count in (picture.sum(axis=1), picture.sum(axis=0)))
    top, bottom, left, right = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
    margin = (top, width - right, height - bottom, left)  # in the order in which np.rot90 brings them to the top
    for k, bar in enumerate(margin):
        if bar and not _is_bar_edge(np.rot90(picture, k), np.rot90(pixels, k), bar, margin[k - 1], margin[k - 3]):
            return 0.0
    core = pixels[top + EDGE_LINES : bottom - EDGE_LINES, left + EDGE_LINES : right - EDGE_LINES]  # no soft edges
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
    across = np.abs(across - across[0].mean(axis=0)).mean(axis=(1, 2))  # unlike the bar, line by line
    return bool(np.abs(np.diff(across)).max(initial=0) >= 0.45 * np.ptp(across))


# --- rules -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rule:
    """`rejects(scores, config)` is a bool column (False where the value is missing); `detail` tells of one row."""

    name: str
    step: str
    rejects: Callable[[pd.DataFrame, FilterConfig], pd.Series]
    detail: Callable[[pd.Series, FilterConfig], str]


def _above(name: str, step: str, column: str, limit: str) -> Rule:
    return Rule(
        name,
        step,
        lambda s, c: s[column] > getattr(c, limit),
        lambda r, c: f"{column} {r[column]:.4g} is over {limit} {getattr(c, limit):g}",
    )


def _below(name: str, step: str, column: str, limit: str) -> Rule:
    return Rule(
        name,
        step,
        lambda s, c: s[column] < getattr(c, limit),
        lambda r, c: f"{column} {r[column]:.4g} is under {limit} {getattr(c, limit):g}",
    )


def _problem(name: str) -> Rule:
    return Rule(name, SOURCE, lambda s, c: s.problem == name, lambda r, c: r.problem_detail)


SOURCE, PASS1, PASS2, PASS3 = "source", "format and geometry", "histogram and orientation", "models"

# The order is the order of rejection: the ledger names the first rule that a record breaks.
RULES: tuple[Rule, ...] = (
    *(_problem(name) for name in PROBLEMS),
    Rule(
        "too_many_pixels",
        PASS1,
        lambda s, c: (s.error_rule == "too_many_pixels") | (s.width * s.height > c.max_pixels),
        lambda r, c: r.error or f"{r.width:g}x{r.height:g} is over max_pixels {c.max_pixels}",
    ),
    Rule("undecodable", PASS1, lambda s, c: s.error_rule == "undecodable", lambda r, c: r.error),
    Rule(
        "format",
        PASS1,
        lambda s, c: ~s.format.isin(c.formats),
        lambda r, c: f"{r.format} is not one of {', '.join(c.formats)}",
    ),
    Rule(
        "mode",
        PASS1,
        lambda s, c: ~s["mode"].isin(c.modes),
        lambda r, c: f"{r['mode']} is not one of {', '.join(c.modes)}",
    ),
    Rule(
        "animated",
        PASS1,
        lambda s, c: s.animated & (c.animated == "reject"),
        lambda r, c: "more than one frame; curation.filters.animated=first_frame keeps the first",
    ),
    Rule(
        "min_side",
        PASS1,
        lambda s, c: s[["width", "height"]].min(axis=1) < c.min_side_px,
        lambda r, c: f"{r.width}x{r.height} px: a side is under min_side_px {c.min_side_px}",
    ),
    Rule(
        "aspect_ratio",
        PASS1,
        lambda s, c: s[["width", "height"]].max(axis=1) > c.max_aspect_ratio * s[["width", "height"]].min(axis=1),
        lambda r, c: f"{r.width}x{r.height} is longer than max_aspect_ratio {c.max_aspect_ratio:g}",
    ),
    _below("bytes_per_pixel", PASS1, "bytes_per_pixel", "min_bytes_per_pixel"),
    _above("single_color", PASS2, "single_color_fraction", "max_single_color_fraction"),
    _below("low_entropy", PASS2, "entropy_bits", "min_entropy_bits"),
    _above("border", PASS2, "border_fraction", "max_border_fraction"),
    _above("nsfw", PASS3, "nsfw", "max_nsfw"),
    _above("watermark", PASS3, "watermark", "max_watermark_score"),
    _below("aesthetic", PASS3, "aesthetic", "min_aesthetic"),
    _below("image_text_similarity", PASS3, "similarity", "min_image_text_similarity"),
)


def decide(scores: pd.DataFrame, config: FilterConfig) -> tuple[np.ndarray, np.ndarray]:
    """For each row the first rule that it breaks, "" if none, and one sentence about it; two object arrays [N]."""
    rule = np.full(len(scores), "", object)
    detail = np.full(len(scores), "", object)
    for entry in RULES:
        hit = np.asarray(entry.rejects(scores, config), bool) & (rule == "")
        for i in hit.nonzero()[0]:
            rule[i], detail[i] = entry.name, entry.detail(scores.iloc[i], config)
    return rule, detail
