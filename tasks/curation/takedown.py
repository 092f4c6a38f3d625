"""Finds records that must no longer be used: `python -m tasks.curation.takedown LIST PLACE [PLACE ...]`.

    python -m tasks.curation.takedown takedown.txt .nucleus
    python -m tasks.curation.takedown s3://BUCKET/takedown.txt s3://BUCKET/nucleus s3://BUCKET/published --json
    python -m tasks.curation.takedown takedown.txt s3://BUCKET/nucleus hf://OWNER/NAME

The list has one record a line: its id (the SHA-256 of the image's bytes), its key, its URL, or its file name in
ledgers; text after # is a comment. With `curation.takedown: LIST` in the recipe, curation rejects these records by the
rule `takedown`.

The command names every artifact and published pipeline in the places (NUCLEUS_HOME, NUCLEUS_STORE, published places,
repositories of the Hub) that had one, and their near duplicates in ledgers: these are other records, and may have to be listed too. It deletes
nothing. Exits 1 if a published pipeline had one of the records.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from model import storage
from tasks import hub_directory, sealed
from tasks.curation.decisions import decide
from tasks.curation.scoring.score import SCORES_TABLE, THUMBNAILS_TABLE
from tasks.curation.scoring.scored_shard import fetch_pictures
from tasks.curation.sources.base import TAKEDOWN
from tasks.envs import CACHE_VERSIONS
from tasks.lineage.record_usage import RecordUse, uses_of
from tasks.manifest import MANIFEST, visible
from tasks.store import Part, fetch_part, make_part

MAX_LIST_BYTES = 2**30
NEAR = "near_duplicate"
# Text of a ledger before the file for which a near duplicate was left out (decide.py).
_KEEPER = re.compile(
    r"thumbnail differs by \S+ from |embedding has cosine \S+ with |pHash-256 differs in \S+ of 256 bits from "
)
_SHA256 = re.compile(r"[0-9a-fA-F]{64}")


def read_list(path: str) -> list[str]:
    """The records of a list, in order, without repeats.

    Raises:
        ValueError: the file does not exist, is too large or not text, or has no record.
    """
    files, where = storage.filesystem(storage.check_path(path))
    try:
        about = files.info(where)
        if about["type"] != "file":  # a device such as /dev/zero has no end
            raise ValueError(f"takedown list {visible(path)!r} is not a file")
        if about["size"] > MAX_LIST_BYTES:
            raise ValueError(f"takedown list {visible(path)!r} is larger than {MAX_LIST_BYTES // 2**20} MiB")
        content = files.cat_file(where)
    except FileNotFoundError:
        raise ValueError(f"takedown list {visible(path)!r} does not exist") from None
    try:
        lines = content.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"takedown list {visible(path)!r} is not UTF-8: {error}") from error
    entries: dict[str, None] = {}
    for line in lines:
        # A URL may contain a #: a comment begins the line or follows a blank.
        entry = re.split(r"(?:^|\s)#", line, maxsplit=1)[0].strip()
        if entry:
            entries[entry.lower() if _SHA256.fullmatch(entry) else entry] = None
    if not entries:
        raise ValueError(f"takedown list {visible(path)!r} names no record")
    return list(entries)


def remove(parts: Sequence[Part], entries: Collection[str]) -> list[Part]:
    """The score parts, with the records of the list marked as taken down, and without their thumbnails.

    A part without listed records is unchanged.
    """
    wanted = pa.array(sorted(set(entries)), pa.string())
    with ThreadPoolExecutor(decide.FETCHERS) as pool:
        found = pool.map(lambda part: [] if part.error else _listed_rows(part, wanted), parts)
        return [_without(part, rows) if rows else part for part, rows in zip(parts, found, strict=True)]


def _listed_rows(part: Part, wanted: pa.Array) -> list[int]:
    """The rows that the list names, apart from those that are marked already."""
    path = decide.fetch_columns(part) / SCORES_TABLE
    table = pq.read_table(path, columns=["row", "record_id", "key", "locator", "problem"])
    hit = pc.or_(
        pc.or_(pc.is_in(table["record_id"], value_set=wanted), pc.is_in(table["key"], value_set=wanted)),
        pc.is_in(table["locator"], value_set=wanted),
    )
    return table.filter(pc.and_(hit, pc.not_equal(table["problem"], TAKEDOWN)))["row"].to_pylist()


def _without(part: Part, rows: list[int]) -> Part:
    inputs = {"scores": part.digest, "takedown": rows}

    def make(out: Path) -> int:
        for file in sorted(fetch_part(part, without=(THUMBNAILS_TABLE,)).iterdir()):
            if file.name == SCORES_TABLE:
                _write_without(file, rows, out / file.name)
            elif file.name not in (MANIFEST, THUMBNAILS_TABLE):
                shutil.copyfile(file, out / file.name)
        _write_without(fetch_pictures(part) / THUMBNAILS_TABLE, rows, out / THUMBNAILS_TABLE)
        return part.rows

    version = CACHE_VERSIONS["curation"]
    return make_part(part.kind, part.name, version, inputs, make, [part.as_parent()], {"takedown": rows})


def _write_without(file: Path, rows: list[int], out: Path) -> None:
    table = pq.read_table(file)
    hit = pc.is_in(table["row"], value_set=pa.array(rows, pa.int64()))
    if file.name == THUMBNAILS_TABLE:
        table = table.filter(pc.invert(hit))
    else:
        for name, value in (("problem", TAKEDOWN), ("problem_detail", "on the list of curation.takedown")):
            changed = pc.if_else(hit, pa.scalar(value), table[name])
            table = table.set_column(table.schema.get_field_index(name), table.schema.field(name), changed)
    group = pq.ParquetFile(file).metadata
    size = group.row_group(0).num_rows if group.num_row_groups else None
    pq.write_table(table, out, compression="zstd", row_group_size=size)


class Found(NamedTuple):
    """The artifacts that had a listed record. near: (record id, file) of its near duplicates."""

    entry: str
    uses: list[RecordUse]
    near: list[tuple[str, str]]

    @property
    def published(self) -> list[RecordUse]:
        return [use for use in self.uses if use.has and use.kind == "pipeline"]


def find(entries: Sequence[str], places: Sequence[str]) -> list[Found]:
    """Finds the uses of each record of the list.

    Raises:
        ValueError: there are no artifacts.
    """
    uses = uses_of(entries, places)
    near = _near_duplicates(entries, uses)
    return [Found(entry, uses[entry], sorted(near.get(entry, ()))) for entry in entries]


def _near_duplicates(entries: Sequence[str], uses: dict[str, list[RecordUse]]) -> dict[str, set[tuple[str, str]]]:
    """For each entry, the records that a ledger left out in its favour, and the one for which it was left out."""
    ledgers = {use.uri for record_uses in uses.values() for use in record_uses if use.kind == "curated"}
    near: dict[str, set[tuple[str, str]]] = {}
    wanted = set(entries)
    for uri in sorted(ledgers):
        files: dict[str, str] = {}  # file -> entry
        for row in _ledger(uri, None):
            for column in ("record_id", "key", "file"):
                if row[column] in wanted:
                    files[row["file"]] = row[column]
        for row in _ledger(uri, NEAR):
            keeper = _KEEPER.sub("", row["detail"], count=1)
            if keeper in files and row["file"] not in files:
                near.setdefault(files[keeper], set()).add((row["record_id"], row["file"]))
            elif row["file"] in files and keeper not in files:
                near.setdefault(files[row["file"]], set()).add(("", keeper))
    return near


def _ledger(uri: str, rule: str | None) -> Iterator[dict[str, str]]:
    with sealed.open_table(uri, "ledger.parquet") as table:
        for batch in table.iter_batches(columns=["record_id", "key", "file", "rule", "detail"]):
            chosen = batch if rule is None else batch.filter(pc.equal(batch["rule"], rule))
            yield from chosen.to_pylist()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tasks.curation.takedown", description=__doc__.split("\n\n")[0])
    parser.add_argument("list", help="a file or URI with one record a line")
    parser.add_argument(
        "places", nargs="+", help="NUCLEUS_HOME, NUCLEUS_STORE, published pipelines, or hf://OWNER/NAME"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object for each record of the list")
    options = parser.parse_args(arguments)
    try:
        places = [
            place if hub_directory.is_hub(place) else storage.check_path(place).rstrip("/") for place in options.places
        ]
        records = find(read_list(options.list), places)
    except (ValueError, OSError) as error:
        print(f"ValueError: {visible(str(error))}", file=sys.stderr)
        return 2
    for one in records:
        if options.json:
            near = [{"record_id": record_id, "file": file} for record_id, file in one.near]
            line = {"record": one.entry, "uses": [use._asdict() for use in one.uses], "near_duplicates": near}
            print(json.dumps(line, ensure_ascii=False))
            continue
        print(visible(f"{one.entry}: {sum(use.has for use in one.uses)} artifacts had it"))
        for use in one.uses:
            print(visible(f"  {use.kind} {use.digest}: {use.why}, at {use.uri}"))
        for record_id, file in one.near:
            print(visible(f"  near duplicate: {file} {record_id}"))
    published = sorted({use.uri for one in records for use in one.published})
    if not options.json:
        used = sum(any(use.has for use in one.uses) for one in records)
        print(f"{len(records)} records on the list, {used} of them used; {len(published)} published pipelines had one")
        for uri in published:
            print(visible(f"  {uri}"))
    return 1 if published else 0


if __name__ == "__main__":
    sys.exit(main())
