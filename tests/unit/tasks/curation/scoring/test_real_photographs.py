"""Near duplicates among tiles of real photographs: ordinary edits are found, and no two different tiles are merged."""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageEnhance
from score_tables import duplicates, good_row, tables_of
from skimage import data

from tasks.curation.config import CurationConfig, DedupConfig
from tasks.curation.decisions.engines import rows_of
from tasks.curation.scoring.decoding import decode
from tasks.curation.scoring.filters import ANALYSIS_PX, reduced
from tasks.curation.scoring.hashes import picture_hashes

TILE_PX = 224
PHOTOGRAPHS = (
    "astronaut",
    "camera",
    "chelsea",
    "coffee",
    "coins",
    "moon",
    "rocket",
    "brick",
    "grass",
    "gravel",
    "retina",
)


def photographs() -> list[np.ndarray]:
    """uint8 [H, W, 3], from the packages scikit-image and scikit-learn."""
    folder = Path(importlib.util.find_spec("sklearn").origin).parent / "datasets" / "images"
    pictures = [getattr(data, name)() for name in (*PHOTOGRAPHS, "hubble_deep_field", "immunohistochemistry")]
    pictures += [np.asarray(Image.open(folder / name).convert("RGB")) for name in ("china.jpg", "flower.jpg")]
    return [np.asarray(Image.fromarray(picture).convert("RGB")) for picture in pictures]


def tiles() -> list[Image.Image]:
    found = []
    for picture in photographs():
        height, width = picture.shape[:2]
        for y in range(0, height - TILE_PX + 1, TILE_PX):
            for x in range(0, width - TILE_PX + 1, TILE_PX):
                found.append(Image.fromarray(picture[y : y + TILE_PX, x : x + TILE_PX]))
    return found


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def smaller(image: Image.Image, factor: int) -> bytes:
    return encoded(image.resize((TILE_PX // factor, TILE_PX // factor), Image.Resampling.LANCZOS), "PNG")


def with_logo(image: Image.Image) -> bytes:
    """A white box of 15% by 7.5% of the side in a corner, with dark text."""
    marked = image.copy()
    draw = ImageDraw.Draw(marked)
    x, y = int(0.82 * TILE_PX), int(0.895 * TILE_PX)
    draw.rectangle((x, y, x + int(0.15 * TILE_PX), y + int(0.075 * TILE_PX)), fill="white")
    draw.text((x + 3, y + 1), "LOGO", fill=(20, 20, 20))
    return encoded(marked, "PNG")


# Edit -> (how, the share of tiles whose copy must be found)
EDITS: dict[str, tuple[Callable[[Image.Image], bytes], float]] = {
    "jpeg 75": (lambda image: encoded(image, "JPEG", quality=75), 0.95),
    "jpeg 50": (lambda image: encoded(image, "JPEG", quality=50), 0.95),
    "webp 80": (lambda image: encoded(image, "WEBP", quality=80), 0.95),
    "half size": (lambda image: smaller(image, 2), 0.95),
    "quarter size": (lambda image: smaller(image, 4), 0.95),
    "brightness +15 %": (lambda image: encoded(ImageEnhance.Brightness(image).enhance(1.15), "PNG"), 0.90),
    "logo": (with_logo, 0.85),
}


def hashes_of(encoded_image: bytes) -> dict:
    return picture_hashes(reduced(decode(encoded_image, 10**8), ANALYSIS_PX))


@pytest.fixture(scope="module")
def matches() -> tuple[int, dict[str, float], list[tuple]]:
    """(tiles that are not flat, recall of each edit among them, pairs (tile, edit) of different tiles that match)."""
    originals = tiles()
    versions = [(i, "", hashes_of(encoded(tile, "PNG", compress_level=1))) for i, tile in enumerate(originals)]
    flat = {i for i, _, hashes in versions if hashes["hash_margin"] < DedupConfig().min_hash_margin}
    versions += [
        (i, name, hashes_of(edit(tile))) for i, tile in enumerate(originals) for name, (edit, _) in EDITS.items()
    ]
    rows = [good_row(n, **hashes) for n, (_, _, hashes) in enumerate(versions)]
    with tables_of(rows) as tables:
        duplicates(tables, CurationConfig())
        leaders = {row["position"]: row["leader"] for row in rows_of(tables, "SELECT * FROM same")}
        pairs = {frozenset((row["a"], row["b"])) for row in rows_of(tables, "SELECT a, b FROM matched")}
    found = dict.fromkeys(EDITS, 0)
    for n, (i, name, _) in enumerate(versions):
        if name and i not in flat:
            nodes = frozenset((leaders.get(i, i), leaders.get(n, n)))
            found[name] += len(nodes) == 1 or nodes in pairs
    groups = [*pairs, *(frozenset(item) for item in leaders.items())]
    merged = [tuple(versions[n][:2] for n in group) for group in groups]
    count = len(originals) - len(flat)
    return count, {name: hits / count for name, hits in found.items()}, [(a, b) for a, b in merged if a[0] != b[0]]


@pytest.mark.slow
@pytest.mark.parametrize("edit", EDITS)
def test_an_edited_copy_of_a_photograph_is_found(matches, edit):
    count, recall, _ = matches
    assert count > 80
    assert recall[edit] >= EDITS[edit][1], recall


@pytest.mark.slow
def test_different_tiles_do_not_match_unless_both_are_plain_and_have_the_same_logo(matches):
    """The logo is then the most of both pictures. No pair of other copies matches, nor any copy with an original."""
    false = matches[2]
    assert [pair for pair in false if {edit for _, edit in pair} != {"logo"}] == []
    assert len(false) <= 10
