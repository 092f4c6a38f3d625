"""Captions in tables next to the images: metadata.csv, .tsv, .jsonl, .json and .parquet, in any case of letters.

Each row names an image (file_name, relative to the folder of the table) and has its captions. A table is streamed into
`Listed`, which is queried one image at a time. A row that does not parse is an error with file and line: a repaired row
might be wrong.
"""

from __future__ import annotations

import codecs
import io
import json
import posixpath
import re
import sqlite3
import tempfile
import unicodedata
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from tasks.curation.sources.base import Account, base_name, count_of, extension, from_bytes, is_image, to_bytes, visible
from tasks.curation.sources.captions import csv_text
from tasks.curation.sources.captions.caption_text import (
    CaptionError,
    NotTextError,
    caption_columns,
    column_hint,
    column_name,
    decode,
    parse_json,
    row_captions,
)
from tasks.curation.sources.captions.csv_text import MAX_ROW_BYTES
from tasks.curation.sources.captions.pairing import fold

FORMATS = ("csv", "tsv", "jsonl", "json", "parquet")
NAME_COLUMNS = ("file_name", "filename", "file", "image", "image_file", "image_path", "path")
MAX_BYTES = 64 * 2**20
MAX_ROWS = 500_000  # of a CSV or JSON table, at 70 us of processor time each (benchmarks/curation/hostile.py)
DECODED_BYTES = 2**20  # at a time, to check whether a table is UTF-8
MAX_ROWS_PER_IMAGE = 1000
UNMATCHED = "metadata row that names no image"
_TOKENS = re.compile(rb'"(?:[^"\\]|\\.)*"|[\[\]{},]', re.DOTALL)


def is_metadata(name: str, beside: Iterable[str]) -> bool:
    """Whether a file of this name (without folders) is a metadata table; `beside`: the other names in its folder."""
    if extension(name) not in FORMATS or name.casefold() != f"metadata.{extension(name)}":
        return False
    # metadata.json may also describe a picture metadata.png
    return not any(is_image(other) and other.casefold() == f"metadata.{extension(other)}" for other in beside)


class Row(NamedTuple):
    """line: the line of a text file, or the row of a table, for messages."""

    line: int
    file_name: str
    captions: list[str]


