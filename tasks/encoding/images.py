"""Decodes the images of a shard and fits them to aspect buckets."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np

from tasks.curation.scoring.decoding import decode
from tasks.encoding.buckets import Bucket, fit

if TYPE_CHECKING:
    from tasks.curation.curated import Curated
    from tasks.store import Part

AHEAD = 256  # maximum number of images decoded ahead of their use
AHEAD_BYTES = 256 * 2**20  # maximum of their files in total
AHEAD_PIXELS = 64_000_000  # maximum of their pixels in total; see scoring/decode_memory.py for the bytes of each
OnFailure = Callable[[int, ValueError], None]


def read_images(
    curated: Curated, part: Part, rows: Mapping[int, tuple[Bucket, int]], on_failure: OnFailure
) -> Iterator[tuple[int, np.ndarray]]:
    """Yields (row of the selection, uint8 pixels [H, W, 3]) for rows of one shard, in order, each fitted to its bucket.

    Args:
        rows: row -> (bucket, number of pixels in the image's header when it was scored).
        on_failure: called with the row and the error if an image has changed (`Changed`) or does not decode.
    """

    def pixels(data: bytes, row: int) -> np.ndarray | ValueError:
        bucket, size = rows[row]
        try:
            return np.asarray(fit(decode(data, size), bucket))
        except ValueError as error:
            return error

    # Pillow releases the GIL while it decodes and resizes, so that threads run in parallel with the model.
    waiting: deque[tuple[int, int, Future]] = deque()  # row, bytes of the file, pixels
    ahead = ahead_bytes = 0
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:

        def next_one() -> tuple[int, np.ndarray] | None:
            nonlocal ahead, ahead_bytes
            row, num_bytes, future = waiting.popleft()
            ahead, ahead_bytes = ahead - rows[row][1], ahead_bytes - num_bytes
            image = future.result()
            if isinstance(image, ValueError):
                on_failure(row, image)
                return None
            return row, image

        for row, record in curated.images(part, rows, lambda row, reason: on_failure(row, Changed(reason))):
            waiting.append((row, len(record.data), pool.submit(pixels, record.data, row)))
            ahead, ahead_bytes = ahead + rows[row][1], ahead_bytes + len(record.data)
            while len(waiting) >= AHEAD or (len(waiting) > 1 and (ahead > AHEAD_PIXELS or ahead_bytes > AHEAD_BYTES)):
                if (image := next_one()) is not None:
                    yield image
        while waiting:
            if (image := next_one()) is not None:
                yield image


class Changed(ValueError):
    """An image's bytes differ from those that were scored, or no longer exist."""


class ChangedRecords(ValueError):
    """Some records of a shard have changed. `reasons`: row of the selection -> why."""

    def __init__(self, reasons: dict[int, str]):
        super().__init__("; ".join(list(reasons.values())[:3]))
        self.reasons = reasons
