"""Shards of downloaded images: a range of a table of URLs -> a tar in img2dataset's layout, and a table of every row.

rows --fetch.py--> work_dir: bytes.bin, journal.jsonl --in the order of the table--> SHARD.tar      images, .txt, .json
                   append only: a kill loses none                                    SHARD.parquet  every row, and why not
                                                                                     shards.parquet, report.json
"""

from __future__ import annotations

import asyncio
import hashlib
import io
import json
import os
import tarfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from eval.files import open_plain
from model.logs import get_logger
from model.storage import join
from tasks.curation.config import SourceConfig
from tasks.curation.journal import Journal
from tasks.curation.sources import tar_format
from tasks.curation.sources.base import (
    REPORT,
    SHARDS_TABLE,
    UNREADABLE_CAPTION,
    Account,
    Options,
    Record,
    Shard,
    digest_of,
    record_key,
    visible,
)
from tasks.curation.sources.file_trees import FileTree, at, find
from tasks.curation.sources.scan import TableWriter
from tasks.curation.sources.tables import sniffed
from tasks.curation.sources.urls import tables
from tasks.curation.sources.urls.fetch import Fetched, Fetcher
from tasks.curation.sources.urls.tables import Range

logger = get_logger(__name__)

BYTES, PROGRESS_S = "bytes.bin", 5.0
ROWS = pa.schema(
    [
        ("key", pa.string()),  # name of the members of the tar, "" if nothing was downloaded
        ("row", pa.int64()),  # row of the table of URLs
        ("url", pa.string()),
        ("caption", pa.string()),  # the first caption
        ("captions", pa.list_(pa.string())),
        ("status", pa.string()),  # success or failed_to_download
        ("rule", pa.string()),  # rule of the ledger; "" for a success
        ("error_message", pa.string()),
        ("http_status", pa.int32()),
        ("final_url", pa.string()),
        ("content_type", pa.string()),
        ("attempts", pa.int32()),
        ("bytes", pa.int64()),
        ("sha256", pa.string()),
        ("caption_problem", pa.string()),
    ]
)
SUCCESS, FAILURE = "success", "failed_to_download"


LISTING = pa.schema(
    [("name", pa.string()), ("first_row", pa.int64()), ("num_rows", pa.int64()), ("shard", pa.string())]
)
LISTING_TABLE = "urls.parquet"


def write_listing(config: SourceConfig, path: str, out_dir: Path, needs_captions: bool = True) -> dict[str, Any]:
    """Lists the tables of URLs at `path` as ranges of rows, one for each shard: urls.parquet and report.json.

    Returns:
        the report: {"shards", "images", "account", "root", "alone"}.

    Raises:
        ValueError: no table of URLs, one that cannot be read, or one without captions although `needs_captions`.
    """
    place, account = find(path), Account()
    shards = images = 0
    digests: dict[str, str] = {}
    with pq.ParquetWriter(out_dir / LISTING_TABLE, LISTING) as table:
        for chosen in tables.ranges(place, config, account, needs_captions):
            if chosen.name not in digests:
                digests = {chosen.name: place.digest(chosen.name)}
            row = chosen._asdict() | {"shard": shard_name(digests[chosen.name], chosen, config)}
            table.write_table(pa.Table.from_pylist([row], LISTING))
            shards, images = shards + 1, images + chosen.num_rows
    if not images:
        left_out = account.left_out() or "nothing"
        raise ValueError(f"source {visible(path)!r} has no table of URLs (.parquet, .csv, .tsv); left out: {left_out}")
    report = {
        "shards": shards,
        "images": images,
        "account": account.to_json(),
        "root": place.uri(),
        "alone": place.alone,
    }
    (out_dir / REPORT).write_text(json.dumps(report, indent=1) + "\n")
    logger.info(f"source: {images} URLs in {shards} shards")
    return report


def read_listing(directory: Path) -> tuple[dict[str, Any], list[tuple[Range, str]]]:
    """The report of a listing, and its ranges with the names of their shards."""
    report = json.loads((directory / REPORT).read_text())
    rows = pq.read_table(directory / LISTING_TABLE).to_pylist()
    return report, [(Range(row["name"], row["first_row"], row["num_rows"]), row["shard"]) for row in rows]


