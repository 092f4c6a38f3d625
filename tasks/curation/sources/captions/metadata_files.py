"""Reads tables of captions: metadata.csv, .tsv, .jsonl, .json and .parquet, in any case of letters.

Each row names an image (file_name, relative to the folder of the table) and has its captions; listed.py matches them.
A row that does not parse is an error with file and line: a repaired row might be wrong.
"""

from __future__ import annotations

import codecs
import io
import re
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO, NamedTuple

from tasks.curation.sources.base import extension, is_image, visible
from tasks.curation.sources.captions import csv_text
from tasks.curation.sources.captions.caption_text import (
    CaptionError,
    NotTextError,
    caption_columns,
    captions_of_cells,
    column_hint,
    column_name,
    decode,
    parse_json,
    row_captions,
)
from tasks.curation.sources.captions.csv_text import MAX_ROW_BYTES

FORMATS = ("csv", "tsv", "jsonl", "json", "parquet")
NAME_COLUMNS = ("file_name", "filename", "file", "image", "image_file", "image_path", "image_file_name", "path")
MAX_BYTES = 64 * 2**20
DECODED_BYTES = 2**20  # at a time, to check whether a table is UTF-8
_TOKENS = re.compile(rb'"(?:[^"\\]|\\.)*"|[\[\]{},]', re.DOTALL)


def is_metadata(name: str, beside: Iterable[str]) -> bool:
    """Whether a file of this name (without folders) is a metadata table; `beside`: the other names in its folder."""
    kind = extension(name)
    if kind not in FORMATS or name.casefold() != f"metadata.{kind}":
        return False
    return kind != "json" or not any(map(has_metadata_as_sidecar, beside))


def has_metadata_as_sidecar(name: str) -> bool:
    """Whether metadata.json describes this picture (metadata.png), as a.json describes a.png."""
    return is_image(name) and name.casefold() == f"metadata.{extension(name)}"


class Row(NamedTuple):
    """line: the line of a text file, or the row of a table, for messages. problem: why its captions are unreadable, or
    "". is_stem: file_name is an image's name without its extension, as in the metadata of kohya's scripts."""

    line: int
    file_name: str
    captions: list[str]
    problem: str = ""
    is_stem: bool = False


class Table:
    """A table, as far as it is read. shown, locator: see `Listed.add`."""

    def __init__(self, shown: str, locator: str, number: int) -> None:
        self.shown, self.locator, self.number = shown, locator, number
        self.rows = self.used = 0
        self.no_column = ""  # why the table has no captions at all
        self.is_mapping = self.names_images = False  # {name: captions}, which looks like any JSON object
        self.has_stems = False


# ---------------------------------------------------------------- formats


def table_rows(
    format: str, file: BinaryIO, encoding: str | None, wanted: tuple[str, ...], table: Table
) -> Iterator[Row]:
    """The rows of a table of one of `FORMATS`.

    Raises:
        ValueError: naming the file and the line.
    """
    shown = table.shown
    if format == "parquet":
        yield from _parquet_rows(shown, file, encoding, wanted, table)
        return
    data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise ValueError(
            f"{shown} is larger than {MAX_BYTES // 2**20} MiB; divide it by folders, or write metadata.parquet"
        )
    text = _utf8(shown, data, encoding)
    del data
    if format in ("csv", "tsv"):
        yield from _csv_rows(shown, text, "\t" if format == "tsv" else ",", wanted, table)
    else:
        yield from _object_rows(shown, _objects(shown, text, format, table), wanted, table)


