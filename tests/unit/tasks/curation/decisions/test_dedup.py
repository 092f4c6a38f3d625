import functools
import io

import imagehash
import numpy as np
import pandas as pd
import pytest
from parameters import slow_except
from PIL import Image, ImageDraw
from score_tables import duplicates, good_row, tables_of

from tasks.curation.config import CurationConfig, DedupConfig, FilterConfig
from tasks.curation.decisions import dedup
from tasks.curation.decisions.dedup import candidate_pairs, thumbnail, thumbnail_difference
from tasks.curation.scoring.score import score_record
from tasks.curation.sources.base import Record

CONFIG = CurationConfig(filters=FilterConfig(min_side_px=32, min_entropy_bits=0.0, max_aspect_ratio=9))
COLORS = [(220, 40, 40), (40, 170, 70), (40, 80, 225), (240, 205, 30), (150, 50, 200), (25, 25, 25)]
GROUND = (250, 236, 205)


def draw_scene(spec, size=128, shift=0.0) -> Image.Image:
    """spec: [(color, cx, cy, half side, round?)] in units of the side."""
    big = Image.new("RGB", (4 * size, 4 * size), GROUND)
    draw = ImageDraw.Draw(big)
    for color, cx, cy, half, is_round in spec:
        box = [4 * size * v for v in (cx + shift - half, cy - half, cx + shift + half, cy + half)]
        (draw.ellipse if is_round else draw.rectangle)(box, fill=color)
    return big.reduce(4)


def random_scene(rng) -> list:
    count = int(rng.integers(1, 4))
    return [
        (COLORS[rng.integers(6)], *rng.uniform(0.2, 0.8, 2), rng.uniform(0.1, 0.17), bool(rng.integers(2)))
        for _ in range(count)
    ]


def as_jpeg(image: Image.Image, quality: int) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return Image.open(io.BytesIO(buffer.getvalue())).convert("RGB")


def shifted(image: Image.Image, dx: int, dy: int) -> Image.Image:
    out = Image.new("RGB", image.size, GROUND)
    out.paste(image, (dx, dy))
    return out


def find(images: list[Image.Image]) -> pd.DataFrame:
    """position, keeper and rule of each duplicate among made pictures."""
    rows, small = [], {}
    for i, image in enumerate(images):
        buffer = io.BytesIO()
        image.save(buffer, "PNG", compress_level=1)
        row, small[i] = scored(buffer.getvalue())
        rows.append(row | {"key": f"k{i}", "locator": f"{i}.png", "row": i, "aesthetic": 5.0, "part": 0})
    return search(rows, CONFIG, small)


@functools.cache
def scored(data: bytes) -> tuple[dict, np.ndarray]:
    row, sample = score_record(Record("k", data, "png", ["a scene"], "scenes", "a.png", 0), CONFIG)
    return row, thumbnail(sample.image, CONFIG.dedup.thumbnail_px)


def search(rows: list[dict], config: CurationConfig, thumbnails: dict[int, np.ndarray]) -> pd.DataFrame:
    with tables_of(rows) as tables:
        actual = duplicates(tables, config, lambda wanted: {i: thumbnails[i] for i in wanted.tolist()})
    return pd.DataFrame(
        [(i, keeper, rule) for i, (rule, keeper) in actual.items()], columns=["position", "keeper", "rule"]
    )


RNG = np.random.default_rng(7)
SCENES = [random_scene(RNG) for _ in range(120)]


@functools.cache
def scenes() -> list[Image.Image]:
    return [draw_scene(spec) for spec in SCENES]


COPIES = {
    "jpeg75": lambda image: as_jpeg(image, 75),
    "jpeg60": lambda image: as_jpeg(image, 60),
    "shift1": lambda image: shifted(image, 1, -1),
    "shift2": lambda image: shifted(image, -2, 2),
    "resize": lambda image: image.resize((115, 115), Image.Resampling.LANCZOS),
    "resize-jpeg": lambda image: as_jpeg(image.resize((96, 96), Image.Resampling.LANCZOS), 80),
}


@pytest.mark.parametrize("how", slow_except(["jpeg75"], COPIES))
def test_near_duplicates_are_found(how):
    originals = scenes()
    count = len(originals)
    result = find(originals + [COPIES[how](image) for image in originals])
    pairs = {tuple(sorted(pair)) for pair in zip(result["position"], result["keeper"], strict=True)}
    recall = np.mean([(i, count + i) in pairs for i in range(count)])
    assert recall >= 0.9
    assert all(b - a == count for a, b in pairs), "different scenes were merged"
    assert set(result["rule"]) == {"near_duplicate"}


def test_different_scenes_are_not_merged():
    assert len(find(scenes())) == 0


def test_the_same_layout_in_other_colours_is_another_scene():
    spec = SCENES[0]
    images = [draw_scene([(color, *rest) for _, *rest in spec]) for color in COLORS]
    images.append(draw_scene([((61, 120, 61), *rest) for _, *rest in spec]))  # as light as the red, for pHash alike
    gray = [imagehash.phash(image, hash_size=8) for image in images]
    assert gray[0] - gray[6] <= CONFIG.dedup.thumbnail_hamming_distance
    assert len(find(images)) == 0


