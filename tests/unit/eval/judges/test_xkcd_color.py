"""Colours of boxes by XKCD's survey."""

import numpy as np
import pytest
from PIL import Image

from eval.geneval import COLORS
from eval.judges.xkcd_color import XKCDColor, lab
from eval.judging.protocols import Request

PURE = {
    "red": (229, 0, 0), "orange": (249, 115, 6), "yellow": (255, 255, 20), "green": (21, 176, 26), "blue": (3, 67, 223),
    "purple": (126, 30, 156), "pink": (255, 129, 192), "brown": (101, 55, 0), "black": (0, 0, 0),
    "white": (255, 255, 255),
}  # fmt: skip


def ask(image, *boxes):
    return XKCDColor().answer([Request([image], "", {"class": "car", "boxes": list(boxes), "indices": []})])[0]


def test_each_of_the_ten_colours_is_named():
    assert set(PURE) == set(COLORS)
    for name, rgb in PURE.items():
        assert ask(Image.new("RGB", (8, 8), rgb), [0, 0, 8, 8]) == [name]


def test_the_middle_of_the_box_counts_not_its_background():
    image = Image.new("RGB", (40, 40), "white")
    image.paste(PURE["blue"], (10, 10, 30, 30))
    assert ask(image, [0, 0, 40, 40]) == ["blue"]


def test_boxes_out_of_the_image_or_without_width_are_still_answered():
    image = Image.new("RGB", (8, 8), PURE["red"])
    assert ask(image, [-5, -5, 2, 2], [8, 8, 9, 9], [3, 3, 3, 3]) == ["red"] * 3


@pytest.mark.parametrize(
    ("rgb", "expected"),
    [((1, 1, 1), (100, 0, 0)), ((0, 0, 0), (0, 0, 0)), ((1, 0, 0), (53.24, 80.09, 67.20)), ((0, 0, 1), (32.30, 79.19, -107.86))],
)  # fmt: skip
def test_lab_is_cies(rgb, expected):
    assert lab(np.array(rgb, dtype=float)) == pytest.approx(expected, abs=0.05)
