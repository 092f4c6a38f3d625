"""The colour of an object by XKCD's survey of colour names (949 names, from matplotlib)."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from eval.geneval import COLORS
from eval.judges.base import BaseJudge, Probe, libraries, only_image
from eval.judging.protocols import Request

NEIGHBOURS = 5
MIDDLE = 0.5  # share of the box's width and height: its borders show the background


def lab(rgb: np.ndarray) -> np.ndarray:
    """CIE L*a*b* of sRGB colours in [0, 1], [..., 3], for the white point D65."""
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    to_xyz = np.array([[0.412453, 0.357580, 0.180423], [0.212671, 0.715160, 0.072169], [0.019334, 0.119193, 0.950227]])
    xyz = linear @ to_xyz.T / to_xyz.sum(axis=1)
    f = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    x, y, z = np.moveaxis(f, -1, 0)
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=-1)


def survey() -> tuple[list[str], np.ndarray]:
    """The survey's names that end in one of GenEval's ten colours: (that colour, [names, 3] L*a*b*)."""
    from matplotlib.colors import XKCD_COLORS, to_rgb

    basic = {name: hexadecimal for name, hexadecimal in XKCD_COLORS.items() if _last_word(name) in COLORS}
    return [_last_word(name) for name in basic], lab(np.array([to_rgb(value) for value in basic.values()]))


def _last_word(name: str) -> str:
    return name.removeprefix("xkcd:").split()[-1]


class XKCDColor(BaseJudge):
    """See eval.judging.protocols.Judge. The colour of the middle of a box, without masks and objects."""

    name = "xkcd-color"
    model = "XKCD colour survey, nearest names"

    def __init__(self) -> None:
        super().__init__(
            {
                "class": "eval.judges.xkcd_color.XKCDColor",
                "version": 1,
                "rule": f"median of the middle {MIDDLE} of the box; majority of the {NEIGHBOURS} nearest names in L*a*b*",
                "libraries": libraries("matplotlib"),
            }
        )
        self._names, self._lab = survey()

    def color(self, pixels: np.ndarray) -> str:
        """
        Args:
            pixels: uint8 [height, width, 3].
        """
        height, width = pixels.shape[:2]
        top, left = int(height * (1 - MIDDLE) / 2), int(width * (1 - MIDDLE) / 2)
        middle = pixels[top : height - top, left : width - left]
        nearest = np.linalg.norm(self._lab - lab(np.median(middle, axis=(0, 1)) / 255), axis=1).argsort(kind="stable")
        return Counter(self._names[i] for i in nearest[:NEIGHBOURS]).most_common(1)[0][0]

    def answer_one(self, request: Request) -> list[str]:
        pixels = np.asarray(only_image(request))
        return [self.color(_cut(pixels, box)) for box in request.options["boxes"]]

    def probes(self) -> list[Probe]:
        image = Image.new("RGB", (96, 32), "white")
        draw = ImageDraw.Draw(image)
        draw.rectangle((0, 0, 31, 31), fill=(220, 20, 20))
        draw.rectangle((32, 0, 63, 31), fill=(20, 60, 220))
        boxes = [[0, 0, 32, 32], [32, 0, 64, 32], [64, 0, 96, 32]]
        request = Request([image], "", {"class": "bench", "boxes": boxes, "indices": [0, 1, 2]})
        return [Probe(request, ["red", "blue", "white"])]


def _cut(pixels: np.ndarray, box: Any) -> np.ndarray:
    """The box's pixels; at least one, inside the image."""
    height, width = pixels.shape[:2]
    x0, y0 = (min(max(round(v), 0), limit - 1) for v, limit in zip(box[:2], (width, height)))
    x1, y1 = (min(max(round(v), low + 1), limit) for v, low, limit in zip(box[2:4], (x0, y0), (width, height)))
    return pixels[y0:y1, x0:x1]
