"""What a scorer is: it adds one column to the records; filters.decide decides on it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from PIL import Image


@dataclass(frozen=True)
class Sample:
    """What a scorer sees of one record: decoded once, upright, reduced.

    `image`: RGB, shorter side at most 384 px (enough for the CLIP family) where a scorer of the recipe has `needs_image`,
    else as small as `pixels`. `pixels`: uint8 [H, W, 3] and `gray`:
    uint8 [H, W], longer side at most 256 px. `captions`: cleaned, none left out for its length.
    """

    image: Image.Image
    pixels: np.ndarray
    gray: np.ndarray
    captions: tuple[str, ...]


class Scorer(Protocol):
    """Scores a batch: float32 [N], NaN where it has no opinion. Loads its model on first use, not at construction."""

    column: str

    def __call__(self, samples: Sequence[Sample]) -> np.ndarray: ...
