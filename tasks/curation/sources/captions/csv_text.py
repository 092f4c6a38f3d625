"""Reads CSV strictly: a row that does not parse, or that may contain another row, is an error with file and line.

A repaired row might give an image the wrong caption.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple, TextIO

from tasks.curation.sources.base import count_of, visible

MAX_ROW_BYTES = 4 * 2**20
MAX_LINES = 4_000_000  # of a table, including blank lines


class Row(NamedTuple):
    """line: its first. text: as it is in the file, with quotes and blanks."""

    line: int
    fields: list[str]
    text: str


def rows(shown: str, text: TextIO, delimiter: str, remedy: str) -> Iterator[Row]:
    """Each row that is not blank, the header first.

    Args:
        text: opened with newline="".
        remedy: advice for a table of too many lines.

    Raises:
        ValueError: broken quotes, another number of fields than the header, a row or a table over its limit; names the
            file and line.
    """
    csv.field_size_limit(MAX_ROW_BYTES)
    lines = _Lines(shown, text, remedy)
    reader = csv.reader(lines, delimiter=delimiter, strict=True, skipinitialspace=True)
    columns: list[str] = []
    start = 0
    try:
        for fields in reader:
            first_line, start = start + 1, reader.line_num
            as_written = lines.take_row()
            if not fields or not any(field.strip() for field in fields):
                continue
            if columns and len(fields) != len(columns):
                advice = f"put captions that contain {delimiter!r} between double quotes"
                if len(fields) < len(columns):
                    advice = "write each column, an empty one too"
                raise ValueError(
                    f"{shown}, line {first_line}, has {count_of(len(fields), 'field')} where the header has "
                    f"{count_of(len(columns), 'column')} ({few(columns)}); {advice}"
                )
            columns = columns or fields
            yield Row(first_line, fields, as_written)
    except csv.Error as error:
        raise ValueError(
            f"{shown}, line {start + 1}: its quotes or fields are broken ({error}); put fields that contain {delimiter!r} "
            'or quotes between double quotes, and write "" for a quote inside'
        ) from error


def header(line: str, delimiter: str) -> list[str]:
    """The fields of a first line; [] if it has none with this delimiter."""
    try:
        return next(csv.reader([line], delimiter=delimiter, skipinitialspace=True), [])
    except csv.Error:
        return []


def delimiter_of(first: str, usual: str, fits: Callable[[list[str]], bool]) -> str:
    """The delimiter with which a first line is a header that `fits`; the usual one if there is none."""
    return next((one for one in (usual, ",", ";", "\t") if fits(header(first, one))), usual)


class Checks:
    """Detects rows that parse but were probably not meant so.

    Args:
        header: the first row.
        names: the column of names.
        captions: the columns of captions.
        begins_row: whether a field looks like the first or last field of another row, such as the name of an image.
    """

    def __init__(
        self,
        shown: str,
        header: Row,
        names: int,
        captions: Iterable[int],
        delimiter: str,
        begins_row: Callable[[str], bool],
    ) -> None:
        self._shown, self._delimiter, self._begins_row = shown, delimiter, begins_row
        self._columns, self._names, self._captions = header.fields, names, set(captions)
        self._spaced = {at for at, piece in enumerate(_pieces(header.text, delimiter)) if piece[:1].isspace()}
        # Text there may be the rest of a caption. An index before the names, as pandas writes it, is not.
        first = min(self._captions, default=len(header.fields))
        self._nameless = [at for at, name in enumerate(header.fields) if at > first and not name.strip()]

    def check(self, row: Row) -> None:
        """
        Raises:
            ValueError: text in an unnamed column after the captions; a caption that continues in the next column; a
                quoted field that contains the row of another image, so that its quote was not meant as one.
        """
        line, fields, _ = row
        for at in self._nameless:
            if fields[at].strip():
                raise ValueError(
                    f"{self._shown}, line {line}, has text in column {at + 1}, which has no name and follows the captions; "
                    f"put captions that contain {self._delimiter!r} between double quotes"
                )
        self._check_blanks(row)
        for field in fields:
            if "\n" not in field and "\r" not in field:
                continue
            pieces = re.split(r"[\r\n]+", field)
            for at, inner in enumerate(pieces):
                parts = re.split(r"[,;\t]", inner)
                ends = parts[:1] if at == len(pieces) - 1 else parts[-1:] if at == 0 else [parts[0], parts[-1]]
                swallowed = next((e for e in ends if len(parts) > 1 and self._begins_row(e.strip().strip('"'))), None)
                if swallowed is not None:
                    raise ValueError(
                        f"{self._shown}, line {line}: a quote is not closed, so that the row of "
                        f"{visible(fields[self._names])!r} runs over that of {visible(swallowed.strip())!r}. If the text is meant so, write the table as Parquet or JSON Lines"
                    )

    def _check_blanks(self, row: Row) -> None:
        """In a row without one of its columns, an unquoted comma of a caption has the place of a delimiter. A blank follows
        it, as in prose; where the header has a blank too, it is a habit of the writer."""
        if self._delimiter == "\t" or not re.search(rf"{self._delimiter}\s", row.text):
            return
        pieces = _pieces(row.text, self._delimiter)
        continues = False  # whether the text before may be of a caption
        for at, piece in enumerate(pieces):
            is_caption = at in self._captions
            if piece.lstrip(" ").startswith('"') or at == self._names:
                continues = False
                continue
            if is_caption and at and at - 1 != self._names and not pieces[at - 1].lstrip(" ").startswith('"'):
                continues = continues or not _is_number(pieces[at - 1])
            if continues and piece.strip() and piece[:1].isspace() and at not in self._spaced:
                raise ValueError(
                    f"{self._shown}, line {row.line}, has a blank before {visible(piece.strip()[:60])!r} in the column "
                    f"{visible(self._columns[at])}, as if {self._delimiter!r} were part of a caption; put captions that contain "
                    f"{self._delimiter!r} between double quotes, or write the row without the blank"
                )
            continues = continues or is_caption


def _pieces(row: str, delimiter: str) -> list[str]:
    """The fields of a row as they are written. The row has been parsed without error."""
    field = re.compile(rf' *"[^"]*(?:""[^"]*)*"|[^{delimiter}\r\n]*')
    pieces, at = [], 0
    while (match := field.match(row, at)) is not None:
        pieces.append(match.group())
        at = match.end() + 1
        if row[match.end() : at] != delimiter:
            break
    return pieces


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return not text.strip()
    return True


def few(columns: Sequence[str]) -> str:
    names = [visible(column) for column in columns]
    return ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "")


class _Lines:
    """The lines of a CSV file, with \\n, \\r\\n or \\r at their ends."""

    def __init__(self, shown: str, text: TextIO, remedy: str) -> None:
        self._shown, self._text, self._remedy = shown, text, remedy
        self._row: list[str] = []
        self._row_bytes = self._number = 0

    def take_row(self) -> str:
        """The lines since the last call."""
        row = "".join(self._row)
        self._row, self._row_bytes = [], 0
        return row

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        line = self._text.readline(MAX_ROW_BYTES)
        self._number += 1
        if line and self._number > MAX_LINES:
            raise ValueError(f"{self._shown} has more than {MAX_LINES:,} lines; {self._remedy}")
        self._row_bytes += len(line)
        self._row.append(line)
        if self._row_bytes >= MAX_ROW_BYTES:
            raise ValueError(
                f"{self._shown}, line {self._number}: a row is longer than {MAX_ROW_BYTES // 2**20} MiB; is a quote not closed?"
            )
        if not line:
            raise StopIteration
        return line
