"""Reads a curated directory: the records of each shard to train on, and their bytes from the source.

curated = open_curated(path)
for part in curated.parts():                    # one for each shard
    table = curated.selection(part)             # its kept records (selections.SELECTION)
    for i, record in curated.images(part): ...  # row i of that table, and its bytes
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Container, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tasks.curation.decisions.selections import SELECTION_TABLE
from tasks.curation.ledger import LEDGER_TABLE
from tasks.curation.sources.base import LISTS, Account, Record, Shard, open_corpus
from tasks.store import INDEX, Part, fetch_part, read_index

READERS = 16  # threads that read tables of selections

CORPUS = "corpus"  # the tables of the corpus, next to the index of selections
# Files with a row for each record of the source, for artifacts.fetch(without=...): readers of images do not need the
# ledger, and fetch the lists of files of their own shards only.
LARGE_FILES = (LEDGER_TABLE, LISTS)


def open_curated(path: str | os.PathLike, fetch: Callable[[Part], Path] = fetch_part) -> Curated:
    """Opens a curated directory.

    Raises:
        ValueError: `path` is not a curated directory.
    """
    path = Path(path)
    if not (path / INDEX).is_file() or not (path / CORPUS).is_dir():
        raise ValueError(f"{path} is not a curated directory: it needs {INDEX} and {CORPUS}/")
    return Curated(path, fetch)


class Curated:
    def __init__(self, path: Path, fetch: Callable[[Part], Path]) -> None:
        self.path, self._fetch = path, fetch
        self._corpus = open_corpus(path / CORPUS)
        self._shards: dict[str, Shard] | None = None

    def parts(self) -> Iterator[Part]:
        """The selections of the shards with a kept record, in the order of the corpus; `rows` counts records."""
        return (part for part in read_index(self.path) if part.rows)

    @property
    def num_records(self) -> int:
        return sum(part.rows for part in self.parts())

    def selection(self, part: Part) -> pa.Table:
        """The kept records of one shard (selections.SELECTION), in its order. Fetches a remote part."""
        return pq.read_table(self._fetch(part) / SELECTION_TABLE)

    def shard(self, part: Part) -> Shard:
        if self._shards is None:
            self._shards = {shard.shard_id: shard for shard in self._corpus.shards()}
        return self._shards[part.name]

    def images(
        self, part: Part, rows: Container[int] | None = None, lost: Callable[[int, str], None] | None = None
    ) -> Iterator[tuple[int, Record]]:
        """(row of `selection(part)`, record with its original bytes) of every kept record of one shard.

        Args:
            rows: rows of the selection to read; others are not checked. None: all.
            lost: called with the row and the reason for each record that is gone or has changed since it was scored;
                None: raise an error.

        Raises:
            ValueError: a file of the source has changed since it was scored; the message names it.
        """
        table = self.selection(part)
        wanted = {
            key: (i, record_id)
            for i, (key, record_id) in enumerate(zip(table["key"].to_pylist(), table["record_id"].to_pylist()))
            if rows is None or i in rows
        }
        for record in self._corpus.read(self.shard(part), Account()):
            if record.key not in wanted:
                continue
            i, record_id = wanted.pop(record.key)
            if hashlib.sha256(record.data).hexdigest() != record_id:
                if lost is not None:
                    lost(i, f"{record.locator} has changed since it was scored")
                    continue
                raise ValueError(
                    f"{record.locator} has changed since it was scored (SHA-256 {record_id[:16]}... is expected): "
                    "restore the file, or run the curation again"
                )
            yield i, record
        if lost is not None:
            for i, _ in wanted.values():
                lost(i, f"{table['locator'][i].as_py()} is gone since it was scored")
        elif wanted:
            i, _ = next(iter(wanted.values()))
            raise ValueError(
                f"{table['locator'][i].as_py()} is gone since it was scored ({len(wanted)} records of shard "
                f"{part.name} are): restore the source, or run the curation again"
            )


def images_by_tier(curated_dir: str | Path) -> dict[str, int]:
    """Number of images of the train split, by tier."""
    curated = open_curated(curated_dir)
    images: Counter[str] = Counter()

    def tiers(part: Part) -> list[dict[str, Any]]:
        selection = curated.selection(part).select(["tier", "split"])
        return selection.filter(pc.equal(selection["split"], "train"))["tier"].value_counts().to_pylist()

    with ThreadPoolExecutor(READERS) as pool:
        for counts in pool.map(tiers, curated.parts()):
            images.update({count["values"]: count["counts"] for count in counts})
    return dict(sorted(images.items()))
