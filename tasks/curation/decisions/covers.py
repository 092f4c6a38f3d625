"""Keys by which all pairs of 64-bit hashes within a distance meet, and the cheapest such keys for a corpus of some size.

The bits are dealt out to blocks. A key has some of the blocks, and a cover has enough keys that every choice of `distance`
blocks leaves one key untouched. So two hashes that differ in at most `distance` bits agree in a key. Fewer blocks make fewer
keys; longer keys make fewer pairs of unrelated hashes, whose number grows with the square of the corpus.

    for 4 bits   keys   bits of a key   cheapest for
                    5   12.8            up to about 20 thousand hashes
                   12   21.3            up to about 3 million
                   20   25.6            up to about 50 million
                   30   32              more
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations, product

BITS = 64
MAX_KEYS, MAX_WORK = 100, 1e12
# 20 keys of 4 of 10 blocks: each of these, with blocks 0 to 4 and blocks 5 to 9 turned by 0 to 4 places. A search by computer
# gave them; no choice of 4 blocks touches all of the keys.
_TEN = ((0, 1, 5, 7), (0, 2, 6, 7), (0, 1, 2, 9), (0, 5, 6, 8))


@dataclass(frozen=True)
class Cover:
    blocks: int
    keys: tuple[tuple[int, ...], ...]  # each names its blocks

    @property
    def key_bits(self) -> float:
        return BITS * len(self.keys[0]) / self.blocks

    def work(self, count: float) -> float:
        """Rows that are joined, and pairs of `count` random hashes that share a key: each takes about as long."""
        return len(self.keys) * count + self.pairs(count)

    def pairs(self, count: float) -> float:
        return len(self.keys) * count**2 / 2 / 2**self.key_bits

    def masks(self) -> list[int]:
        """Of each key, its bits of the 64 (signed). Neighbours in frequency are alike, so they are in different blocks."""
        block = [sum(1 << bit for bit in range(BITS) if bit % self.blocks == i) for i in range(self.blocks)]
        masks = [sum(block[i] for i in key) for key in self.keys]
        return [mask - 2**BITS if mask >= 2 ** (BITS - 1) else mask for mask in masks]


def plan_cover(count: int, distance: int) -> Cover:
    """The cover for which the joins over `count` hashes take least work.

    Raises:
        ValueError: so many records cannot be compared within so many bits, with the figures.
    """
    best = min(_covers(distance), key=lambda cover: cover.work(count), default=None)
    if best is None or best.work(count) > MAX_WORK:
        work = f"about {best.work(count):.1e}" if best else "too many"
        raise ValueError(
            f"curation.dedup.max_hamming_distance={distance}: near duplicates among {count} records would take {work} "
            f"comparisons, {MAX_WORK:.0e} are allowed; 4 takes about {min(c.work(count) for c in _covers(4)):.1e}"
        )
    return best


def _covers(distance: int) -> Iterator[Cover]:
    for blocks in range(distance + 1, BITS + 1):
        if math.comb(blocks, distance) <= MAX_KEYS:
            yield Cover(blocks, tuple(combinations(range(blocks), blocks - distance)))
    for order in (2, 3, 5, 7):
        dimension = -(-distance // (order - 1))
        if dimension > 1 and order * (order**dimension - 1) // (order - 1) <= MAX_KEYS:
            yield Cover(order**dimension, tuple(_hyperplanes(order, dimension)))
    if distance == 4:
        turned = [tuple(sorted((i + turn) % 5 + i // 5 * 5 for i in key)) for key in _TEN for turn in range(5)]
        yield Cover(10, tuple(turned))


def _hyperplanes(order: int, dimension: int) -> Iterator[tuple[int, ...]]:
    """The hyperplanes of the affine space of a prime order; blocks are its points. `dimension * (order - 1)` points touch at
    most all but one of them (R. E. Jamison, Covering finite fields with cosets of subspaces, 1977)."""
    points = list(product(range(order), repeat=dimension))
    for normal in points:
        if next((x for x in normal if x), 0) == 1:  # multiples have the same hyperplanes
            for offset in range(order):
                yield tuple(
                    i for i, point in enumerate(points) if sum(x * y for x, y in zip(normal, point)) % order == offset
                )
