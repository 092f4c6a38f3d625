"""Real scans of handwritten digits, enlarged, with captions.

Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning Repository
(1998), the 1,797 images of its test set: 8 x 8 px, ink from 0 to 16. Licence: CC BY 4.0. digits.csv.gz, 64 levels and the
label a line, is scikit-learn's copy: the package itself, with SciPy, would be a quarter of the curation image.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from tasks.curation.config import SourceConfig
from tasks.curation.sources.made.defects import encode
from tasks.curation.sources.made.registry import Made

COUNT = 1797
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


class Digit(NamedTuple):
    image: Image.Image  # RGB, square
    label: int
    captions: list[str]


@functools.cache
def _scans() -> tuple[np.ndarray, np.ndarray]:
    table = np.loadtxt(Path(__file__).with_name("digits.csv.gz"), delimiter=",")
    return table[:, :-1].reshape(-1, 8, 8), table[:, -1].astype(int)


def digit(index: int, size_px: int) -> Digit:
    """Scan `index` of 0 to 1,796, as dark ink on white paper, enlarged to size_px by bicubic interpolation."""
    assert 0 <= index < COUNT, index
    images, labels = _scans()
    paper = np.round(255 * (1 - images[index] / 16)).astype(np.uint8)
    image = Image.fromarray(paper).resize((size_px, size_px), Image.Resampling.BICUBIC).convert("RGB")
    word = WORDS[labels[index]]
    return Digit(
        image,
        int(labels[index]),
        [
            f"a photo of the handwritten digit {word}",
            f"the digit {word}",
            f"a handwritten digit {word} on a white background",
            f"a photo of the digit {word} in black at the center on a white background",
        ],
    )


@functools.lru_cache(maxsize=4)
def order(seed: int) -> list[int]:
    """The order in which a corpus uses the scans, so that a larger corpus contains a smaller one."""
    return np.random.default_rng([seed, 2]).permutation(COUNT).tolist()


def record(config: SourceConfig, index: int) -> Made:
    """See registry.py."""
    scan = order(config.seed)[index]
    made = digit(scan, config.scene_size_px)
    return Made(f"digits-{scan:04d}", "png", encode(made.image, "png"), made.captions, "digits")
