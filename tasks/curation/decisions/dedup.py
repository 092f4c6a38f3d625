"""Near duplicates among made pictures: pHash within a wide net proposes a pair, a colour thumbnail confirms it.

pHash alone is blind to colour and, on plain pictures, to what is where; it would merge different scenes. What it does not
propose is missed: a picture symmetric about its centre, shifted, may flip half its bits. near.py decides which record of a
pair is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pyarrow as pa
from PIL import Image

from tasks.curation.config import DedupConfig
from tasks.curation.decisions.engines import Engine

COARSE_PX = 4  # a COARSE_PX x COARSE_PX RGB mosaic weeds out proposals before any thumbnail is read
MAX_COARSE_DIFFERENCE = 40  # of 255; a shift by 2 % of the side moves a full-contrast edge by at most 40 in a cell
MAX_BRIGHTNESS_DIFFERENCE = 6  # of 255, of the means: re-encoding and small shifts hardly change it
PAIRS_AT_ONCE = 1_000_000
PAIRS_CONFIRMED_AT_ONCE = 2048  # so that at most twice as many thumbnails are in memory
MAX_RECORDS = 100_000  # they are compared in memory
MAX_ASPECT_DIFFERENCE = 0.03  # relative; resizing rounds sides to whole pixels
PAIRS = pa.schema([("a", pa.int64()), ("b", pa.int64()), ("measure", pa.float64())])


def thumbnail(image: Image.Image, side_px: int) -> np.ndarray:
    """uint8 [h, w, 3], shorter side `side_px`, the longer in proportion (at most four times that)."""
    width, height = image.size
    short = min(width, height)
    size = tuple(min(4 * side_px, max(1, round(side_px * side / short))) for side in (width, height))
    return np.asarray(image.resize(size, Image.Resampling.BOX, reducing_gap=2.0))


def thumbnail_difference(a: np.ndarray, b: np.ndarray) -> float:
    """How far two uint8 [h, w, 3] thumbnails are apart, 0 to 255, forgiving a shift of up to one thumbnail pixel.

    A pixel counts by its distance from the range of the other thumbnail's 3x3 neighbourhood, in its worst
    channel; the result is the worst 2x2 mean, so that a moved edge counts and a lone compression artefact does not.
    """
    if a.shape != b.shape:
        b = np.asarray(Image.fromarray(b).resize((a.shape[1], a.shape[0]), Image.Resampling.BILINEAR))
    return max(_outside(a, b), _outside(b, a))


def _outside(a: np.ndarray, b: np.ndarray) -> float:
    padded = np.pad(b, ((1, 1), (1, 1), (0, 0)), mode="edge")
    low, high = padded, padded
    low = np.minimum(np.minimum(low[:-2], low[1:-1]), low[2:])
    low = np.minimum(np.minimum(low[:, :-2], low[:, 1:-1]), low[:, 2:])
    high = np.maximum(np.maximum(high[:-2], high[1:-1]), high[2:])
    high = np.maximum(np.maximum(high[:, :-2], high[:, 1:-1]), high[:, 2:])
    x = a.astype(np.int16)
    excess = np.maximum(np.maximum(x - high, low - x), 0).max(axis=2)
    return float((excess[:-1, :-1] + excess[1:, :-1] + excess[:-1, 1:] + excess[1:, 1:]).max()) / 4


def candidate_pairs(hashes: np.ndarray, coarse: np.ndarray, aspect: np.ndarray, max_distance: int) -> np.ndarray:
    """All pairs within `max_distance` bits that coarse colour and aspect ratio do not rule out.

    Multi-index hashing: of max_distance + 1 bands, two hashes within max_distance agree in one at least, so pairs
    are sought inside the groups of equal bands. A group is walked in order of mean brightness, and compared only
    within a small difference of it. Nothing within the limits is missed.

    Args:
        hashes: bool [N, bits]. coarse: uint8 [N, COARSE_PX * COARSE_PX * 3]. aspect: float [N], width over height.

    Returns:
        int64 [P, 2], i < j, sorted, without repeats.
    """
    count, bits = hashes.shape
    if count < 2:
        return np.empty((0, 2), np.int64)
    words = _words(hashes)
    brightness = coarse.astype(np.float32).mean(axis=1)
    small = coarse.astype(np.int16)
    pairs = []
    bands = min(max_distance + 1, bits)
    for band in range(bands):
        # Interleaved bits: neighbours in frequency are alike, and would make bands of equal bits.
        keys = _words(hashes[:, band::bands])
        order = np.lexsort((brightness, *keys.T))
        for i, j in _window_pairs(keys[order], brightness[order]):
            i, j = order[i], order[j]
            distance = np.bitwise_count(words[i] ^ words[j]).sum(axis=1, dtype=np.int32)
            near = (distance <= max_distance) & (np.abs(aspect[i] / aspect[j] - 1) <= MAX_ASPECT_DIFFERENCE)
            i, j = i[near], j[near]
            near = np.abs(small[i] - small[j]).max(axis=1, initial=0) <= MAX_COARSE_DIFFERENCE
            pairs.append(np.minimum(i, j)[near] * count + np.maximum(i, j)[near])
    flat = np.unique(np.concatenate(pairs)) if pairs else np.empty(0, np.int64)
    return np.stack([flat // count, flat % count], axis=1)


def _words(bits: np.ndarray) -> np.ndarray:
    """bool [N, bits] -> uint64 [N, ceil(bits / 64)]."""
    padded = np.zeros((len(bits), -(-bits.shape[1] // 64) * 64), bool)
    padded[:, : bits.shape[1]] = bits
    return np.packbits(padded, axis=1).view(np.uint64)


def _window_pairs(keys: np.ndarray, brightness: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pairs (i < j) of sorted rows with equal keys and near brightness, in pieces of bounded size."""
    count = len(keys)
    group = np.concatenate([[0], np.cumsum((keys[1:] != keys[:-1]).any(axis=1))])
    # One ordinate, rising over the whole array: groups lie further apart than any brightness.
    ordinate = group * 1024.0 + brightness
    end = np.searchsorted(ordinate, ordinate + MAX_BRIGHTNESS_DIFFERENCE, side="right")
    partners = end - np.arange(count) - 1
    start = 0
    total = np.concatenate([[0], np.cumsum(partners)])
    while start < count:
        stop = max(start + 1, int(np.searchsorted(total, total[start] + PAIRS_AT_ONCE, side="right")) - 1)
        n = partners[start:stop]
        if n.sum():
            i = np.repeat(np.arange(start, stop), n)
            j = i + 1 + np.arange(n.sum()) - np.repeat(np.cumsum(n) - n, n)
            yield i, j
        start = stop


