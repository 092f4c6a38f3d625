"""Parquet files with image bytes: shards of row groups, read in batches of bounded size.

Sizes are checked in the page headers before Arrow allocates anything: the sizes in a footer may be false.
"""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Iterator, Sequence
from typing import BinaryIO, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from tasks.curation.sources import tables
from tasks.curation.sources.base import CHANGED, Account, Options, Record, Shard, check_size, count_of, visible
from tasks.curation.sources.file_trees import FileTree
from tasks.curation.sources.parquet_pages import PageError, RowGroup, pages, row_groups

BATCH_ROWS, BATCH_BYTES = 64, 32 * 2**20
MAX_FOOTER_BYTES = 16 * 2**20
MAX_PAGE_BYTES = 104 * 2**20
MAX_DICTIONARY_BYTES = 88 * 2**20  # Arrow copies a dictionary twice
MAX_RATIO, RATIO_FREE_BYTES = 100, 64 * 2**20  # image bytes read per byte of the row groups, beyond the first bytes
MAX_ROWS, MAX_ROWS_PER_BYTE = 1_000_000, 1  # maximum rows of a file: the first number, plus one per byte
MAX_VALUES = 4_000_000  # list values in a row group


class Range(NamedTuple):
    """Whole row groups: rows [first_row, first_row + num_rows) and bytes [begin, end) of a file."""

    first_row: int
    num_rows: int
    begin: int
    end: int


@contextlib.contextmanager
def opened(shown: str, file: BinaryIO) -> Iterator[pq.ParquetFile]:
    """Opens a Parquet file whose footer is within bounds. Errors inside the context name the file.

    Raises:
        ValueError: it is not a Parquet file, or exceeds the bounds.
    """
    try:
        size = file.seek(0, 2)
        check_size(shown, size)
        file.seek(max(0, size - 8))
        tail = file.read(8)
        if len(tail) < 8 or tail[4:] != b"PAR1":
            raise ValueError(f"{shown} is not a readable Parquet file: its end is missing")
        footer = struct.unpack("<I", tail[:4])[0]
        if footer > min(size - 8, MAX_FOOTER_BYTES):
            raise ValueError(
                f"{shown} is not a readable Parquet file: its footer has {footer:,} bytes, of at most "
                f"{min(size - 8, MAX_FOOTER_BYTES):,}"
            )
        limits = {"thrift_string_size_limit": MAX_FOOTER_BYTES, "thrift_container_size_limit": 1_000_000}
        with pq.ParquetFile(file, pre_buffer=False, buffer_size=2**20, **limits) as parquet:
            rows = parquet.metadata.num_rows
            if not 0 <= rows <= MAX_ROWS + MAX_ROWS_PER_BYTE * size:
                raise ValueError(f"{shown} claims {rows:,} rows in {size:,} bytes")
            yield parquet
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{shown} is not a readable Parquet file: {_one_line(error)}") from error


def scan(
    shown: str, file: BinaryIO, wanted: tuple[str, ...], rows_per_shard: int
) -> tuple[list[Range], str, list[str], str] | None:
    """The ranges of a file that become shards, its schema as text, columns of images that are not read, and why it has no
    captions (or ""); None if no column is of image bytes.

    Raises:
        ValueError: a column twice, no row with image bytes, or not a readable file.
    """
    with opened(shown, file) as parquet:
        columns = tables.columns_of(parquet.schema_arrow, wanted)
        if columns is None:
            return None
        tables.check_columns(shown, parquet.schema_arrow)
        groups = _row_groups(shown, file)
        ranges: list[Range] = []
        row = 0
        for i, group in enumerate(groups):
            rows = group.num_rows
            if not rows:  # valid, and its columns may have no page at all
                continue
            begin, end = _extent(group)
            if not 0 <= begin <= end <= file.seek(0, 2):
                raise ValueError(f"{shown} is not a readable Parquet file: row group {i} is outside of the file")
            last = ranges[-1] if ranges else None
            if last is not None and last.num_rows + rows <= rows_per_shard:
                ranges[-1] = last._replace(
                    num_rows=last.num_rows + rows,
                    begin=min(begin, last.begin),
                    end=max(end, last.end),
                )
            else:
                ranges.append(Range(row, rows, begin, end))
            row += rows
        why = _without_bytes(groups, columns.image)
        schema = "\n".join(f"{field.name}: {field.type}" for field in parquet.schema_arrow)
        further = tables.further_images(parquet.schema_arrow)
    if why is not None:
        raise ValueError(f"{shown}: none of {count_of(row, 'row')} has image bytes{why}")
    return ranges, schema, further, columns.no_captions


def _row_groups(shown: str, file: BinaryIO) -> list[RowGroup]:
    """The row groups of a file that `opened` has accepted."""
    end = file.seek(-8, 2)
    footer = struct.unpack("<I", file.read(4))[0]
    file.seek(end - footer)
    try:
        groups = row_groups(file.read(footer))
    except PageError as error:
        raise ValueError(f"{shown} is not a readable Parquet file: {error}") from error
    if any(group.num_rows < 0 for group in groups):
        raise ValueError(f"{shown} is not a readable Parquet file: a row group has a negative number of rows")
    return groups