def shard_name(digest: str, chosen: Range, config: SourceConfig) -> str:
    """16 hexadecimal digits of a hash of the table's content, the range, and settings of images and captions."""
    assert config.urls is not None
    columns = [config.urls.column, config.caption_columns, config.encoding]
    return digest_of("urls", digest, *chosen, columns, config.urls.content())[:16]


def write_shard(
    place: FileTree, chosen: Range, name: str, config: SourceConfig, work_dir: Path, out_dir: str | os.PathLike
) -> int:
    """Downloads a range and writes its shard into an empty directory; returns the number of its rows.

    Args:
        work_dir: has the downloads so far, including those of a killed attempt.

    Raises:
        ValueError: the table has changed, or cannot be read.
    """
    assert config.urls is not None
    out_dir = Path(out_dir)
    listed = list(tables.rows(place, chosen, config))
    done = asyncio.run(_download([(row.row, row.url) for row in listed], config, work_dir))
    rows: list[dict[str, Any]] = []
    with (
        open(work_dir / BYTES, "rb") as downloaded,
        tarfile.open(out_dir / f"{name}.tar", "w", tarfile.USTAR_FORMAT) as tar,
    ):
        for row in listed:
            entry = done[row.row]
            fields = {"row": row.row, "url": row.url, "captions": row.captions, "caption_problem": row.problem}
            fields |= {"caption": row.captions[0] if row.captions else None, "rule": entry["rule"]}
            fields |= {"key": "", "status": FAILURE, "error_message": entry["detail"], "bytes": 0, "sha256": ""}
            fields |= {name: entry[name] for name in ("http_status", "final_url", "content_type", "attempts")}
            if not entry["rule"]:
                downloaded.seek(entry["begin"])
                data = downloaded.read(entry["bytes"])
                fields |= {"key": f"{row.row:09d}", "status": SUCCESS, "bytes": len(data), "sha256": entry["sha256"]}
                _add(tar, fields, data)
            rows.append(fields)
    pq.write_table(pa.Table.from_pylist(rows, ROWS), out_dir / f"{name}.parquet", compression="zstd")
    with open(out_dir / f"{name}.tar", "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    size = (out_dir / f"{name}.tar").stat().st_size
    with TableWriter(out_dir) as table:
        table.add(Shard(name, "urls", f"{name}.tar", chosen.first_row, len(rows), size, digest, "user"))
    table.report(Account(), Options(), "", name=chosen.name)
    return len(rows)


def _add(tar: tarfile.TarFile, fields: dict[str, Any], data: bytes) -> None:
    sidecar = {name: fields[name] for name in ("key", "url", "caption", "captions", "status", "sha256")}
    members = [(sniffed(data), data), ("json", json.dumps(sidecar | {"error_message": None}, sort_keys=True).encode())]
    if fields["caption"] is not None:
        members.insert(1, ("txt", fields["caption"].encode()))
    for ext, content in members:
        info = tarfile.TarInfo(f"{fields['key']}.{ext}")  # mtime 0: bytes depend only on downloaded content
        info.size = len(content)
        tar.addfile(info, io.BytesIO(content))


async def _download(urls: list[tuple[int, str]], config: SourceConfig, work_dir: Path) -> dict[int, dict[str, Any]]:
    """Row -> its entry in the journal. Downloads only rows that the journal lacks."""
    assert config.urls is not None
    work_dir.mkdir(parents=True, exist_ok=True)
    with (
        Journal(str(work_dir), sync=False) as journal,
        open(open_plain(work_dir / BYTES, os.O_WRONLY | os.O_CREAT | os.O_APPEND), "ab") as downloaded,
    ):
        size = downloaded.seek(0, os.SEEK_END)
        done = {int(row["row"]): row for row in journal.rows if row["begin"] + row["bytes"] <= size}
        left = [(row, url) for row, url in urls if row not in done]
        report_at = time.monotonic() + PROGRESS_S
        async with Fetcher(config.urls, work_dir) as fetcher:
            async for number, fetched in fetcher.fetch_all(left):
                row = _entry(number, fetched, downloaded)
                downloaded.flush()  # before its row, so that the bytes of every row are on disk
                journal.add(row)
                done[number] = row
                if time.monotonic() > report_at:
                    report_at = time.monotonic() + PROGRESS_S
                    logger.info(f"source: {len(done)} of {len(urls)} URLs")
    return done


def _entry(row: int, fetched: Fetched, downloaded: BinaryIO) -> dict[str, Any]:
    """The row of the journal for an answer, whose bytes are appended to `downloaded`."""
    begin, size, digest = downloaded.tell(), 0, hashlib.sha256()
    for piece in fetched.pieces():
        digest.update(piece)
        size += downloaded.write(piece)
    about = {"row": row, "rule": fetched.rule, "detail": fetched.detail, "http_status": fetched.status}
    about |= {"final_url": fetched.url, "content_type": fetched.content_type, "attempts": fetched.attempts}
    return about | {"begin": begin, "bytes": size, "sha256": "" if fetched.rule else digest.hexdigest()}


def write_corpus(
    parts: Sequence[str | os.PathLike], uris: Sequence[str], listing: dict[str, Any], out_dir: Path
) -> dict[str, Any]:
    """Writes the table over the directories of `write_shard`, in the order of the list of URLs; copies no tar.

    Args:
        uris: where the parts will be read.
        listing: the report of the list of URLs.
    """
    with TableWriter(out_dir) as table:
        for part, uri in zip(parts, uris, strict=True):
            (row,) = pq.read_table(Path(part) / SHARDS_TABLE).to_pylist()
            table.add(Shard(**row)._replace(uri=join(uri, row["uri"])))
    return table.report(Account.from_json(listing["account"]), Options(), "")


def read(shard: Shard, account: Account) -> Iterator[Record]:
    """Every row of a downloaded shard: a record with its bytes, or with the rule by which it is left out.

    Raises:
        ValueError: the tar has changed since it was downloaded.
    """
    above, _, name = shard.uri.rpartition("/")
    place = at(above)
    shown, table = place.shown(name), name.removesuffix(".tar") + ".parquet"
    source = json.loads(_bytes(place, REPORT))["name"]
    try:
        if place.digest(name) != shard.digest and "://" not in above:
            raise ValueError(f"{shown} is not what was downloaded")
        with place.open(table) as file, place.local_copy(name) as tar:
            stream = tar_format.Forward(tar)
            members = tar_format.members(stream)
            for batch in pq.ParquetFile(file).iter_batches(1024, use_threads=False):
                for row in batch.to_pylist():
                    account.use()
                    account.records += 1
                    yield _record(row, source, shown, stream, members)
    except (tar_format.TarError, OSError, pa.ArrowException) as error:
        raise ValueError(f"{shown} is not a readable shard: {visible(str(error))}") from error


def _record(
    row: dict[str, Any], source: str, shown: str, stream: tar_format.Forward, members: Iterator[tar_format.Member]
) -> Record:
    key, locator = record_key(source, str(row["row"])), visible(row["url"]) or f"{visible(source)}:{row['row']}"
    if row["status"] != SUCCESS:
        detail = f"{visible(source)}:{row['row']}: {row['error_message']}"
        return Record(key, b"", "bin", row["captions"], "user", locator, 0, row["rule"], detail)
    image = next(members)
    data = stream.read(image.size)
    member, _, ext = image.name.partition(".")
    if member != row["key"] or hashlib.sha256(data).hexdigest() != row["sha256"]:
        raise ValueError(f"{shown}: {visible(image.name)} is not what was downloaded for {row['url']}")
    for _ in range(2 if row["caption"] is not None else 1):  # .txt and .json
        next(members)
    problem = UNREADABLE_CAPTION if row["caption_problem"] else ""
    return Record(key, data, ext, row["captions"], "user", locator, 0, problem, row["caption_problem"])


def _bytes(place: FileTree, name: str) -> bytes:
    with place.open(name) as file:
        return file.read()