class Listed:
    """The rows of all tables of a source, on disk, so that memory does not bound their number.

    Used as a context manager. `match` marks rows as used; `finish` reports the others.
    """

    def __init__(self, encoding: str | None, wanted: tuple[str, ...]) -> None:
        self._encoding, self._wanted = encoding, wanted
        self._files: list[_File] = []

    def __enter__(self) -> Listed:
        self._folder = tempfile.TemporaryDirectory()
        self._db = sqlite3.connect(Path(self._folder.name) / "rows", isolation_level=None)
        self._db.execute("PRAGMA journal_mode=OFF")
        self._db.execute("PRAGMA synchronous=OFF")
        self._db.execute("PRAGMA cache_size=-32768")
        self._db.execute("BEGIN")
        self._db.execute(
            "CREATE TABLE rows (fold BLOB, name BLOB, file INT, line INT, captions TEXT, owner BLOB, shared INT)"
        )
        self._db.execute("CREATE INDEX folds ON rows (fold)")
        return self

    def __exit__(self, *_: object) -> None:
        self._db.close()
        self._folder.cleanup()

    def __bool__(self) -> bool:
        return bool(self._files)

    def add(self, shown: str, folder: str, folders: Iterable[str], format: str, file: BinaryIO, root_name: str) -> bool:
        """Reads one table. Returns False for a .json file that is not a metadata table, and drops its rows.

        Args:
            shown: its name for messages.
            folder: its folder, relative to the root of the source or archive.
            folders: names of the folders in that folder.
            format: one of `FORMATS`.
            root_name: name of the source's root, for `folder` "".

        Raises:
            ValueError: naming the file and the line.
        """
        table = _File(shown, len(self._files))
        self._files.append(table)
        inside = {fold(name) for name in folders}
        own_name = fold(base_name(folder) or root_name)
        try:
            for row in _rows(shown, format, file, self._encoding, self._wanted, table):
                path = _target(row.file_name, folder, inside, own_name)
                values = (to_bytes(fold(path)), to_bytes(path), table.number, row.line)
                self._db.execute(
                    "INSERT INTO rows VALUES (?, ?, ?, ?, ?, NULL, 0)", (*values, json.dumps(row.captions))
                )
                table.rows += 1
                if table.rows > MAX_ROWS and format != "parquet":
                    raise ValueError(
                        f"{shown} has more than {MAX_ROWS:,} rows; divide it by folders, or write metadata.parquet"
                    )
                table.names_images = table.names_images or is_image(path)
        except UnicodeEncodeError as error:
            raise ValueError(f"{shown} has text that is not Unicode: {error}") from error
        if table.is_mapping and not table.names_images:
            self._db.execute("DELETE FROM rows WHERE file = ?", (table.number,))
            table.rows = 0
        return table.rows > 0 or not table.is_mapping

    def claim(self, paths: list[str], owner: str) -> None:
        """Marks the rows that match any of the paths (one image's names) as the owner's; a row with two owners is
        shared."""
        for number, *_ in self._candidates(paths):
            name = to_bytes(owner)
            self._db.execute(
                "UPDATE rows SET shared = owner IS NOT NULL AND (shared OR owner IS NOT ?), owner = coalesce(owner, ?) "
                "WHERE rowid = ?",
                (name, name, number),
            )

    def match(self, paths: list[str], rivals: list[str]) -> tuple[list[str], str, str]:
        """The captions of one image.

        Args:
            paths: names by which a row may refer to the image.
            rivals: paths of other images that differ from it in Unicode form or case only.

        Returns:
            (captions, why they are ambiguous, why its table has no captions); the last two are usually "".
        """
        if not self._files:
            return [], "", ""
        captions: list[str] = []
        no_column = ambiguous = ""
        for number, name, file, line, text, shared in self._candidates(paths):
            own, others = _distance(name, paths), _distance(name, rivals)
            if others < own:
                continue
            table = self._files[file]
            table.used += self._db.execute(
                "UPDATE rows SET owner = x'' WHERE rowid = ? AND owner IS NOT x''", (number,)
            ).rowcount
            if others == own:
                ambiguous = f"{table.shown}, line {line}, may name several images"
            elif shared:
                ambiguous = f"{table.shown}, line {line}, may name an image in each of several tars"
            captions += json.loads(text)
            no_column = no_column or table.no_column
        return list(dict.fromkeys(captions)), ambiguous, "" if captions else no_column

    def _candidates(self, paths: list[str]) -> list[tuple[int, str, int, int, str, int]]:
        # Windows archives that are unpacked elsewhere leave \\ in file names, where rows have /.
        folds = list(dict.fromkeys(to_bytes(fold(path.replace("\\", "/"))) for path in paths))
        marks = ", ".join("?" * len(folds))
        query = f"SELECT rowid, name, file, line, captions, shared FROM rows WHERE fold IN ({marks}) ORDER BY rowid LIMIT {MAX_ROWS_PER_IMAGE + 1}"  # noqa: S608
        rows = [(row[0], from_bytes(row[1]), *row[2:]) for row in self._db.execute(query, folds)]
        if len(rows) > MAX_ROWS_PER_IMAGE:
            shown, line = self._files[rows[-1][2]].shown, rows[-1][3]
            raise ValueError(f"{shown}, line {line}: more than {MAX_ROWS_PER_IMAGE:,} rows name {visible(paths[0])}")
        return rows

    def finish(self, account: Account) -> None:
        """Counts the rows that named no image.

        Raises:
            ValueError: no row of a table named an image.
        """
        for table in self._files:
            unused = table.rows - table.used
            if not unused:
                continue
            name, line = self._db.execute(
                "SELECT name, line FROM rows WHERE file = ? AND owner IS NOT x'' ORDER BY rowid LIMIT 1",
                (table.number,),
            ).fetchone()
            example = f"{visible(from_bytes(name))} (line {line})"
            if not table.used:
                raise ValueError(
                    f"{count_of(unused, 'row')} of {table.shown} name no image, such as {example}; file_name is a path "
                    f"from the folder of {base_name(table.shown)}"
                )
            account.skip(UNMATCHED, f"{table.shown}: {example}", unused)


class _File:
    def __init__(self, shown: str, number: int) -> None:
        self.shown, self.number = shown, number
        self.rows = self.used = 0
        self.no_column = ""  # why the table has no captions at all
        self.is_mapping = self.names_images = False  # {name: captions}, which looks like any JSON object


def _distance(name: str, paths: list[str]) -> int:
    """0: equal; 1: equal in Unicode's composed form; 2: equal ignoring case; 3: no path matches."""
    if not paths:
        return 3
    if name in paths:
        return 0
    composed = unicodedata.normalize("NFC", name)
    return 1 if any(unicodedata.normalize("NFC", path) == composed for path in paths) else 2


