"""Reads CSV strictly: a row that does not parse, or that may contain another row, is an error with file and line.

A repaired row might give an image the wrong caption.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TextIO

from tasks.curation.sources.base import count_of, visible

MAX_ROW_BYTES = 4 * 2**20
MAX_LINES = 4_000_000  # of a table, including blank lines


def rows(shown: str, text: TextIO, delimiter: str, remedy: str) -> Iterator[tuple[int, list[str]]]:
    """(first line, fields) of each row that is not blank, the header first.

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
            lines.row_bytes = 0
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
            yield first_line, fields
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
        captions: the columns of captions.
        begins_row: whether a field looks like the first or last field of another row, such as the name of an image.
    """

    def __init__(
        self,
        shown: str,
        columns: Sequence[str],
        captions: Iterable[int],
        delimiter: str,
        begins_row: Callable[[str], bool],
    ) -> None:
        self._shown, self._delimiter, self._begins_row = shown, delimiter, begins_row
        # Text there may be the rest of a caption. An index before the names, as pandas writes it, is not.
        first = min(captions, default=len(columns))
        self._nameless = [at for at, name in enumerate(columns) if at > first and not name.strip()]

    def check(self, line: int, fields: Sequence[str], own: str) -> None:
        """
        Raises:
            ValueError: text in an unnamed column after the captions; a quoted field that contains the row of another
                image, so that its quote was not meant as one.
        """
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
                        f"{self._shown}, line {line}: a quote is not closed, so that the row of {visible(own)!r} runs over that "
                        f"of {visible(swallowed.strip())!r}. If the text is meant so, write the table as Parquet or JSON Lines"
                    )


def few(columns: Sequence[str]) -> str:
    names = [visible(column) for column in columns]
    return ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "")


class _Lines:
    """The lines of a CSV file, with \\n, \\r\\n or \\r at their ends."""

    def __init__(self, shown: str, text: TextIO, remedy: str) -> None:
        self._shown, self._text, self._remedy = shown, text, remedy
        self.row_bytes = 0
        self._number = 0

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        line = self._text.readline(MAX_ROW_BYTES)
        self._number += 1
        if line and self._number > MAX_LINES:
            raise ValueError(f"{self._shown} has more than {MAX_LINES:,} lines; {self._remedy}")
        self.row_bytes += len(line)
        if self.row_bytes >= MAX_ROW_BYTES:
            raise ValueError(
                f"{self._shown}, line {self._number}: a row is longer than {MAX_ROW_BYTES // 2**20} MiB; is a quote not closed?"
            )
        if not line:
            raise StopIteration
        return line