@pytest.mark.parametrize("move", [0.035, 0.05])
def test_objects_moved_by_more_than_three_percent_are_another_scene(move):
    images = [draw_scene(spec, shift=s) for spec in SCENES[:40] for s in (0.0, move)]
    assert len(find(images)) == 0


def test_a_moved_object_among_resting_ones_is_another_scene():
    base = [(COLORS[0], 0.25, 0.3, 0.12, True), (COLORS[2], 0.7, 0.7, 0.12, False)]
    moved = [base[0], (COLORS[2], 0.74, 0.7, 0.12, False)]
    assert len(find([draw_scene(base), draw_scene(moved)])) == 0
    assert len(find([draw_scene(base), as_jpeg(draw_scene(base), 70)])) == 1


def test_equal_bytes_keep_the_first():
    images = [draw_scene(SCENES[0]), draw_scene(SCENES[1]), draw_scene(SCENES[0]), draw_scene(SCENES[0])]
    result = find(images)
    assert list(result["position"]) == [2, 3]
    assert set(result["keeper"]) == {0}
    assert set(result["rule"]) == {"exact_duplicate"}


def test_the_larger_copy_is_kept_in_any_order():
    small, large = draw_scene(SCENES[3], 96), draw_scene(SCENES[3], 192)
    assert list(find([small, large])["position"]) == [0]
    assert list(find([large, small])["position"]) == [1]


def alike(aesthetic: list[float]) -> list[dict]:
    """Made pictures that look alike."""
    coarse = bytes([100] * 48)
    return [good_row(i, source="scenes", coarse=coarse, aesthetic=score) for i, score in enumerate(aesthetic)]


def test_of_near_copies_the_better_scored_one_is_kept_and_a_hair_does_not_count():
    flat = dict.fromkeys(range(3), np.zeros((64, 64, 3), np.uint8))
    result = search(alike([5.0, 5.1, 7.0]), CONFIG, flat)
    assert result[["position", "keeper"]].to_numpy().tolist() == [[0, 2], [1, 2]]
    result = search(alike([5.0, 5.1]), CONFIG, flat)
    assert result[["position", "keeper"]].to_numpy().tolist() == [[1, 0]]


def test_a_chain_does_not_merge_its_ends():
    """a ~ b ~ c, but not a ~ c: b falls to a, and c stays."""
    thumbs = {i: np.full((64, 64, 3), 30 * i, np.uint8) for i in range(3)}
    config = CurationConfig(dedup=DedupConfig(max_thumbnail_difference=40))
    result = search(alike([5.0] * 3), config, thumbs)
    assert result[["position", "keeper"]].to_numpy().tolist() == [[1, 0]]


def test_more_made_pictures_than_fit_into_memory_are_refused_with_the_figures(monkeypatch):
    monkeypatch.setattr(dedup, "MAX_RECORDS", 2)
    with pytest.raises(ValueError, match=r"thumbnail_sources=.*: 3 records .* 2 can be"):
        search(alike([5.0] * 3), CONFIG, {})


@pytest.mark.parametrize("distance", [0, 3, 10])
@pytest.mark.parametrize("bits", [64, 256])
def test_banding_finds_every_pair_that_brute_force_finds(distance, bits):
    rng = np.random.default_rng(distance)
    hashes = rng.random((20, bits)) < 0.5
    hashes = np.repeat(hashes, 10, axis=0)
    flips = np.argsort(rng.random(hashes.shape), axis=1) < rng.integers(0, distance + 2, (200, 1))
    hashes ^= flips
    coarse = rng.integers(100, 104, (200, 48)).astype(np.uint8)
    pairs = {tuple(pair) for pair in candidate_pairs(hashes, coarse, np.ones(200), distance).tolist()}
    want = {(i, j) for i in range(200) for j in range(i + 1, 200) if (hashes[i] != hashes[j]).sum() <= distance}
    assert pairs == want
    assert len(want) > 20


def test_many_records_are_compared_in_far_fewer_than_all_pairs(monkeypatch):
    """Of 30,000 random hashes, few of the 450 million pairs are compared."""
    rng = np.random.default_rng(0)
    hashes = rng.random((30_000, 64)) < 0.5
    hashes[1] = hashes[0]
    coarse = rng.integers(0, 256, (30_000, 1)).repeat(48, axis=1).astype(np.uint8)
    coarse[1] = coarse[0]
    seen = 0
    window_pairs = dedup._window_pairs

    def counting(*arguments):
        nonlocal seen
        for i, j in window_pairs(*arguments):
            seen += len(i)
            yield i, j

    monkeypatch.setattr(dedup, "_window_pairs", counting)
    pairs = candidate_pairs(hashes, coarse, np.ones(30_000), 4)
    assert [0, 1] in pairs.tolist()
    assert seen < 30_000**2 / 2 / 1000


def test_a_thumbnail_forgives_one_of_its_pixels_and_no_more():
    image = np.full((64, 64, 3), 250, np.uint8)
    image[20:40, 20:40] = (220, 40, 40)
    assert thumbnail_difference(image, np.roll(image, 1, axis=1)) == 0
    assert thumbnail_difference(image, np.roll(image, 3, axis=1)) > 100
    assert thumbnail_difference(image, np.roll(image, 3, axis=0)) > 100