def match_by_thumbnails(
    engine: Engine, config: DedupConfig, thumbnails: Callable[[np.ndarray], dict[int, np.ndarray]]
) -> None:
    """Table `thumbnail_pairs` (a, b, measure) of the pairs that match; measure is their thumbnail_difference.

    Reads `compared`: position, made, phash, coarse, aspect.

    Args:
        thumbnails: gives the thumbnails of the positions that it is asked for.

    Raises:
        ValueError: over `MAX_RECORDS` records.
    """
    tables = list(engine.batches("SELECT position, phash, coarse, aspect FROM compared WHERE made ORDER BY position"))
    count = sum(len(table) for table in tables)
    if count > MAX_RECORDS:
        raise ValueError(
            f"curation.dedup.thumbnail_sources={list(config.thumbnail_sources)}: {count} records would be compared by their "
            f"thumbnails, {MAX_RECORDS} can be; leave these sources out, and hashes compare them"
        )

    def pairs() -> Iterator[dict]:
        if count < 2:
            return
        table = pa.concat_tables(tables)
        positions = table["position"].to_numpy()
        bits = np.unpackbits(table["phash"].to_numpy().astype(">i8").view(np.uint8).reshape(count, 8), axis=1).astype(
            bool
        )
        coarse = np.stack([np.frombuffer(data, np.uint8) for data in table["coarse"].to_pylist()])
        near = candidate_pairs(bits, coarse, table["aspect"].to_numpy(), config.thumbnail_hamming_distance)
        for start in range(0, len(near), PAIRS_CONFIRMED_AT_ONCE):
            batch = positions[near[start : start + PAIRS_CONFIRMED_AT_ONCE]]
            small = thumbnails(np.unique(batch))
            for a, b in batch.tolist():
                difference = thumbnail_difference(small[a], small[b])
                if difference <= config.max_thumbnail_difference:
                    yield {"a": a, "b": b, "measure": difference}

    engine.load("thumbnail_pairs", PAIRS, pairs())