def _target(file_name: str, folder: str, inside: set[str], own_name: str) -> str:
    """The path from the root that a row means: \\ read as /, and without the name of the table's own folder."""
    name = file_name.strip()
    if "\\" in name:
        name = name.replace("\\", "/")
    parts = [part for part in name.split("/") if part not in ("", ".")]
    folds = [fold(part) for part in parts]
    if len(parts) > 1 and (folds[0] not in inside) and own_name in folds[:-1]:
        parts = parts[len(folds) - 1 - folds[:-1][::-1].index(own_name) :]
    return posixpath.normpath(posixpath.join(folder, *parts)) if parts else folder


# ---------------------------------------------------------------- formats


def _rows(
    shown: str, format: str, file: BinaryIO, encoding: str | None, wanted: tuple[str, ...], table: _File
) -> Iterator[Row]:
    if format == "parquet":
        yield from _parquet_rows(shown, file, wanted, table)
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


def _csv_rows(shown: str, text: bytes, delimiter: str, wanted: tuple[str, ...], table: _File) -> Iterator[Row]:
    first = text.lstrip(b"\r\n").split(b"\n", 1)[0].split(b"\r", 1)[0].decode("utf-8")
    delimiter = csv_text.delimiter_of(first, delimiter, lambda header: bool(_name_column(header)))
    file = io.TextIOWrapper(io.BytesIO(text), "utf-8", newline="")
    parsed = csv_text.rows(shown, file, delimiter, "divide it by folders")
    _, columns = next(parsed, (0, []))
    if not columns:
        raise ValueError(f"{shown} is empty; it needs file_name and {column_hint(wanted)}")
    name_at = columns.index(_needed_name(shown, columns))
    caption_at = [columns.index(name) for name in _captions_of_columns(shown, columns, wanted, table)]
    checks = csv_text.Checks(shown, columns, caption_at, delimiter, is_image)
    for line, fields in parsed:
        checks.check(line, fields, fields[name_at])
        texts = (fields[at].strip() for at in caption_at)
        yield Row(line, fields[name_at], list(dict.fromkeys(filter(None, texts))))


def _objects(shown: str, text: bytes, format: str, table: _File) -> Iterator[tuple[int, Any]]:
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
    shown: str, objects: Iterable[tuple[int, Any]], wanted: tuple[str, ...], table: _File
) -> Iterator[Row]:
    any_column, keys = False, []
    for line, value in objects:
        name = _name_column(list(value)) if isinstance(value, dict) else None
        if name is None or not isinstance(value[name], str):
            keys = ", ".join(visible(key) for key in value) if isinstance(value, dict) else type(value).__name__
            raise ValueError(
                f"{shown}, line {line}, has {keys or 'nothing'}; it needs file_name and {column_hint(wanted)}"
            )
        keys = keys or list(value)
        columns = [c for c in caption_columns(value, wanted) if c != name] + [c for c in ("\0value",) if c in value]
        any_column = any_column or bool(columns)
        try:
            captions = row_captions({c: value[c] for c in columns if c != "\0value"}, wanted)
            captions += row_captions({"caption": value.get("\0value")}, ())
        except CaptionError as error:
            is_of_image = not table.is_mapping or is_image(value[name])
            if is_of_image or not isinstance(error, NotTextError):
                raise ValueError(f"{shown}, line {line}, {error}") from error
            captions = []  # a .json file that is not a metadata table
        yield Row(line, value[name], captions)
    if keys and not any_column:
        table.no_column = f"{shown} has {csv_text.few(keys)}; it needs {column_hint(wanted)}"


def _parquet_rows(shown: str, file: BinaryIO, wanted: tuple[str, ...], table: _File) -> Iterator[Row]:
    from tasks.curation.sources import parquet

    with parquet.opened(shown, file) as opened:
        columns = opened.schema_arrow.names
        name = _needed_name(shown, columns)
        captions = [c for c in _captions_of_columns(shown, columns, wanted, table) if c != name]
        for row, values in enumerate(
            parquet.rows(shown, file, opened, [name, *captions], range(opened.num_row_groups))
        ):
            try:
                texts = row_captions({c: values[c] for c in captions}, wanted)
            except CaptionError as error:
                raise ValueError(f"{shown}, row {row}, {error}") from error
            if not isinstance(values[name], str):
                raise ValueError(f"{shown}, row {row}, has no file name in {visible(name)}")
            yield Row(row, values[name], texts)


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


def _captions_of_columns(shown: str, columns: list[str], wanted: tuple[str, ...], table: _File) -> list[str]:
    names = caption_columns(columns, wanted)
    if not names:
        table.no_column = f"{shown} has columns {csv_text.few(columns)}; it needs {column_hint(wanted)}"
    return names