def _utf8(shown: str, data: bytes, encoding: str | None) -> bytes:
    """The text as UTF-8 bytes, which take as little as a tenth of the memory of a str."""
    try:
        marked = data.startswith((b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff", b"\0\0\xfe\xff"))
        if not marked and b"\0" not in data and b"\x1b" not in data:
            decoder = codecs.getincrementaldecoder("utf-8")()
            for begin in range(0, len(data), DECODED_BYTES):
                decoder.decode(data[begin : begin + DECODED_BYTES])
            decoder.decode(b"", final=True)
            return data
        return decode(data, encoding).encode("utf-8")
    except UnicodeDecodeError:
        try:
            return decode(data, encoding).encode("utf-8")
        except CaptionError as error:
            raise ValueError(f"{shown} {error}") from error
    except CaptionError as error:
        raise ValueError(f"{shown} {error}") from error


def _csv_rows(shown: str, text: bytes, delimiter: str, wanted: tuple[str, ...], table: Table) -> Iterator[Row]:
    start = text.lstrip(b"\r\n")[:MAX_ROW_BYTES]
    first = start.split(b"\n", 1)[0].split(b"\r", 1)[0].decode("utf-8", "ignore")  # it may be cut inside a character
    delimiter = csv_text.delimiter_of(first, delimiter, lambda header: bool(_name_column(header)))

    def parse() -> Iterator[csv_text.Row]:
        file = io.TextIOWrapper(io.BytesIO(text), "utf-8", newline="")
        return csv_text.rows(shown, file, delimiter, "divide it by folders")

    parsed = parse()
    header = next(parsed, None)
    if header is None:
        raise ValueError(f"{shown} is empty; it needs file_name and {column_hint(wanted)}")
    columns = header.fields
    name_at = columns.index(_needed_name(shown, columns))
    caption_at = [columns.index(name) for name in _captions_of_columns(shown, columns, wanted, table)]
    checks = csv_text.Checks(shown, header, name_at, caption_at, delimiter, is_image, parse)
    for row in parsed:
        problem = checks.check(row)
        line, fields, _ = row
        texts = dict.fromkeys(filter(None, (fields[at].strip() for at in caption_at)))
        yield Row(line, fields[name_at], [] if problem else list(texts), problem)


def _objects(shown: str, text: bytes, format: str, table: Table) -> Iterator[tuple[int, Any]]:
    """(line, value) of JSON lines; of a .json file, (position, element) of its list, or {name: captions} as objects."""
    start = text.lstrip()[:1]
    if format == "json" and start in (b"[", b"{") and not _is_lines(text):
        table.is_mapping = start == b"{"
        yield from _elements(shown, text, table.is_mapping)
        return
    for number, line in enumerate(io.BytesIO(text), start=1):
        if not line.strip():
            continue
        if len(line) > MAX_ROW_BYTES:
            raise ValueError(f"{shown}, line {number}, is longer than {MAX_ROW_BYTES // 2**20} MiB")
        try:
            yield number, parse_json(line)
        except ValueError as error:
            raise ValueError(f"{shown}, line {number}, is not JSON: {visible(str(error))}") from error


def _is_lines(text: bytes) -> bool:
    """Whether the first line is a complete row."""
    line = text.lstrip().split(b"\n", 1)[0]
    try:
        value = parse_json(line) if len(line) <= MAX_ROW_BYTES else None
    except ValueError:
        return False
    return isinstance(value, dict) and _name_column(list(value)) is not None


def _elements(shown: str, text: bytes, is_object: bool) -> Iterator[tuple[int, Any]]:
    """The elements of one large list or object, parsed one by one."""
    opening = text.index(b"{" if is_object else b"[")
    depth, begin, count, closed = 0, opening + 1, 0, -1
    for token in _TOKENS.finditer(text, opening):
        if token.start() - begin > MAX_ROW_BYTES:
            raise ValueError(f"{shown}: element {count + 1} is longer than {MAX_ROW_BYTES // 2**20} MiB")
        mark = token.group()[:1]
        if mark in b"[{":
            depth += 1
        elif mark in b"]}":
            depth -= 1
        if (mark == b"," and depth == 1) or depth == 0:
            piece = text[begin : token.start()]
            begin = token.end()
            if piece.strip() or depth:
                count += 1
                try:
                    value = parse_json(b"{%s}" % piece if is_object else piece)
                except ValueError as error:
                    raise ValueError(f"{shown}: element {count} is not JSON: {visible(str(error))}") from error
                yield count, _named(value) if is_object else value
            if depth == 0:
                closed = token.end()
                break
    if closed < 0 or text[closed:].strip():
        raise ValueError(f"{shown} is not JSON: {'it ends early' if closed < 0 else 'something follows its end'}")


def _named(pair: dict[str, Any]) -> Any:
    """{"a.png": "caption" or {...}} as a row."""
    ((name, value),) = pair.items() if len(pair) == 1 else [("", None)]
    if isinstance(value, dict):
        return {"file_name": name, **{k: v for k, v in value.items() if column_name(k) != "file_name"}}
    return {"file_name": name, "\0value": value}


def _object_rows(
    shown: str, objects: Iterable[tuple[int, Any]], wanted: tuple[str, ...], table: Table
) -> Iterator[Row]:
    any_column, keys = False, []
    for line, value in objects:
        name = _name_column(list(value)) if isinstance(value, dict) else None
        file_name = None if name is None else _only(value[name])
        if name is not None and not isinstance(file_name, str):
            kind = type(value[name]).__name__
            raise ValueError(
                f"{shown}, line {line}, has {visible(name)} of the type {kind}; it needs file_name as text"
            )
        if name is None:
            keys = ", ".join(visible(key) for key in value) if isinstance(value, dict) else type(value).__name__
            raise ValueError(
                f"{shown}, line {line}, has {keys or 'nothing'}; it needs file_name and {column_hint(wanted)}"
            )
        keys = keys or list(value)
        columns = [c for c in caption_columns(value, wanted) if c != name] + [c for c in ("\0value",) if c in value]
        any_column = any_column or bool(columns)
        # {"a": {"caption": "a barn"}}; {"a": "a barn"} looks like the properties of something else
        is_stem, problem = table.is_mapping and "\0value" not in value and not is_image(file_name), ""
        try:
            captions = row_captions({c: value[c] for c in columns if c != "\0value"}, wanted)
            captions += row_captions({"caption": value.get("\0value")}, ())
        except CaptionError as error:
            is_of_image = not table.is_mapping or is_image(file_name)
            if is_of_image or not isinstance(error, NotTextError):
                raise ValueError(f"{shown}, line {line}, {error}") from error
            captions, problem = [], str(error)  # of an image, or a .json file that is not a metadata table
        yield Row(line, file_name, captions, problem, is_stem)
    if keys and not any_column:
        table.no_column = f"{table.locator} has {csv_text.few(keys)}; it needs {column_hint(wanted)}"


def _parquet_rows(
    shown: str, file: BinaryIO, encoding: str | None, wanted: tuple[str, ...], table: Table
) -> Iterator[Row]:
    from tasks.curation.sources import parquet, tables

    with parquet.opened(shown, file) as opened:
        columns = opened.schema_arrow.names
        name = _needed_name(shown, columns)
        captions = [c for c in _captions_of_columns(shown, columns, wanted, table) if c != name]
        first = 0
        for batch in parquet.batches(shown, file, opened, [name, *captions], range(opened.num_row_groups)):
            names, *texts = (tables.as_bytes(batch.column(column)).to_pylist() for column in (name, *captions))
            for row, (file_name, *cells) in enumerate(zip(names, *texts, strict=True), start=first):
                yield _parquet_row(f"{shown}, row {row},", row, name, file_name, cells, encoding)
            first += len(batch)


def _parquet_row(where: str, row: int, column: str, name: Any, cells: list[Any], encoding: str | None) -> Row:
    from tasks.curation.sources import tables

    name = _only(name)
    if not isinstance(name, bytes):
        raise ValueError(f"{where} has no file name in {visible(column)}")
    try:
        file_name = decode(name, encoding)
    except CaptionError as error:
        raise ValueError(f"{where} has a name in {visible(column)} that {error}") from error
    try:
        return Row(row, file_name, captions_of_cells(tables.decoded(cell, encoding) for cell in cells))
    except NotTextError as error:
        raise ValueError(f"{where} {error}") from error
    except CaptionError as error:
        return Row(row, file_name, [], str(error))


def _only(value: Any) -> Any:
    """The value of a list of one, as data sets of several images a row write a single name."""
    return value[0] if isinstance(value, list) and len(value) == 1 else value


def _name_column(columns: list[str]) -> str | None:
    by_name = {column_name(column): column for column in reversed(columns)}
    return next((by_name[name] for name in NAME_COLUMNS if name in by_name), None)


def _needed_name(shown: str, columns: list[str]) -> str:
    name = _name_column(columns)
    if name is None:
        raise ValueError(f"{shown} has columns {csv_text.few(columns)}; it needs file_name")
    if len({column_name(column) for column in columns if column.strip()}) < len([c for c in columns if c.strip()]):
        raise ValueError(f"{shown} has columns {csv_text.few(columns)}: a name is there twice")
    return name


def _captions_of_columns(shown: str, columns: list[str], wanted: tuple[str, ...], table: Table) -> list[str]:
    names = caption_columns(columns, wanted)
    if not names:
        table.no_column = f"{table.locator} has columns {csv_text.few(columns)}; it needs {column_hint(wanted)}"
    return names
