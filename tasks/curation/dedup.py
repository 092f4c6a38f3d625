"""Exact and near duplicates over the whole corpus.

Exact: equal SHA-256. Near: a perceptual hash within a Hamming distance proposes a pair, a colour thumbnail confirms
it. pHash alone is blind to colour and, on plain pictures, to what is where; it would merge different scenes. What
it does not propose is missed: a picture symmetric about its centre, shifted, may flip half its bits.

A star, not a chain: records are taken in order of preference (more pixels, then the better aesthetic score, then
corpus order), and a record is dropped when it equals, or is near to, a record already kept. So every dropped record
resembles its keeper directly; A~B~C merges A with C only if A~C.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import imagehash
import numpy as np
import pandas as pd
import pyarrow as pa
from PIL import Image

from tasks.curation.config import DedupConfig

COARSE_PX = 4  # a COARSE_PX x COARSE_PX RGB mosaic weeds out proposals before any thumbnail is read
MAX_COARSE_DIFFERENCE = 40  # of 255; a shift by 2 % of the side moves a full-contrast edge by at most 40 in a cell
MAX_BRIGHTNESS_DIFFERENCE = 6  # of 255, of the means: re-encoding and small shifts hardly change it
PAIRS_AT_ONCE = 1_000_000
PAIRS_CONFIRMED_AT_ONCE = 2048  # so that at most twice as many thumbnails are in memory
COMPARED_IN_MEMORY = 100_000  # records; more are compared by joins on disk
MAX_KEYS, MAX_JOINED_ROWS = 100, 1e11
MEMORY = "2GB"  # of DuckDB, which spills what is more
BATCH_ROWS = 10_000
PREFERENCE = "pixels DESC, aesthetic DESC, position"  # of several, the first is kept
MAX_ASPECT_DIFFERENCE = 0.03  # relative; resizing rounds sides to whole pixels


def thumbnail(image: Image.Image, side_px: int) -> np.ndarray:
    """uint8 [h, w, 3], shorter side `side_px`, the longer in proportion (at most four times that)."""
    width, height = image.size
    short = min(width, height)
    size = tuple(min(4 * side_px, max(1, round(side_px * side / short))) for side in (width, height))
    return np.asarray(image.resize(size, Image.Resampling.BOX, reducing_gap=2.0))


def perceptual_hash(image: Image.Image, hash_size: int) -> str:
    """imagehash's pHash of hash_size x hash_size bits, as hex."""
    return str(imagehash.phash(image, hash_size=hash_size))


