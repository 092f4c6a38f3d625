"""The images of a shard, decoded and fitted to aspect buckets."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np

from tasks.curation.filters import decode
from tasks.encoding.buckets import Bucket, fit

if TYPE_CHECKING:
    from tasks.curation.curated import Curated
    from tasks.store import Part

AHEAD = 256  # images that are decoded ahead of their use, at most
AHEAD_PIXELS = 64_000_000  # of them together; a decoded pixel may take 12 bytes
Lost = Callable[[int, ValueError], None]


def read_images(
    curated: Curated, part: Part, rows: Mapping[int, tuple[Bucket, int]], lost: Lost
) -> Iterator[tuple[int, np.ndarray]]:
    """(row of the selection, uint8 pixels [H, W, 3]) of rows of one shard, each fitted to its bucket, in their order.

    Args:
        rows: row -> its bucket, and the number of pixels that its header promised when it was scored.
        lost: called with the row and the reason where an image has changed (`Changed`), or does not decode.
    """

    def pixels(data: bytes, row: int) -> np.ndarray | ValueError:
        bucket, size = rows[row]
        try:
            return np.asarray(fit(decode(data, size), bucket))
        except ValueError as error:
            return error

    # Pillow decodes and resizes without the interpreter's lock: threads run beside the model.
    waiting: deque[tuple[int, Future]] = deque()
    ahead = 0
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:

        def next_one() -> tuple[int, np.ndarray] | None:
            nonlocal ahead
            row, future = waiting.popleft()
            ahead -= rows[row][1]
            image = future.result()
            if isinstance(image, ValueError):
                lost(row, image)
                return None
            return row, image

        for row, record in curated.images(part, rows, lambda row, reason: lost(row, Changed(reason))):
            waiting.append((row, pool.submit(pixels, record.data, row)))
            ahead += rows[row][1]
            while len(waiting) >= AHEAD or (ahead > AHEAD_PIXELS and len(waiting) > 1):
                if (image := next_one()) is not None:
                    yield image
        while waiting:
            if (image := next_one()) is not None:
                yield image


class Changed(ValueError):
    """The bytes are not those that were scored, or they are gone."""


class ChangedRecords(ValueError):
    """Some records of a shard have changed. `reasons`: row of the selection -> why."""

    def __init__(self, reasons: dict[int, str]):
        super().__init__("; ".join(list(reasons.values())[:3]))
        self.reasons = reasons
