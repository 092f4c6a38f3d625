"""Real scans of handwritten digits (UCI, as scikit-learn ships them), enlarged, with captions.

Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning Repository
(1998), the 1,797 images of its test set: 8 x 8 px, ink from 0 to 16.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np
from PIL import Image

COUNT = 1797
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


class Digit(NamedTuple):
    image: Image.Image  # RGB, square
    label: int
    captions: list[str]


@functools.cache
def _scans() -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import load_digits

    data = load_digits()
    return data.images, data.target


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


def chosen(count: int, seed: int) -> list[int]:
    """Which `count` scans a corpus takes: the first of a seeded order, so that a larger corpus holds a smaller one.

    Raises:
        ValueError: more than there are.
    """
    if not 0 <= count <= COUNT:
        raise ValueError(f"source.digits={count}: there are {COUNT} scans; use 0 to {COUNT}")
    return np.random.default_rng([seed, 2]).permutation(COUNT)[:count].tolist()