def _extent(group: RowGroup) -> tuple[int, int]:
    """First and last byte offset of a row group."""
    return min((chunk.begin for chunk in group.chunks), default=0), max(
        (chunk.end for chunk in group.chunks), default=0
    )


def _without_bytes(groups: list[RowGroup], image: str) -> str | None:
    """Describes what rows have instead of image bytes, if the footer shows that none has any."""
    inside = [c for group in groups for c in group.chunks if c.path == image or c.path.startswith(f"{image}.")]
    chunks = [chunk for chunk in inside if not chunk.path.endswith(".path")]
    if not any(chunk.num_values for chunk in chunks) or any(chunk.nulls < chunk.num_values for chunk in chunks):
        return None
    return f"; they name files ({image}.path)" if len(chunks) < len(inside) else ""


def read(place: FileTree, name: str, shard: Shard, options: Options, account: Account) -> Iterator[Record]:
    """The records of a range of rows.

    Raises:
        ValueError: the file cannot be read, exceeds the bounds, or has changed since the scan.
    """
    shown, first_row, num_rows = place.shown(name), shard.first_row, shard.num_rows
    with place.open(name) as file, opened(shown, file) as parquet:
        columns = tables.columns_of(parquet.schema_arrow, options.caption_columns)
        assert columns is not None, shown
        all_groups = _row_groups(shown, file)
        groups, row = [], 0
        for i, group in enumerate(all_groups):
            if first_row <= row < first_row + num_rows and group.num_rows:
                groups.append(i)
            row += group.num_rows
        extents = [_extent(all_groups[i]) for i in groups]
        begin, end = min((b for b, _ in extents), default=0), max((e for _, e in extents), default=0)
        if place.digest(name, begin, end) != shard.digest:
            raise ValueError(f"{shown} {CHANGED}")
        stored = end - begin
        row, given = first_row, 0
        for batch in batches(shown, file, parquet, [columns.image, *columns.captions], groups):
            for record in tables.records(batch, columns, row, name, place.locator(name), options.encoding, account):
                given += len(record.data)
                if given > RATIO_FREE_BYTES + MAX_RATIO * stored:
                    raise ValueError(f"{shown} has more than {given // 2**20} MiB of images in {stored:,} bytes")
                yield record
            row += len(batch)
        if row != first_row + num_rows:
            raise ValueError(
                f"{shown} is not a readable Parquet file: it has {row} rows and claims {first_row + num_rows}"
            )


def batches(
    shown: str, file: BinaryIO, parquet: pq.ParquetFile, columns: list[str], groups: Sequence[int]
) -> Iterator[pa.RecordBatch]:
    """Batches of at most `BATCH_ROWS` rows, and of about `BATCH_BYTES` at most.

    Raises:
        ValueError: a page or a list exceeds the bounds.
    """
    all_groups = _row_groups(shown, file)
    for group in groups:
        if group >= len(all_groups):
            raise ValueError(f"{shown} is not a readable Parquet file: it has no row group {group}")
        if not all_groups[group].num_rows:
            continue
        size = _batch_rows(shown, file, all_groups[group], columns, group)
        yield from parquet.iter_batches(size, row_groups=[group], columns=columns, use_threads=False)


def _batch_rows(shown: str, file: BinaryIO, row_group: RowGroup, columns: list[str], group: int) -> int:
    """Number of rows of a group to read at a time. Their bytes are bounded by the average, and by pages whose largest
    value every row may repeat."""
    bytes_a_row = 1.0
    for column in row_group.chunks:
        if not any(column.path == name or column.path.startswith(f"{name}.") for name in columns):
            continue
        if column.num_values > MAX_VALUES + row_group.num_rows:
            raise ValueError(f"{shown}, row group {group}: {column.num_values:,} values in {row_group.num_rows:,} rows")
        try:
            sizes = pages(file, column.begin, column.end)
        except PageError as error:
            raise ValueError(f"{shown} is not a readable Parquet file: {error}") from error
        for what, size, limit, remedy in (
            ("page", sizes.largest, MAX_PAGE_BYTES, "smaller row groups (row_group_size=100)"),
            ("dictionary", sizes.repeated, MAX_DICTIONARY_BYTES, "use_dictionary=False, or smaller row groups"),
        ):
            if size > limit:
                raise ValueError(
                    f"{shown}, row group {group}: a {what} of {size // 2**20} MiB is over {limit // 2**20} MiB; write the "
                    f"table with {remedy}"
                )
        repeats = column.num_values / max(1, row_group.num_rows)
        bytes_a_row += max(column.uncompressed_bytes / max(1, row_group.num_rows), sizes.repeated * max(1, repeats))
    return max(1, min(BATCH_ROWS, int(BATCH_BYTES / bytes_a_row)))


def _one_line(error: Exception) -> str:
    return visible(" ".join(str(error).split())[:300])
