"""Reads a curated directory: its table, and its images fitted to aspect buckets."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from tasks.curation.filters import decode
from tasks.curation.shards import read_shard
from tasks.encoding.buckets import Bucket, fit, nearest_bucket

COLUMNS = ["key", "record_id", "shard", "width", "height", "source", "tier", "captions", "split"]
AHEAD = 256  # images that are decoded ahead of their use


def load_table(curated_dir: str | os.PathLike) -> pd.DataFrame:
    """records.parquet of a curated directory, in the order of its shards.

    Raises:
        ValueError: there is none, or it has no record.
    """
    path = Path(curated_dir) / "records.parquet"
    if not path.is_file():
        raise ValueError(f"{curated_dir} is not a curated directory: it has no records.parquet")
    table = pd.read_parquet(path, columns=COLUMNS)
    if table.empty:
        raise ValueError(f"{curated_dir} has no record left to encode; its ledger says which rule rejected each")
    return table.sort_values(["shard", "key"], kind="stable").reset_index(drop=True)


def images_by_tier(curated_dir: str | os.PathLike) -> dict[str, int]:
    """Images of each tier that training draws from."""
    return {str(tier): int(count) for tier, count in load_table(curated_dir)["tier"].value_counts().items()}


def buckets_of(table: pd.DataFrame, buckets: list[Bucket]) -> list[Bucket]:
    """The bucket of each row. Few sizes occur many times, so each is looked up once."""
    known: dict[tuple[int, int], Bucket] = {}
    found = []
    for size in zip(table["width"].tolist(), table["height"].tolist(), strict=True):
        if size not in known:
            known[size] = nearest_bucket(*size, buckets)
        found.append(known[size])
    return found


def read_images(
    curated_dir: str | os.PathLike, table: pd.DataFrame, buckets: list[Bucket]
) -> Iterator[tuple[int, np.ndarray]]:
    """(row of `table`, uint8 pixels [H, W, 3]) of every row, fitted to its bucket, shard by shard.

    Args:
        table: rows of `load_table`, with their own index 0..n-1.
        buckets: one per row.

    Raises:
        ValueError: a shard lacks a record that the table names.
    """
    rows = {key: i for i, key in enumerate(table["key"])}
    sizes = table["width"] * table["height"]

    def pixels(data: bytes, row: int) -> np.ndarray:
        return np.asarray(fit(decode(data, int(sizes[row])), buckets[row]))

    def jobs() -> Iterator[tuple[int, Callable[[], Any]]]:
        for shard in sorted(table["shard"].unique()):
            for record in read_shard(Path(curated_dir) / "shards" / f"{shard:05d}.tar"):
                row = rows.pop(record.key, None)
                if row is not None:
                    yield row, lambda data=record.data, row=row: pixels(data, row)

    # Pillow decodes and resizes without the interpreter's lock: threads run beside the model.
    waiting: deque[tuple[int, Future]] = deque()
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        for row, job in jobs():
            waiting.append((row, pool.submit(job)))
            if len(waiting) >= AHEAD:
                done, future = waiting.popleft()
                yield done, future.result()
        while waiting:
            done, future = waiting.popleft()
            yield done, future.result()
    if rows:
        raise ValueError(
            f"{curated_dir}: {len(rows)} records of records.parquet are in no shard, such as {next(iter(rows))!r}"
        )
