"""Reads CSV strictly: a row that does not parse, or that may contain another row, is an error with file and line.

A repaired row might give an image the wrong caption. A row whose caption may be cut is a problem of its record.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple, TextIO

from tasks.curation.sources.base import count_of, shortened, visible

MAX_ROW_BYTES = 4 * 2**20
MAX_LINES = 4_000_000  # of a table, including blank lines
MAX_COLUMNS = 10_000
HABIT_ROWS = 10


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
        ValueError: broken quotes, another number of fields than the header, a row, a table or its columns over their
            limit; names the file and line.
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
            if len(fields) > MAX_COLUMNS:
                raise ValueError(
                    f"{shown} has {len(fields):,} columns; at most {MAX_COLUMNS:,} are read. Keep those of names and captions"
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
        return next(csv.reader([line[:MAX_ROW_BYTES]], delimiter=delimiter, skipinitialspace=True), [])
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
        again: the rows of the table from its beginning, the header first; called at most once.
        continues: whether a field looks like the rest of a name that had a delimiter in it.
    """

    def __init__(
        self,
        shown: str,
        header: Row,
        names: int,
        captions: Iterable[int],
        delimiter: str,
        begins_row: Callable[[str], bool],
        again: Callable[[], Iterator[Row]],
        continues: Callable[[str, str], bool] = lambda name, field: False,
    ) -> None:
        self._shown, self._delimiter, self._begins_row = shown, delimiter, begins_row
        self._columns, self._names, self._captions = header.fields, names, set(captions)
        self._again, self._continues = again, continues
        spaced = {at for at, piece in enumerate(_pieces(header.text, delimiter)) if piece[:1].isspace()}
        behind = {at + 1 for at in self._captions if at + 1 < len(self._columns)} - {names} - spaced
        self._behind = sorted(behind) if delimiter != "\t" else []
        self._habits: set[int] | None = None
        # Text there may be the rest of a caption. An index before the names, as pandas writes it, is not.
        first = min(self._captions, default=len(header.fields))
        self._nameless = [at for at, name in enumerate(header.fields) if at > first and not name.strip()]

    def check(self, row: Row) -> str:
        """Why the captions of a row may be cut, or "": see `_cut_caption` and `_cut_name`.

        Raises:
            ValueError: text in an unnamed column after the captions; a quoted field that contains the row of another
                image, so that its quote was not meant as one.
        """
        line, fields, _ = row
        for at in self._nameless:
            if fields[at].strip():
                raise ValueError(
                    f"{self._shown}, line {line}, has text in column {at + 1}, which has no name and follows the captions; "
                    f"put captions that contain {self._delimiter!r} between double quotes"
                )
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
                        f"{shortened(visible(fields[self._names]))!r} runs over that of {shortened(visible(swallowed.strip()))!r}. "
                        "If the text is meant so, write the table as Parquet or JSON Lines"
                    )
        return self._cut_name(row) or self._cut_caption(row)

    def _cut_caption(self, row: Row) -> str:
        """In a row without one of its columns, an unquoted comma of a caption has the place of a delimiter. A blank follows
        it, as in prose. A blank may also be a habit of the writer: it is where the header has one, too; see `_habits`."""
        if not self._behind or not re.search(rf"{self._delimiter}\s", row.text):
            return ""
        pieces = _pieces(row.text, self._delimiter)
        for at in self._behind:
            caption, piece = pieces[at - 1], pieces[at]
            if _is_quoted(caption) or not caption.strip() or not _has_blank(piece):
                continue
            if self._habits is None:
                self._habits = _habits(self._again(), self._behind, self._delimiter)
            if at not in self._habits:
                return (
                    f"has a blank before {visible(piece.strip()[:60])!r} in the column {visible(self._columns[at])!r} (column "
                    f"{at + 1}), as if {self._delimiter!r} were part of the caption before; put captions that contain "
                    f"{self._delimiter!r} between double quotes, or write the table as JSON Lines or Parquet"
                )
        return ""

    def _cut_name(self, row: Row) -> str:
        """In a row without one of its columns, an unquoted comma of a name may leave its rest as the caption."""
        at = self._names + 1
        if at not in self._captions or not self._continues(row.fields[at - 1], row.fields[at]):
            return ""
        if any(map(_is_quoted, _pieces(row.text, self._delimiter)[at - 1 : at + 1])):
            return ""
        return (
            f"has {visible(row.fields[at][:60])!r} in the column {visible(self._columns[at])!r} (column {at + 1}), as if "
            f"{self._delimiter!r} were part of the URL before; put URLs that contain {self._delimiter!r} between double "
            "quotes, or write the table as Parquet"
        )


def _habits(rows: Iterator[Row], columns: Iterable[int], delimiter: str) -> set[int]:
    """The columns in which every field begins with a blank, so that it is a habit of the writer and no sign of a caption.

    At least `HABIT_ROWS` rows must have text there, all numbers or none, and different captions before it: fewer rows
    may lack a column by chance, and a comma behind the same words may be of a template.
    """
    next(rows, None)
    counts = dict.fromkeys(columns, 0)
    numbers: dict[int, set[bool]] = {at: set() for at in counts}
    captions: dict[int, set[str]] = {at: set() for at in counts}
    for row in rows:
        pieces = _pieces(row.text, delimiter)
        for at in list(counts):
            piece = pieces[at]
            if not piece.strip() or _is_quoted(piece):
                continue
            counts[at] += 1
            numbers[at].add(_is_number(piece))
            if len(captions[at]) < 2:
                captions[at].add(pieces[at - 1].strip())
            if not _has_blank(piece) or len(numbers[at]) > 1:
                del counts[at]
        if not counts:
            break
    return {at for at, count in counts.items() if count >= HABIT_ROWS and len(captions[at]) > 1}


def _has_blank(piece: str) -> bool:
    """Whether it is text without quotes behind a blank."""
    return piece[:1].isspace() and bool(piece.strip()) and not _is_quoted(piece)


def _is_quoted(piece: str) -> bool:
    return piece.lstrip(" ").startswith('"')


def _pieces(row: str, delimiter: str) -> list[str]:
    """The fields of a row as they are written. The row has been parsed without error."""
    return re.findall(rf'( *"[^"]*(?:""[^"]*)*"|[^{delimiter}\r\n]*){delimiter}', row.rstrip("\r\n") + delimiter)


def _is_number(text: str) -> bool:
    try:
        float(text.replace(",", "."))
    except ValueError:
        return False
    return True


def few(columns: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    names = [shortened(visible(column)) for column in columns[:12]]
    return ", ".join(names) + (f" and {len(columns) - 12} more" if len(columns) > 12 else "")


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