def thumbnail_difference(a: np.ndarray, b: np.ndarray) -> float:
    """How far two uint8 [h, w, 3] thumbnails are apart, 0 to 255, forgiving a shift of up to one thumbnail pixel.

    A pixel counts by how far it lies outside the range of the other thumbnail's 3x3 neighbourhood, in its worst
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
    found = []
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
            found.append(np.minimum(i, j)[near] * count + np.maximum(i, j)[near])
    flat = np.unique(np.concatenate(found)) if found else np.empty(0, np.int64)
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


class DuplicateSearch:
    """Collects the records that no rule rejected, shard by shard, and says which of them to drop.

    The records are kept in a DuckDB file, which spills to disk beyond `MEMORY`.

        search = DuplicateSearch(work_dir, config)
        search.add(positions, scores) ...
        search.exact_duplicates() -> (position, keeper) ...
        search.near_duplicates(thumbnail) -> (position, keeper, difference) ...
    """

    def __init__(self, work_dir: str | os.PathLike, config: DedupConfig) -> None:
        import duckdb

        self._config = config
        settings = {"memory_limit": MEMORY, "temp_directory": str(Path(work_dir) / "spill")}
        self._db = duckdb.connect(str(Path(work_dir) / "candidates.duckdb"), config=settings)
        self._db.execute("SET preserve_insertion_order = false")
        self._db.execute(
            "CREATE TABLE candidates (position BIGINT, record_id VARCHAR, pixels BIGINT, aesthetic DOUBLE, "
            "aspect DOUBLE, light DOUBLE, phash VARCHAR, coarse BLOB)"
        )

    def add(self, positions: np.ndarray, scores: pd.DataFrame) -> None:
        """Adds records.

        Args:
            positions: int64 [N], of the records in the corpus.
            scores: N rows with record_id, width, height, aesthetic, phash (hex), coarse (bytes).
        """
        batch = pa.table(
            {
                "position": positions,
                "record_id": pa.array(scores["record_id"], pa.string()),
                "pixels": (scores["width"] * scores["height"]).to_numpy(np.int64),
                # In half points: a re-encoded copy must not win by a hair.
                "aesthetic": np.floor(2 * scores["aesthetic"].fillna(0).to_numpy(float)),
                "aspect": (scores["width"] / scores["height"]).to_numpy(float),
                "light": [float(np.frombuffer(data, np.uint8).mean()) for data in scores["coarse"]],
                "phash": pa.array(scores["phash"], pa.string()),
                "coarse": pa.array(scores["coarse"], pa.binary()),
            }
        )
        self._db.register("batch", batch)
        self._db.execute("INSERT INTO candidates SELECT * FROM batch")
        self._db.unregister("batch")

    def exact_duplicates(self) -> Iterator[tuple[int, int]]:
        """(position, keeper's position) of the records whose bytes another one has, by position."""
        window = f"OVER (PARTITION BY record_id ORDER BY {PREFERENCE})"
        keepers = f"SELECT position, first_value(position) {window} AS keeper FROM candidates"  # noqa: S608 (a constant)
        self._db.execute(f"CREATE OR REPLACE TABLE exact AS FROM ({keepers}) WHERE position != keeper")
        yield from _rows(self._db, "SELECT position, keeper FROM exact ORDER BY position")

    def near_duplicates(
        self, thumbnails: Callable[[np.ndarray], dict[int, np.ndarray]]
    ) -> Iterator[tuple[int, int, float]]:
        """(position, keeper's position, thumbnail_difference) of the records to drop, by position.

        Exact duplicates take no part: call `exact_duplicates` first.

        Args:
            thumbnails: gives the thumbnails of the positions that it is asked for.
        """
        near: dict[int, list[tuple[int, float]]] = {}
        pairs = self._candidate_pairs()
        for start in range(0, len(pairs), PAIRS_CONFIRMED_AT_ONCE):
            batch = pairs[start : start + PAIRS_CONFIRMED_AT_ONCE]
            small = thumbnails(np.unique(batch))
            for i, j in batch.tolist():
                difference = thumbnail_difference(small[i], small[j])
                if difference <= self._config.max_thumbnail_difference:
                    near.setdefault(i, []).append((j, difference))
                    near.setdefault(j, []).append((i, difference))
        if not near:
            return
        self._db.register("near", pa.table({"position": np.array(sorted(near), np.int64)}))
        query = f"SELECT position FROM candidates JOIN near USING (position) ORDER BY {PREFERENCE}"  # noqa: S608
        ranked = self._db.execute(query)
        rank = {position: place for place, (position,) in enumerate(ranked.fetchall())}
        dropped: dict[int, tuple[int, float]] = {}
        for position in rank:  # the most wanted first
            kept = [(rank[o], o, d) for o, d in near[position] if rank[o] < rank[position] and o not in dropped]
            if kept:
                dropped[position] = min(kept)[1:]
        for position in sorted(dropped):
            yield position, *dropped[position]

    def _candidate_pairs(self) -> np.ndarray:
        """int64 [P, 2] of positions, i < j, sorted."""
        left = "FROM candidates WHERE position NOT IN (SELECT position FROM exact)"
        count = self._db.sql(f"SELECT count(*) {left}").fetchall()[0][0]
        if count > COMPARED_IN_MEMORY:
            return self._joined_pairs(count, left)
        columns = self._db.sql(f"SELECT position, phash, coarse, aspect {left} ORDER BY position").to_arrow_table()
        if not count:
            return np.empty((0, 2), np.int64)
        positions = columns["position"].to_numpy()
        hashes = np.stack([hash_bits(text, self._config.hash_size) for text in columns["phash"].to_pylist()])
        coarse = np.stack([np.frombuffer(data, np.uint8) for data in columns["coarse"].to_pylist()])
        found = candidate_pairs(hashes, coarse, columns["aspect"].to_numpy(), self._config.max_hamming_distance)
        return positions[found]

    def _joined_pairs(self, count: int, left: str) -> np.ndarray:
        """The same pairs by joins that spill to disk: two hashes within `max_hamming_distance` bits agree in all but so
        many blocks, so each choice of the other blocks is a key; a pair counts at the first key that it shares."""
        distance = self._config.max_hamming_distance
        keys = block_masks(plan_blocks(count, distance, self._config.hash_size), distance)
        self._db.execute(
            f"CREATE OR REPLACE TABLE hashes AS SELECT position, ('0x' || phash)::UBIGINT AS hash, aspect, light, coarse {left}"
        )
        found = []
        for place, key in enumerate(keys):
            earlier = "".join(f" AND (xor(a.hash, b.hash) & {mask}::UBIGINT) != 0" for mask in keys[:place])
            result = self._db.cursor().execute(
                "SELECT a.position, b.position, a.coarse, b.coarse FROM hashes a JOIN hashes b "  # noqa: S608 (numbers)
                f"ON (a.hash & {key}::UBIGINT) = (b.hash & {key}::UBIGINT) AND a.position < b.position "
                f"WHERE bit_count(xor(a.hash, b.hash)) <= {distance} "
                f"AND abs(a.light - b.light) <= {MAX_BRIGHTNESS_DIFFERENCE} "
                f"AND greatest(a.aspect / b.aspect, b.aspect / a.aspect) <= {1 + MAX_ASPECT_DIFFERENCE}{earlier}"
            )
            while rows := result.fetchmany(BATCH_ROWS):
                i, j, x, y = zip(*rows, strict=True)
                small = [
                    np.frombuffer(b"".join(data), np.uint8).reshape(len(rows), -1).astype(np.int16) for data in (x, y)
                ]
                near = np.abs(small[0] - small[1]).max(axis=1, initial=0) <= MAX_COARSE_DIFFERENCE
                found.append(np.array([i, j], np.int64).T[near])
        pairs = np.concatenate(found) if found else np.empty((0, 2), np.int64)
        return pairs[np.lexsort((pairs[:, 1], pairs[:, 0]))]

    def close(self) -> None:
        self._db.close()


def plan_blocks(count: int, distance: int, hash_size: int) -> int:
    """Blocks of the 64 bits for which the joins over `count` hashes cost least.

    Raises:
        ValueError: so many records cannot be compared within so many bits, with the figures.
    """
    if hash_size != 8:
        raise ValueError(
            f"curation.dedup.hash_size={hash_size} must be 8 for over {COMPARED_IN_MEMORY} records, not {count}"
        )
    costs = {blocks: join_cost(count, blocks, distance) for blocks in range(distance + 1, 17)}
    costs = {blocks: cost for blocks, cost in costs.items() if math.comb(blocks, distance) <= MAX_KEYS}
    best = min(costs, key=costs.__getitem__, default=0)
    if not best or costs[best] > MAX_JOINED_ROWS:
        found = f"about {costs[best]:.1e}" if best else "too many"
        raise ValueError(
            f"curation.dedup.max_hamming_distance={distance}: near duplicates among {count} records would take {found} "
            f"comparisons, {MAX_JOINED_ROWS:.0e} are allowed; 4 takes about {min(join_cost(count, b, 4) for b in range(5, 11)):.1e}"
        )
    return best


def join_cost(count: int, blocks: int, distance: int) -> float:
    """Rows that are joined, and pairs of random hashes that share a key."""
    keys = math.comb(blocks, distance)
    return keys * (count + count**2 / 2 / 2 ** (64 * (blocks - distance) / blocks))


def block_masks(blocks: int, distance: int) -> list[int]:
    """A mask of 64 bits for every choice of `blocks - distance` of the blocks. Bits are dealt out to the blocks in turn:
    neighbours in frequency are alike."""
    block = [sum(1 << bit for bit in range(64) if bit % blocks == i) for i in range(blocks)]
    return [sum(block[i] for i in chosen) for chosen in combinations(range(blocks), blocks - distance)]


def _rows(db: Any, query: str) -> Iterator[tuple]:
    result = db.cursor().execute(query)
    while batch := result.fetchmany(BATCH_ROWS):
        yield from batch


def hash_bits(text: str, hash_size: int) -> np.ndarray:
    """bool [hash_size**2] of imagehash's hex.

    Raises:
        ValueError: the hash was made with another hash_size; score again.
    """
    bits = hash_size**2
    if len(text) != -(-bits // 4):
        raise ValueError(f"pHash {text!r} has {4 * len(text)} bits, curation.dedup.hash_size={hash_size} needs {bits}")
    value = int(text, 16)
    raw = np.frombuffer(value.to_bytes(-(-bits // 8), "big"), np.uint8)
    return np.unpackbits(raw)[-bits:].astype(bool)
