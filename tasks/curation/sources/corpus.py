"""Reads a written corpus shard by shard; a shard needs only its own files."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq

from model.storage import is_remote, join
from tasks.curation.sources import file_trees, folder, formats, parquet, tars
from tasks.curation.sources.base import (
    CHANGED,
    FILES_FOLDER,
    REPORT,
    SHARDS_TABLE,
    Account,
    Options,
    Record,
    Shard,
    base_name,
    records_in_order,
    visible,
)
from tasks.store import fetch_file


class Corpus:
    """See base.open_corpus. `report` is the report of the scan."""

    def __init__(self, directory: str | os.PathLike) -> None:
        self.directory = Path(directory)
        for name in (SHARDS_TABLE, REPORT):
            if not (self.directory / name).is_file():
                raise ValueError(f"{directory} is not a corpus: it has no {name}")
        self.report = json.loads((self.directory / REPORT).read_text())
        options = self.report["options"]
        self._options = Options(**options | {"caption_columns": tuple(options["caption_columns"])})

    def account(self) -> Account:
        """The counts of the scan. Together with those of all shards they are the account of the source."""
        return Account.from_json(self.report["account"])

    def shards(self) -> Iterator[Shard]:
        """The rows of shards.parquet, in its order."""
        with pq.ParquetFile(self.directory / SHARDS_TABLE) as file:
            for batch in file.iter_batches(1024, use_threads=False):
                for row in batch.to_pylist():
                    yield Shard(**row)

    def locator(self, shard: Shard) -> str:
        """The name of a shard's file in ledger and report, as of a record: without the location of a local source."""
        if is_remote(shard.uri):
            return shard.uri
        if shard.source != "user" or shard.kind == "urls":
            return base_name(shard.uri)
        return self.without_location(visible(shard.uri)) if shard.kind != "files" else shard.shard_id

    def without_location(self, text: str) -> str:
        """A message in which files of a local source are named by their paths inside it."""
        root = str(self.report.get("root", "")).rstrip("/")
        return re.sub(rf"(?<!\w){re.escape(visible(root))}/", "", text) if root.startswith("/") else text

    def read(self, shard: Shard, account: Account) -> Iterator[Record]:
        """The records of a shard in the shard's own order; counts its other files in `account`.

        Raises:
            ValueError: a file cannot be read, or has changed since the scan.
        """
        yield from records_in_order(self._read(shard, account))

    def scenes(self, shard: Shard) -> dict[str, dict]:
        """The scenes of a made shard: key -> made.scenes.Scene as a dict. Empty for other shards."""
        if shard.source == "user":
            return {}
        from tasks.curation.sources.made import corpus

        return corpus.read_scenes(self._made_uri(shard))

    def _made_uri(self, shard: Shard) -> str:
        return shard.uri if is_remote(shard.uri) or os.path.isabs(shard.uri) else join(self.directory, shard.uri)

    def _read(self, shard: Shard, account: Account) -> Iterator[Record]:
        if shard.source != "user":
            from tasks.curation.sources.made import corpus

            above, _, name = self._made_uri(shard).rpartition("/")
            yield from corpus.read(file_trees.at(above), name, shard, account)
            return
        if shard.kind == "urls":
            from tasks.curation.sources.urls import shards

            yield from shards.read(shard, account)
            return
        root = self.report["root"]
        place = file_trees.at(root, self.report.get("alone"))
        # Of this shard only: all lists together have a row for each loose image of the corpus.
        table = fetch_file(self.directory, f"{FILES_FOLDER}/{shard.shard_id}.parquet")
        if shard.kind == "files":
            if table is None:
                raise ValueError(f"{self.directory} has no list of the files of shard {shard.shard_id}")
            yield from folder.read(place, table, self._options, account)
            return
        assert shard.uri.startswith(root), (shard.uri, root)
        name = shard.uri[len(root) :].lstrip("/")
        if shard.kind != "parquet" and place.digest(name) != shard.digest:
            raise ValueError(f"{place.shown(name)} {CHANGED}")
        if shard.kind == "tar":
            beside = (
                {f.name: (list(f.captions), f.problem, f.detail) for f in folder.load(table)}
                if table is not None
                else {}
            )
            yield from tars.read(place, name, self._options, beside, account)
        elif shard.kind == "parquet":
            yield from parquet.read(place, name, shard, self._options, account)
        else:
            yield from formats.load(shard.kind).read(place, name, self._options, account)
