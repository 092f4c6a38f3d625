"""Tables of URLs and captions: Parquet, CSV and TSV files, in ranges of rows that become shards."""

from __future__ import annotations

import codecs
import contextlib
import io
import itertools
import re
from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple, TextIO

import pyarrow as pa

from tasks.curation.config import SourceConfig
from tasks.curation.sources import parquet
from tasks.curation.sources.base import Account, base_name, check_size, extension, is_image, reason_of, visible
from tasks.curation.sources.captions import csv_text
from tasks.curation.sources.captions.caption_text import (
    MAX_TEXT_BYTES,
    CaptionError,
    caption_columns,
    captions_of_cells,
    column_hint,
    column_name,
    foreign,
)
from tasks.curation.sources.file_trees import FileTree
from tasks.curation.sources.tables import as_bytes, decoded
from tasks.curation.sources.urls.network import MAX_URL_CHARS

SUFFIXES = ("parquet", "csv", "tsv")
DECODED_BYTES = 2**20  # bytes at a time, to check whether a table is UTF-8
BLANK_LINES = 100  # before the header
REMEDY = "divide it, or write it as Parquet"
MAX_RANGE_CHARS = 64 * 2**20  # characters of a shard's URLs and captions, which are in memory during its download


class UrlRow(NamedTuple):
    """row: in the table, from 0. problem: why its captions cannot be read, or ""."""

    row: int
    url: str
    captions: list[str]
    problem: str = ""


class Range(NamedTuple):
    """Rows [first_row, first_row + num_rows) of a table of the source."""

    name: str
    first_row: int
    num_rows: int


def ranges(place: FileTree, config: SourceConfig, account: Account, needs_captions: bool = True) -> Iterator[Range]:
    """The tables of a source, split into ranges of at most `images_per_shard` rows; other files are counted.

    Raises:
        ValueError: a table has no column of URLs, or none of captions although `needs_captions`, or cannot be read.
    """
    for folder in place.walk():
        for reason, path in folder.left_out:
            account.skip(reason, path)
        for name in folder.files:
            path = folder.at(name)
            if extension(name) not in SUFFIXES:
                account.skip(reason_of(name), path)
                continue
            account.use()
            total = _count(place, path, config, needs_captions)
            for first in range(0, total, config.images_per_shard):
                yield Range(path, first, min(config.images_per_shard, total - first))


def _count(place: FileTree, name: str, config: SourceConfig, needs_captions: bool) -> int:
    shown = place.shown(name)
    check_size(shown, place.size(name))
    if extension(name) == "parquet":
        with place.open(name) as file, parquet.opened(shown, file) as table:
            _columns(shown, table.schema_arrow.names, config, needs_captions)
            return int(table.metadata.num_rows)
    return sum(1 for _ in _csv_cells(place, name, config, needs_captions))


def rows(place: FileTree, chosen: Range, config: SourceConfig) -> Iterator[UrlRow]:
    """The rows of a range.

    Raises:
        ValueError: the table cannot be read, has fewer rows, or more than `MAX_RANGE_CHARS`.
    """
    shown, count, chars = place.shown(chosen.name), 0, 0
    for row, cells, problem in _cells(place, chosen, config):
        url, *texts = cells
        count += 1
        captions: list[str] = []
        try:
            if any(isinstance(text, str) and len(text) > MAX_TEXT_BYTES for text in texts):
                raise CaptionError(f"has a caption larger than {MAX_TEXT_BYTES // 2**20} MiB")
            captions = captions_of_cells(decoded(text, config.encoding) for text in texts)
        except CaptionError as error:
            problem = f"{place.locator(chosen.name)}:{row} {error}"
        if isinstance(url, bytes):
            url = url.decode("utf-8", "replace")
        chars += len(url or "") + sum(map(len, captions))
        if chars > MAX_RANGE_CHARS:  # a table of a few kB can repeat one caption for every row
            raise ValueError(
                f"{shown}: rows {chosen.first_row} to {row} have more than {MAX_RANGE_CHARS // 2**20} MiB of URLs and "
                "captions; set source.images_per_shard to fewer"
            )
        address = url.strip() if isinstance(url, str) else ""
        yield UrlRow(row, address if len(address) <= MAX_URL_CHARS else "", captions, problem)
    if count != chosen.num_rows:
        raise ValueError(f"{shown} has changed since it was listed; start the run again")


def _cells(place: FileTree, chosen: Range, config: SourceConfig) -> Iterator[tuple[int, list[Any], str]]:
    """(row, [URL, caption, ...], why its captions may be cut or "") of a range."""
    shown, stop = place.shown(chosen.name), chosen.first_row + chosen.num_rows
    if extension(chosen.name) == "parquet":
        with place.open(chosen.name) as file, parquet.opened(shown, file) as table:
            names = list(_columns(shown, table.schema_arrow.names, config, False))
            groups, starts, begin = [], [], 0
            for i in range(table.metadata.num_row_groups):
                size = table.metadata.row_group(i).num_rows
                if begin < stop and begin + size > chosen.first_row:
                    groups.append(i)
                    starts.append(begin)
                begin += size
            batches = parquet.batches(shown, file, table, names, groups)
            yield from _within(batches, names, starts[0] if starts else 0, chosen.first_row, stop)
        return
    chosen_rows = itertools.islice(_csv_cells(place, chosen.name, config, False), chosen.first_row, stop)
    for row, (cells, problem) in enumerate(chosen_rows, chosen.first_row):
        yield row, cells, problem


