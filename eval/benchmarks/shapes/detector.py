"""The detector of the `shapes` benchmark: coloured shapes on a plain background, by classical image processing.

    RGB --background: median of the border--> offsets from it
        --each pixel as background + a x (palette colour - background): colour by the least residual, coverage a-->
        connected pieces (touching pieces of different colours come apart)
        --coverage by the piece's own colour, normalised by its moments to a standard frame-->
        overlap with the ideal shapes --> class, score, colour, box

Moments and the half-coverage outline do not move when an image is blurred, as images decoded from latents are, so
small shapes need no other treatment than large ones. It is strict: an object that is not close to one of the four
shapes, upright and about as wide as high, scores below GenEval's threshold of 0.3; a clear one scores above its 0.9 for
counting. Tested against rendered scenes in tests/unit/eval.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from PIL import Image
from scipy import ndimage

from eval.benchmarks.shapes.vocabulary import COLORS, SHAPES

MAX_SIDE_PX = 256  # larger images are shrunk first: no object is smaller than a tenth of the side
BORDER = 0.03  # width of the ring from which the background is estimated / shorter side
PLAIN_DISTANCE = 32.0  # RGB; a border pixel this near to the ring's median is background
MIN_PLAIN = 0.6  # minimum share of such pixels; below it there is no background, so no scene
MIN_COVERAGE = 0.4  # minimum coverage of a palette colour for a pixel of an object
CORE_COVERAGE = 0.75  # inner pixels, not blurred with the background
PURE = 0.85  # share of one colour among a piece's inner pixels; below it the piece is split by colour
MIN_SIDE = 0.1  # of a shape / shorter side of the image
MAX_TRANSITION = 0.08  # width of the edge / shorter side: a slowly fading object is not a shape
MAX_STRETCH = 1.25  # width / height, either way; the shapes are as wide as high
MAX_COLOR_DISTANCE = 45.0  # CIE76 in Lab; farther from every palette colour than this is "other"
FRAME, CELLS = 3.1, 40  # the standard frame spans +-FRAME standard deviations, in CELLS x CELLS cells
# Overlap (IoU) with the best ideal shape, and its lead over the next -> score. Measured on rendered scenes of 64 to
# 128 px, blurred by 0 to 1.2 px: circles 0.95 and more, squares 0.98, triangles 0.88, crosses 0.86. Measured on what
# should not count: a pentagon is 0.91 of a circle, a square turned by 10 degrees 0.87 of a square, a triangle so
# turned 0.79 of a triangle, a cross so turned 0.79 of a cross.
OVERLAP_TO_SCORE = {
    "circle": ((0.0, 0.87, 0.912, 0.94, 1.0), (0.0, 0.1, 0.3, 0.91, 1.0)),
    "square": ((0.0, 0.84, 0.88, 0.92, 1.0), (0.0, 0.1, 0.3, 0.91, 1.0)),
    "triangle": ((0.0, 0.76, 0.81, 0.865, 1.0), (0.0, 0.1, 0.3, 0.91, 1.0)),
    "cross": ((0.0, 0.76, 0.80, 0.85, 1.0), (0.0, 0.1, 0.3, 0.91, 1.0)),
}
LEAD_TO_SCORE = ((0.0, 0.02, 0.05, 0.2), (0.0, 0.3, 0.91, 1.0))
MIN_OVERLAP = 0.6  # objects below it are not reported

_PALETTE = np.array(list(COLORS.values()), dtype=np.float32)
_COLOR_NAMES = tuple(COLORS)
_CROSS = ndimage.generate_binary_structure(2, 1)


def detect(image: Image.Image) -> dict[str, list[dict[str, Any]]]:
    """The shapes in an image, in the form that `eval.geneval.judge_image` takes.

    Args:
        image: any mode, read as RGB; meant for sides of 48 px or more.

    Returns:
        {shape: [{"box": [x0, y0, x1, y1] in pixels of `image`, "score": in [0, 1], "color": palette name or "other",
        "overlap": IoU with the ideal shape}]}, highest score first; shapes without a detection are left out.
    """
    image = image.convert("RGB")
    scale = max(1.0, min(image.size) / MAX_SIDE_PX)
    if scale > 1:
        image = image.resize([max(1, round(side / scale)) for side in image.size], Image.Resampling.BOX)
    rgb = np.asarray(image, dtype=np.float32)
    objects: dict[str, list[dict[str, Any]]] = {}
    background = estimate_background(rgb)
    if background is None:
        return objects
    for piece in _pieces(rgb - background, background):
        shape, detection = _classify(piece, min(rgb.shape[:2]), background)
        if shape:
            detection["box"] = [round(float(edge) * scale, 3) for edge in detection["box"]]
            objects.setdefault(shape, []).append(detection)
    for detections in objects.values():
        detections.sort(key=lambda d: -d["score"])
    return objects


def estimate_background(rgb: np.ndarray) -> np.ndarray | None:
    """The colour [3] of a plain background, in 0..255, or None if the border [H, W, 3] is not plain."""
    ring = max(2, round(BORDER * min(rgb.shape[:2])))
    border = np.concatenate(
        [side.reshape(-1, 3) for side in (rgb[:ring], rgb[-ring:], rgb[ring:-ring, :ring], rgb[ring:-ring, -ring:])]
    )
    background = np.median(border, axis=0)
    plain = np.linalg.norm(border - background, axis=1) < PLAIN_DISTANCE
    if plain.mean() < MIN_PLAIN:
        return None
    return border[plain].mean(axis=0)


def _pieces(offset: np.ndarray, background: np.ndarray) -> list[dict[str, Any]]:
    """Objects of one colour, each as a crop: see `_own_coverage`, and "corner" (x, y) of the crop.

    `offset` [H, W, 3] is RGB - background.
    """
    height, width = offset.shape[:2]
    shorter = min(height, width)
    min_area = 0.3 * (MIN_SIDE * shorter) ** 2
    lines = _PALETTE - background  # [6, 3]
    norms = (lines**2).sum(axis=1)
    flat = offset.reshape(-1, 3)
    projected = flat @ lines.T
    along = np.clip(projected / np.maximum(norms, 1), 0, 1)  # [N, 6] coverage, were the pixel of that colour
    along[:, norms < PLAIN_DISTANCE**2] = 0  # objects in the background's own colour are invisible
    residual = along * (along * norms - 2 * projected)  # |pixel - a line|^2 without its common |pixel|^2
    label = residual.argmin(axis=1)
    coverage = np.take_along_axis(along, label[:, None], axis=1).reshape(height, width)
    label = label.reshape(height, width)

    owner, count = ndimage.label(coverage >= MIN_COVERAGE, _CROSS)
    owner, count = _split_by_color(owner, count, label, coverage, min_area)
    pieces = []
    for index, where in enumerate(ndimage.find_objects(owner, count), start=1):
        if where is None:
            continue
        mine = owner[where] == index
        if mine.sum() < min_area:
            continue
        sides = zip(where, (height, width), strict=True)
        crop = tuple(slice(max(0, side.start - 3), min(n, side.stop + 3)) for side, n in sides)
        mine = owner[crop] == index
        pieces.append(_own_coverage(mine, owner[crop], offset[crop]) | {"corner": (crop[1].start, crop[0].start)})
    return pieces


def _split_by_color(owner, count, label, coverage, min_area) -> tuple[np.ndarray, int]:
    """Splits components with several colours; the blurred seam goes to the nearest core."""
    next_index = count
    for index, where in enumerate(ndimage.find_objects(owner, count), start=1):
        mine = owner[where] == index
        if mine.sum() < min_area:
            continue
        core = mine & (coverage[where] >= CORE_COVERAGE)
        shares = np.bincount(label[where][core], minlength=len(_PALETTE))
        if core.sum() == 0 or shares.max() >= PURE * core.sum():
            continue
        seeds = np.zeros(mine.shape, dtype=np.int32)
        number = 0
        for color in np.flatnonzero(shares >= min_area / 2):
            parts, n = ndimage.label(core & (label[where] == color), _CROSS)
            sizes = np.bincount(parts.ravel(), minlength=n + 1)
            for part in range(1, n + 1):
                # A seam between two colours can look like a third; it is thin, so erosion removes it.
                if sizes[part] >= min_area / 2 and ndimage.binary_erosion(parts == part, _CROSS).any():
                    number += 1
                    seeds[parts == part] = number
        if number < 2:
            continue
        _, (rows, columns) = ndimage.distance_transform_edt(seeds == 0, return_indices=True)
        owner[where][mine] = next_index + seeds[rows, columns][mine]
        next_index += number
    return owner, next_index


def _own_coverage(mine: np.ndarray, owner: np.ndarray, offset: np.ndarray) -> dict[str, Any]:
    """Returns "coverage" [h, w] in [0, 1] by the piece's own colour, near the piece and not in another one's area;
    "everywhere", the same without that cut; "offset" [3], that colour - background."""
    core = ndimage.binary_erosion(mine, _CROSS)
    inner = offset[core if core.sum() >= 6 else mine]
    color = np.median(inner, axis=0)
    near = ndimage.binary_dilation(mine, _CROSS, iterations=2) & ((owner == 0) | mine)
    everywhere = np.clip(offset @ color / max(1.0, float(color @ color)), 0, 1)
    return {"coverage": np.where(near, everywhere, 0), "everywhere": everywhere, "offset": color}


def _classify(piece: dict[str, Any], shorter: int, background: np.ndarray) -> tuple[str, dict[str, Any]]:
    """The nearest ideal shape of a piece and its score; "" if it cannot be one."""
    coverage = piece["coverage"]
    solid = coverage >= 0.5
    rows, columns = np.flatnonzero(solid.any(axis=1)), np.flatnonzero(solid.any(axis=0))
    if not len(rows):
        return "", {}
    x0, x1, y0, y1 = columns[0], columns[-1] + 1, rows[0], rows[-1] + 1
    if min(x1 - x0, y1 - y0) < max(5, MIN_SIDE * shorter):
        return "", {}
    ys, xs = np.indices(coverage.shape, dtype=np.float32)
    weight = np.clip(2 * coverage - 0.5, 0, 1)  # a sharper edge: the blur's tails would widen the moments
    mass = weight.sum()
    center_x, center_y = (weight * xs).sum() / mass, (weight * ys).sum() / mass
    spread_x = np.sqrt((weight * (xs - center_x) ** 2).sum() / mass + 1 / 12)
    spread_y = np.sqrt((weight * (ys - center_y) ** 2).sum() / mass + 1 / 12)

    steps = (np.arange(CELLS, dtype=np.float32) + 0.5) / CELLS * 2 * FRAME - FRAME
    at = np.meshgrid(center_y + steps * spread_y, center_x + steps * spread_x, indexing="ij")
    mask = ndimage.map_coordinates(coverage, at, order=1, mode="constant") >= 0.5
    ideal, aspects = _ideal_shapes()
    common = ideal @ mask.ravel().astype(np.float32)
    overlap = common / (ideal.sum(axis=1) + mask.sum() - common)
    stretch = spread_x / spread_y / aspects
    overlap = np.where(np.maximum(stretch, 1 / stretch) <= MAX_STRETCH, overlap, 0)
    order = np.argsort(overlap)
    best, lead = order[-1], overlap[order[-1]] - overlap[order[-2]]
    if overlap[best] < MIN_OVERLAP:
        return "", {}
    table = OVERLAP_TO_SCORE[SHAPES[best]]
    score = min(float(np.interp(overlap[best], *table)), float(np.interp(lead, *LEAD_TO_SCORE)))
    if _transition_width(piece["everywhere"], solid) > max(4.0, MAX_TRANSITION * shorter):
        score = min(score, 0.1)
    left, top = piece["corner"]
    return SHAPES[best], {
        "box": [left + x0, top + y0, left + x1, top + y1],
        "score": round(score, 4),
        "color": name_color(background + piece["offset"]),
        "overlap": round(float(overlap[best]), 4),
    }


def _transition_width(coverage: np.ndarray, solid: np.ndarray) -> float:
    """Width of the edge in pixels: one over the mean slope along the outline of the coverage, which must not be cut
    off around the piece: a cut would look like a sharp edge."""
    outline = solid & ~ndimage.binary_erosion(solid, _CROSS, border_value=1)
    down, across = np.gradient(coverage)
    slope = np.hypot(down, across)[outline].mean() if outline.any() else 0.0
    return float(1 / max(slope, 1e-6))


@functools.cache
def _ideal_shapes() -> tuple[np.ndarray, np.ndarray]:
    """The four shapes in the standard frame [4, CELLS^2] (0 or 1), and their spread in x / spread in y [4]."""
    fine = (np.arange(480) + 0.5) / 480 - 0.5
    y, x = np.meshgrid(fine, fine, indexing="ij")
    arm = 1 / 6  # half of the width of a cross's arm, as scenes draw it
    inside = {
        "circle": lambda x, y: x**2 + y**2 <= 0.25,
        "square": lambda x, y: (np.abs(x) <= 0.5) & (np.abs(y) <= 0.5),
        "triangle": lambda x, y: (np.abs(y) <= 0.5) & (2 * np.abs(x) <= y + 0.5),
        "cross": lambda x, y: (np.minimum(np.abs(x), np.abs(y)) <= arm) & (np.maximum(np.abs(x), np.abs(y)) <= 0.5),
    }
    steps = (np.arange(CELLS) + 0.5) / CELLS * 2 * FRAME - FRAME
    masks, aspects = [], []
    for shape in SHAPES:
        solid = inside[shape](x, y)
        cy, sx, sy = y[solid].mean(), x[solid].std(), y[solid].std()
        at_y, at_x = np.meshgrid(cy + steps * sy, steps * sx, indexing="ij")
        masks.append(inside[shape](at_x, at_y).ravel())
        aspects.append(sx / sy)
    return np.array(masks, dtype=np.float32), np.array(aspects)


def name_color(rgb: np.ndarray) -> str:
    """The nearest palette colour to `rgb` [3] (0..255) in Lab, or "other"."""
    distance = np.linalg.norm(_lab_palette() - _to_lab(np.clip(rgb, 0, 255)), axis=1)
    nearest = int(distance.argmin())
    return _COLOR_NAMES[nearest] if distance[nearest] <= MAX_COLOR_DISTANCE else "other"


@functools.cache
def _lab_palette() -> np.ndarray:
    return _to_lab(_PALETTE)


def _to_lab(rgb: np.ndarray) -> np.ndarray:
    """CIE Lab (D65) of sRGB [..., 3] in 0..255."""
    c = np.asarray(rgb, dtype=np.float64) / 255
    linear = np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)
    to_xyz = np.array(
        [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
    )
    xyz = linear @ to_xyz.T / np.array([0.95047, 1.0, 1.08883])
    f = np.where(xyz > 216 / 24389, np.cbrt(xyz), (24389 / 27 * xyz + 16) / 116)
    x, y, z = f[..., 0], f[..., 1], f[..., 2]
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=-1)
