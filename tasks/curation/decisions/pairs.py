"""Pairs of 64-bit hashes within a radius, in this process: for each key (covers.py) hashes are sorted by it, and neighbours with
equal keys are compared.

As near.py's joins, which Spark runs, in less CPU time (docs/scale.md). Hashes and positions are on disk, mapped
into memory; a key is sorted in pieces of about `PIECE_ROWS`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

PIECE_ROWS = 2**26  # 512 MiB, and as much again while pieces are put together; each piece reads all hashes
CHUNK_ROWS = 2**19
_MIX = np.uint64(0x9E3779B97F4A7C15)  # odd, so that different keys stay different; 2**64 over the golden ratio


def pairs_within(
    tables: Iterable[pa.Table], count: int, masks: Sequence[int], distance: int, work_dir: Path
) -> Iterator[np.ndarray]:
    """Every pair of hashes that agree in the bits of a mask and differ in at most `distance` bits, once.

    Args:
        tables: columns position and hash, int64 without nulls, `count` rows together.
        masks: bits of the keys, signed.
        work_dir: for two files of 8 bytes a row.

    Yields:
        int64 [P, 2]: positions, the smaller one first.
    """
    if count < 2:
        return
    with tempfile.TemporaryDirectory(dir=work_dir) as folder:
        positions, hashes = _on_disk(tables, count, Path(folder))
        words = [np.uint64(mask % 2**64) for mask in masks]
        waiting: list[np.ndarray] = []
        for place, mask in enumerate(words):
            for i, j in _neighbours(hashes, mask):
                different = hashes[i] ^ hashes[j]
                near = np.flatnonzero((np.bitwise_count(different) <= distance) & (different & mask == 0))
                for earlier in words[:place]:  # a pair counts at the first key that it shares
                    near = near[different[near] & earlier != 0]
                if len(near):
                    waiting.append(np.sort(np.stack([positions[i[near]], positions[j[near]]], axis=1), axis=1))
                if sum(map(len, waiting)) >= CHUNK_ROWS:
                    yield np.concatenate(waiting)
                    waiting = []
        if waiting:
            yield np.concatenate(waiting)


def _on_disk(tables: Iterable[pa.Table], count: int, folder: Path) -> tuple[np.ndarray, np.ndarray]:
    positions = np.memmap(folder / "positions", np.int64, "w+", shape=count)
    hashes = np.memmap(folder / "hashes", np.uint64, "w+", shape=count)
    at = 0
    for table in tables:
        end = at + len(table)
        positions[at:end], hashes[at:end] = table["position"].to_numpy(), table["hash"].to_numpy().view(np.uint64)
        at = end
    assert at == count, f"{at} rows, {count} were counted"
    return positions.view(np.ndarray), hashes.view(np.ndarray)


def _neighbours(hashes: np.ndarray, mask: np.uint64) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Rows i and j of all pairs with equal keys, and of few others: what is sorted are the first bits of a number that the key
    determines, and the row."""
    count = len(hashes)
    row_bits = np.uint64(max(1, (count - 1).bit_length()))
    row_mask = (np.uint64(1) << row_bits) - np.uint64(1)
    pieces = -(-count // PIECE_ROWS)
    for piece in range(pieces):
        parts = []
        for start in range(0, count, CHUNK_ROWS):
            keys = hashes[start : start + CHUNK_ROWS] & mask
            keys ^= keys >> np.uint64(32)
            keys *= _MIX
            rows = np.arange(start, start + len(keys), dtype=np.uint64)
            if pieces > 1:
                here = (keys >> np.uint64(32)) * np.uint64(pieces) >> np.uint64(32) == piece
                keys, rows = keys[here], rows[here]
            parts.append(keys & ~row_mask | rows)
        ordered = np.concatenate(parts)
        del parts
        ordered.sort()
        for start in range(0, len(ordered), CHUNK_ROWS):
            apart, first = 1, np.arange(start, min(start + CHUNK_ROWS, len(ordered)))
            while len(first := first[first + apart < len(ordered)]):
                first = first[(ordered[first] ^ ordered[first + apart]) <= row_mask]
                if len(first):
                    yield (
                        (ordered[first] & row_mask).astype(np.int64),
                        (ordered[first + apart] & row_mask).astype(np.int64),
                    )
                apart += 1
