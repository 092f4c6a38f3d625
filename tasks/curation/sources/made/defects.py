"""Planted defects: records that curation must reject (and one, `exif_rotated`, that it must rotate upright and keep).

Each is made from a scene, with a defect that occurs in collections of real images. truth.parquet lists the planted
defects; no pass reads it.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from eval.benchmarks.shapes.vocabulary import BACKGROUNDS
from tasks.curation.sources.made import scenes
from tasks.curation.sources.made.scenes import Scene

KINDS = (
    "exact_duplicate",
    "near_duplicate",
    "truncated",
    "corrupt",
    "blank",
    "near_uniform",
    "tiny",
    "extreme_aspect",
    "exif_rotated",
    "watermark",
    "border",
    "text_file",
)
DUPLICATES = ("exact_duplicate", "near_duplicate")
KEPT = ("exif_rotated",)  # valid once the orientation is applied
UNREADABLE = ("truncated", "corrupt", "text_file")
EXTREME_ASPECT = 5.0
NOISE_SIGMA = 1.5  # of 255: invisible
TINY_PX = 16
# EXIF orientation -> transform from the upright to the stored pixels (the inverse of a viewer's).
STORED = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}
ORIENTATION_TAG = 0x0112


class Drawn(NamedTuple):
    """A scene as a record of the corpus."""

    key: str
    ext: str
    data: bytes
    captions: list[str]
    scene: Scene


class Planted(NamedTuple):
    ext: str
    data: bytes
    captions: list[str]
    scene: Scene | None  # None if the record shows no scene
    original: str  # the key that a duplicate repeats, else ""
    detail: str


def encode(image: Image.Image, ext: str, exif: Image.Exif | None = None) -> bytes:
    """PNG, compressed fast, or JPEG of quality 95."""
    buffer = io.BytesIO()
    options = {} if exif is None else {"exif": exif}
    if ext == "png":
        image.save(buffer, "PNG", compress_level=1, **options)
    else:
        # Full chroma: at 64 px, Pillow's default half resolution smears a shape's colour over its edges.
        image.save(buffer, "JPEG", quality=95, subsampling=0, **options)
    return buffer.getvalue()


def plant(kind: str, rng: np.random.Generator, size_px: int, original: Callable[[], Drawn]) -> Planted:
    """Makes one record with a defect.

    Args:
        kind: one of `KINDS`.
        rng: the only source of randomness.
        size_px: the shorter side of the corpus's scenes.
        original: draws a scene of the corpus; called for duplicates only.
    """
    assert kind in KINDS, kind
    if kind in DUPLICATES:
        drawn = original()
        if kind == "exact_duplicate":
            return Planted(drawn.ext, drawn.data, drawn.captions, drawn.scene, drawn.key, "bytes")
        return _near_duplicate(rng, drawn)
    if kind in ("blank", "near_uniform"):
        return _plain(rng, size_px, NOISE_SIGMA if kind == "near_uniform" else 0.0)
    if kind == "text_file":
        page = b"<html><body>404 not found</body></html>\n" * 20
        return Planted("png", page, ["a photo of a circle"], None, "", "html")

    aspect = None
    if kind == "extreme_aspect":
        aspect = EXTREME_ASPECT if rng.random() < 0.5 else 1 / EXTREME_ASPECT
    scene = scenes.sample_scene(rng, size_px, aspect=aspect)
    texts = scenes.captions(scene, rng)
    ext = "png" if rng.random() < 0.5 else "jpg"
    detail = ""
    if kind == "tiny":
        scene = replace(scene, **_scaled(scene, min(TINY_PX, size_px // 4)))
    image = scenes.render(scene)
    if kind == "exif_rotated":
        orientation = int(rng.integers(2, 9))
        exif = Image.Exif()
        exif[ORIENTATION_TAG] = orientation
        data = encode(image.transpose(STORED[orientation]), "jpg", exif)
        return Planted("jpg", data, texts, scene, "", f"orientation {orientation}")
    if kind == "watermark":
        image = _watermarked(image)
    elif kind == "border":
        image = _bordered(rng, image)
    if kind == "corrupt":
        return Planted("png", _corrupt(rng, encode(image, "png")), texts, scene, "", "")
    data = encode(image, ext)
    if kind == "truncated":
        share = float(rng.uniform(0.5, 0.75))
        data, detail = data[: int(share * len(data))], f"{share:.0%} of the bytes"
    return Planted(ext, data, texts, scene, "", detail)


def _near_duplicate(rng: np.random.Generator, drawn: Drawn) -> Planted:
    image = scenes.render(drawn.scene)
    how = ("jpeg", "shift", "resize")[int(rng.integers(3))]
    ext = "png"
    if how == "jpeg":
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=int(rng.integers(60, 86)))
        ext, data = "jpg", buffer.getvalue()
    elif how == "shift":
        by = rng.integers(1, 3, size=2) * rng.choice([-1, 1], size=2)
        moved = Image.new("RGB", image.size, BACKGROUNDS[drawn.scene.background])
        moved.paste(image, (int(by[0]), int(by[1])))
        data = encode(moved, ext)
    else:
        scale = float(rng.uniform(0.85, 0.95))
        size = tuple(round(scale * side) for side in image.size)
        data = encode(image.resize(size, Image.Resampling.LANCZOS), ext)
    return Planted(ext, data, scenes.captions(drawn.scene, rng), drawn.scene, drawn.key, how)


def _plain(rng: np.random.Generator, size_px: int, sigma: float) -> Planted:
    color = rng.integers(0, 256, size=3).astype(float)
    noise = rng.normal(0, sigma, size=(size_px, size_px, 3)) if sigma else np.zeros((size_px, size_px, 3))
    pixels = np.clip(np.round(color + noise), 0, 255).astype(np.uint8)
    return Planted("png", encode(Image.fromarray(pixels), "png"), ["a photo of a circle"], None, "", "")


def _scaled(scene: Scene, unit_px: int) -> dict[str, int]:
    factor = unit_px / scene.unit_px
    return {"width_px": round(factor * scene.width_px), "height_px": round(factor * scene.height_px)}


def _watermarked(image: Image.Image) -> Image.Image:
    """Repeated half-transparent text over the whole image, as stock libraries add it."""
    unit = min(image.size)
    overlay = Image.new("RGBA", image.size, (0, 0, 0, 0))
    draw = ImageDraw.Draw(overlay)
    font = ImageFont.load_default(size=max(6, unit // 10))
    for row, y in enumerate(range(0, image.height, unit // 5)):
        for x in range(-(row % 2) * unit // 4, image.width, unit // 2):
            draw.text((x, y), "SAMPLE", font=font, fill=(90, 90, 90, 128))
    return Image.alpha_composite(image.convert("RGBA"), overlay).convert("RGB")


def _bordered(rng: np.random.Generator, image: Image.Image) -> Image.Image:
    """The picture at 45% of its size inside a uniform border, in a colour that no scene has as background."""
    inner = image.resize(tuple(round(0.45 * side) for side in image.size), Image.Resampling.LANCZOS)
    framed = Image.new("RGB", image.size, (0, 0, 0) if rng.random() < 0.5 else (70, 70, 90))
    framed.paste(inner, ((image.width - inner.width) // 2, (image.height - inner.height) // 2))
    return framed


def _corrupt(rng: np.random.Generator, data: bytes) -> bytes:
    """A PNG with a valid header and broken pixels: a run of its compressed data is noise."""
    start = data.index(b"IDAT") + 8
    while True:
        stop = max(start + 8, len(data) // 2)
        noise = rng.integers(0, 256, size=stop - start, dtype=np.uint8).tobytes()
        broken = data[:start] + noise + data[stop:]
        if not _loads(broken):
            return broken


def _loads(data: bytes) -> bool:
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.load()
    except (OSError, SyntaxError, ValueError):  # what Pillow raises for broken PNGs
        return False
    return True
