"""Which records a report shows: bounded samples, chosen shard by shard, the same whatever the order of shards.

Only positions are kept; pictures are fetched at the end, from at most `PICTURE_SHARDS` shards, spread evenly over the corpus.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

PICTURE_SHARDS = 64  # the thumbnails of a shard of 10,000 images are about 80 MB
NEAREST = 4  # on each side of a cut
MOSAIC = 24
GROUPS, GROUP_SIZE = 12, 6  # near-duplicate groups, and members of one


def picture_shards(count: int) -> set[int]:
    """The indices of the shards of which pictures are shown."""
    return {i * count // PICTURE_SHARDS for i in range(PICTURE_SHARDS)} if count > PICTURE_SHARDS else set(range(count))


class Shown(NamedTuple):
    """A record in the report: its position in the corpus, its file, and what is written under it."""

    position: int
    file: str
    note: str = ""


class Mosaic:
    """The records with the smallest ids of a kind: a sample at random, as ids are hashes."""

    def __init__(self) -> None:
        self._heap: list[tuple[str, Shown]] = []
        self.count = 0

    def add(self, record_ids: Sequence[str], positions: np.ndarray, files: Sequence[str]) -> None:
        self.count += len(record_ids)
        new = ((i, Shown(int(p), f)) for i, p, f in zip(record_ids, positions, files, strict=True))
        self._heap = heapq.nsmallest(MOSAIC, [*self._heap, *new])

    def shown(self) -> list[Shown]:
        return [shown for _, shown in self._heap]


class Nearest:
    """The records just below and just above a cut of one column.

    Args:
        cut: records that equal it count as above.
    """

    def __init__(self, cut: float) -> None:
        self.cut = cut
        self._below: list[tuple[float, str, Shown]] = []
        self._above: list[tuple[float, str, Shown]] = []

    def add(self, values: np.ndarray, record_ids: Sequence[str], positions: np.ndarray, files: Sequence[str]) -> None:
        """NaN is on neither side."""
        distance = np.abs(values - self.cut)
        for side, inside in ((self._below, values < self.cut), (self._above, values >= self.cut)):
            at = np.flatnonzero(inside)
            if len(at) > NEAREST:
                bar = np.partition(distance[at], NEAREST - 1)[NEAREST - 1]
                at = at[distance[at] <= bar][: 16 * NEAREST]  # equal values may be many
            new = [
                (float(distance[i]), record_ids[i], Shown(int(positions[i]), files[i], f"{values[i]:.4g}")) for i in at
            ]
            side[:] = heapq.nsmallest(NEAREST, [*side, *new])

    def shown(self) -> tuple[list[Shown], list[Shown]]:
        """(below, above), the nearest first."""
        return [shown for *_, shown in self._below], [shown for *_, shown in self._above]


class Groups:
    """The first near-duplicate groups by the position of their keeper, with their first members."""

    def __init__(self) -> None:
        self.sizes: dict[int, int] = {}
        self._members: dict[int, list[tuple[int, float]]] = {}
        self.count = 0

    def add(self, position: int, keeper: int, distance: float) -> None:
        """A record that is dropped for its keeper."""
        self.count += 1
        if keeper not in self._members:
            if len(self._members) == GROUPS:
                last = max(self._members)
                if keeper > last:
                    return
                del self._members[last], self.sizes[last]
            self._members[keeper], self.sizes[keeper] = [], 0
        self.sizes[keeper] += 1
        members = self._members[keeper]
        members.append((position, distance))
        members.sort()
        del members[GROUP_SIZE:]

    def shown(self) -> list[tuple[int, int, list[Shown]]]:
        """(keeper, number of records dropped for it, its first members) by keeper."""
        return [
            (keeper, self.sizes[keeper], [Shown(p, "", f"differs by {d:.1f}") for p, d in self._members[keeper]])
            for keeper in sorted(self._members)
        ]
