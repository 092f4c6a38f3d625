"""Aspect buckets: the widths and heights that a stage trains on, and the resize and crop to a bucket."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from model.constants import TILE_PX

if TYPE_CHECKING:
    from PIL.Image import Image


# Common ratios of cameras and screens, in both orientations: any ratio from 1:3 to 3:1 is within 12% of one of them.
DATA_RATIOS = tuple(
    name
    for wide in ("1:1", "5:4", "4:3", "3:2", "16:9", "2:1", "12:5", "3:1")
    for name in (wide, ":".join(wide.split(":")[::-1]))
)


class Bucket(NamedTuple):
    """A width and a height in pixels."""

    width: int
    height: int

    @property
    def name(self) -> str:
        return f"{self.width}x{self.height}"


def parse_ratio(name: str) -> float:
    """`"16:9"` -> width / height.

    Raises:
        ValueError: not of the form W:H with whole numbers of at least 1.
    """
    width, separator, height = name.partition(":")
    if not (separator and width.isdecimal() and height.isdecimal() and int(width) and int(height)):
        raise ValueError(f"aspect ratio {name!r} must look like 4:3")
    return int(width) / int(height)


def bucket_of(image_size_px: int, ratio: float) -> Bucket:
    """The bucket of an aspect ratio, with an area near image_size_px squared.

    The short side is S / sqrt(ratio) rounded to a multiple of the unit; the long side is the short side times the ratio,
    rounded down to the unit. The unit is S / 32, but at least 16 px. At 1024 this gives exactly the released list
    (1344x768, 1184x896, 1248x832), at 512 its half. At small sizes the unit is coarse and ratios share buckets: at 64
    both 4:3 and 3:2 are 64x48, and at 32 4:3 is 32x32.
    """
    unit = max(TILE_PX, image_size_px // 32 // TILE_PX * TILE_PX)
    wide = max(ratio, 1 / ratio)
    short = max(unit, math.floor(image_size_px / math.sqrt(wide) / unit + 0.5) * unit)
    long = max(short, int(short * wide / unit + 1e-6) * unit)  # 1e-6: 832 * 1.5 must not round below 1248
    return Bucket(long, short) if ratio >= 1 else Bucket(short, long)


def stage_buckets(image_size_px: int, aspect_ratios: Sequence[str], from_data: bool = False) -> list[Bucket]:
    """The distinct buckets of a stage, in the order of its aspect ratios.

    Args:
        from_data: also use DATA_RATIOS, so that almost any image has a bucket near its aspect ratio.

    Raises:
        ValueError: a size that is not a multiple of TILE_PX, no ratio, or a ratio that is not W:H.
    """
    if image_size_px < TILE_PX or image_size_px % TILE_PX:
        raise ValueError(f"image_size_px={image_size_px} must be a multiple of {TILE_PX} (a token of the transformer)")
    if not aspect_ratios:
        raise ValueError("aspect_ratios is empty; give at least one, such as 1:1")
    names = [*aspect_ratios, *(DATA_RATIOS if from_data else ())]
    return list(dict.fromkeys(bucket_of(image_size_px, parse_ratio(name)) for name in names))


def nearest_bucket(width: int, height: int, buckets: Sequence[Bucket]) -> Bucket:
    """The bucket with the nearest aspect ratio on a log scale; the first one in a tie."""
    return min(buckets, key=lambda bucket: abs(math.log(bucket.width / bucket.height) - math.log(width / height)))


def cropped_fraction(width: int, height: int, bucket: Bucket) -> float:
    """Fraction of the image that the centre crop to the bucket's aspect ratio removes."""
    ratio, target = width / height, bucket.width / bucket.height
    return 1 - min(ratio / target, target / ratio)


def fit(image: Image, bucket: Bucket) -> Image:
    """The image resized to cover the bucket and cropped at its centre, in one resampling (bicubic, antialiased)."""
    from PIL import Image as pil

    scale = min(image.width / bucket.width, image.height / bucket.height)
    width, height = bucket.width * scale, bucket.height * scale
    left, top = (image.width - width) / 2, (image.height - height) / 2
    if image.size == (bucket.width, bucket.height):
        return image
    box = (left, top, left + width, top + height)
    return image.resize((bucket.width, bucket.height), pil.Resampling.BICUBIC, box=box)
