"""Near duplicates among tiles of real photographs: usual edits are found, and no two different tiles are merged."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from skimage import data

from tasks.curation.config import DedupConfig
from tasks.curation.scoring.hashes import picture_hashes

SCRIPT = Path(__file__).resolve().parents[5] / "benchmarks" / "curation" / "real_photographs.py"
spec = importlib.util.spec_from_file_location("real_photographs", SCRIPT)
benchmark = importlib.util.module_from_spec(spec)
spec.loader.exec_module(benchmark)

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


@pytest.fixture(scope="module")
def matches():
    pictures = [Image.fromarray(picture) for picture in photographs()]
    return benchmark.match([tile for picture in pictures for tile in benchmark.tiles(picture, TILE_PX)])


@pytest.mark.slow
@pytest.mark.parametrize("edit", benchmark.EDITS)
def test_an_edited_copy_of_a_photograph_is_found(matches, edit):
    assert matches.count > 70
    assert matches.recall[edit] >= benchmark.EDITS[edit][1], matches.recall


@pytest.mark.slow
def test_different_tiles_do_not_match_even_with_the_same_logo(matches):
    assert matches.wrong == []


@pytest.mark.slow
def test_edited_copies_of_a_few_tiles_are_found():
    matches = benchmark.match(benchmark.tiles(Image.fromarray(photographs()[0]), TILE_PX))
    assert matches.count and min(matches.recall.values()) >= 0.85 and not matches.wrong


def smooth_sky(seed: int) -> Image.Image:
    """RGB, 224 x 224 px: brightness rises smoothly towards one side, with grain."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:TILE_PX, 0:TILE_PX] / (TILE_PX - 1)
    terms = zip((x, y, y * y, x * x, x * y), (0.3, 0.2, 0.2, 0.15, 0.1))
    light = y + sum(rng.uniform(-most, most) * term for term, most in terms)
    pixels = rng.uniform(60, 150, 3) + 240 * light[..., None] + rng.normal(0, 1, (TILE_PX, TILE_PX, 1))
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


@pytest.mark.slow
def test_smooth_skies_would_match_each_other_and_the_margin_keeps_them_apart():
    pictures = [*map(smooth_sky, range(12)), Image.fromarray(data.astronaut()).resize((TILE_PX, TILE_PX))]
    at_default = benchmark.match(pictures)
    assert (at_default.count, at_default.wrong) == (1, [])
    lower = benchmark.match(pictures, DedupConfig(min_hash_margin=4))
    assert lower.count > 4 and len(lower.wrong) > 30


@pytest.mark.parametrize("corner", [(2, 2), (0.8, 0.04), (0.03, 0.87), (0.4, 0.5)], ids=str)
def test_a_plain_picture_with_a_logo_is_as_flat_as_without(corner):
    sky = smooth_sky(3)
    x, y = (int(part * TILE_PX) if part < 1 else part for part in corner)
    marked = np.asarray(sky).copy()
    marked[y : y + 18, x : x + 34] = 255
    plain, logo = (picture_hashes(image)["hash_margin"] for image in (sky, Image.fromarray(marked)))
    assert logo < 1.2 * plain + 1
    photograph = picture_hashes(Image.fromarray(data.astronaut()))["hash_margin"]
    assert photograph > DedupConfig().min_hash_margin > logo