def _within(
    batches: Iterator[pa.RecordBatch], names: list[str], row: int, first: int, stop: int
) -> Iterator[tuple[int, list[Any], str]]:
    for batch in batches:
        if row >= stop:
            return
        if row + len(batch) > first:
            columns = [as_bytes(batch.column(name)) for name in names]
            for i in range(max(0, first - row), min(len(batch), stop - row)):
                yield row + i, [column[i].as_py() for column in columns], ""
        row += len(batch)


def _columns(shown: str, names: list[str], config: SourceConfig, needs_captions: bool) -> tuple[str, ...]:
    """The column of URLs and the caption columns."""
    assert config.urls is not None
    listed = csv_text.few(names)
    wanted = column_name(config.urls.column)
    urls = [name for name in names if column_name(name) == wanted]
    if len(urls) != 1:
        raise ValueError(
            f"{shown} has columns {listed}; it needs one of URLs ({config.urls.column}): name yours in source.urls.column"
        )
    captions = [name for name in caption_columns(names, config.caption_columns) if name != urls[0]]
    if needs_captions and not captions:
        raise ValueError(f"{shown} has columns {listed}; it needs {column_hint(config.caption_columns)}")
    if len({column_name(name) for name in captions}) < len(captions):
        raise ValueError(f"{shown} has columns {listed}: a name is there twice")
    return (urls[0], *captions)


def _csv_cells(
    place: FileTree, name: str, config: SourceConfig, needs_captions: bool
) -> Iterator[tuple[list[str], str]]:
    """[URL, caption, ...] of each row, without captions if they may be cut, and why."""
    shown = place.shown(name)
    with _named_errors(shown), place.open(name) as file, _text(file, config.encoding) as text:
        delimiter = _delimiter(text, name, config)
        parsed = csv_text.rows(shown, text, delimiter, REMEDY)
        header = next(parsed, None)
        if header is None:
            raise ValueError(f"{shown} has no header")
        columns = [header.fields.index(name) for name in _columns(shown, header.fields, config, needs_captions)]

        def again() -> Iterator[csv_text.Row]:
            with place.open(name) as file, _text(file, config.encoding) as text:
                yield from csv_text.rows(shown, text, delimiter, REMEDY)

        checks = csv_text.Checks(shown, header, columns[0], columns[1:], delimiter, _is_url, again, _is_rest_of_url)
        for row in parsed:
            if problem := checks.check(row):
                yield [row.fields[columns[0]]], f"{place.locator(name)}, line {row.line}, {problem}"
            else:
                yield [row.fields[at] for at in columns], ""


def _delimiter(text: TextIO, name: str, config: SourceConfig) -> str:
    """The delimiter with which the first line has a column of URLs; else the one of the file's extension."""
    assert config.urls is not None
    wanted = column_name(config.urls.column)
    first = next(
        (line for _ in range(BLANK_LINES) if (line := text.readline(csv_text.MAX_ROW_BYTES)).strip("\r\n")), ""
    )
    text.seek(0)
    usual = "\t" if extension(base_name(name)) == "tsv" else ","
    return csv_text.delimiter_of(first, usual, lambda header: wanted in map(column_name, header))


def _is_url(field: str) -> bool:
    return field.startswith(("http://", "https://"))


def _is_rest_of_url(url: str, field: str) -> bool:
    """Whether a field may be behind a comma of the URL: `https://a.b/c` and `d.jpg`, or `/0/default.jpg`."""
    if re.search(r"\s", field) or not _is_url(url) or is_image(_path(url)):
        return False
    return field.startswith("/") or is_image(_path(field))


def _path(url: str) -> str:
    return re.split("[?#]", url, maxsplit=1)[0]


def _text(file: BinaryIO, encoding: str | None) -> TextIO:
    """Opens a table as text, by its byte order mark, else as UTF-8, else as `encoding`."""
    start = file.read(4)
    file.seek(0)
    if start.startswith(codecs.BOM_UTF8):
        encoding = "utf-8-sig"
    elif start.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        encoding = "utf-32"
    elif start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        encoding = "utf-16"
    elif encoding is None or _is_utf8(file):
        encoding = "utf-8"
    return io.TextIOWrapper(file, encoding, newline="")


def _is_utf8(file: BinaryIO) -> bool:
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        while data := file.read(DECODED_BYTES):
            if foreign(decoder.decode(data)):
                return False
        decoder.decode(b"", final=True)
        return True
    except UnicodeDecodeError:
        return False
    finally:
        file.seek(0)


@contextlib.contextmanager
def _named_errors(shown: str) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, UnicodeError, OSError) as error:
        raise ValueError(f"{shown} is not a readable table: {visible(' '.join(str(error).split()))[:300]}") from error
