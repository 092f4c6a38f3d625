"""The rows of all tables of a source, matched with its images by name.

A row names an image by a path from the folder of its table. It belongs to the nearest images, and an image has the
nearest of its rows: see `_nearness`. If two images are equally near to a row, or two names to an image, the captions
are ambiguous.
"""

from __future__ import annotations

import json
import posixpath
from collections.abc import Iterable
from typing import BinaryIO, NamedTuple, Self

from tasks.curation.sources.base import (
    Account,
    base_name,
    count_of,
    from_bytes,
    is_image,
    reason_of,
    shortened,
    to_bytes,
    visible,
)
from tasks.curation.sources.captions.metadata_files import Table, table_rows
from tasks.curation.sources.captions.pairing import Text, fold, spelling, stem
from tasks.curation.sources.captions.scratch import Scratch, digest

MAX_ROWS = 500_000  # of a CSV or JSON table, at 70 us of processor time each (benchmarks/curation/hostile.py)
MAX_ROWS_PER_IMAGE = 1000
STEM_STEP = 2  # behind the steps of `claim`
MAX_READINGS = 4  # of a path that repeats the name of its table's folder
UNMATCHED, NO_ROWS = "metadata row that names no image", "metadata table without rows"


class Matched(NamedTuple):
    """What tables say of one image.

    ambiguous, unreadable: why its captions cannot be used, or "". no_column: why its table has no captions, or "".
    """

    captions: list[str]
    ambiguous: str = ""
    unreadable: str = ""
    no_column: str = ""


class Listed(Scratch):
    """The rows of all tables of a source, on disk, so that memory does not bound their number.

    Used as a context manager: `add` all tables, then `claim` for all images, then `match`, then `finish`.
    """

    TABLES = (
        "CREATE TABLE rows (id INTEGER PRIMARY KEY, file INT, line INT, said BLOB, captions TEXT, problem TEXT, "
        "near INT, owner BLOB, formats TEXT, owners INT, used INT)",
        "CREATE TABLE names (fold BLOB, name BLOB, step INT, row INT)",
        "CREATE INDEX folds ON names (fold)",
    )

    def __init__(self, encoding: str | None, wanted: tuple[str, ...]) -> None:
        self._encoding, self._wanted = encoding, wanted
        self._tables: list[Table] = []
        self._has_rows = self._has_stems = False

    def __enter__(self) -> Self:
        super().__enter__()
        self._db.execute("PRAGMA cache_size=-32768")
        return self

    def __bool__(self) -> bool:
        return self._has_rows

    def add(
        self,
        shown: str,
        locator: str,
        folder: str,
        folders: Iterable[str],
        format: str,
        file: BinaryIO,
        root_name: str,
    ) -> str:
        """Reads one table.

        Args:
            shown: its name for errors.
            locator: its name for records, which does not depend on the location of the source.
            folder: its folder, relative to the root of the source or archive.
            folders: names of the folders in that folder.
            format: one of metadata_files.FORMATS.
            root_name: name of the source's root, for `folder` "".

        Returns:
            "", or the reason for which it is left out: it has no rows, or is a .json file of something else.

        Raises:
            ValueError: naming the file and the line.
        """
        table = Table(shown, locator, len(self._tables))
        self._tables.append(table)
        inside = {fold(name) for name in folders}
        own_name = fold(base_name(folder) or root_name)
        try:
            for row in table_rows(format, file, self._encoding, self._wanted, table):
                values = (table.number, row.line, to_bytes(row.file_name), json.dumps(row.captions), row.problem)
                added = self._db.execute(
                    "INSERT INTO rows VALUES (NULL, ?, ?, ?, ?, ?, NULL, NULL, NULL, 0, 0)", values
                )
                for step, path in _readings(row.file_name, folder, inside, own_name):
                    names = (_key(path, row.is_stem), to_bytes(path), step, added.lastrowid)
                    self._db.execute("INSERT INTO names VALUES (?, ?, ?, ?)", names)
                table.rows += 1
                if table.rows > MAX_ROWS and format != "parquet":
                    raise ValueError(
                        f"{shown} has more than {MAX_ROWS:,} rows; divide it by folders, or write metadata.parquet"
                    )
                table.names_images = table.names_images or is_image(row.file_name.strip())
                table.has_stems = table.has_stems or row.is_stem
        except UnicodeEncodeError as error:
            raise ValueError(f"{shown} has text that is not Unicode: {error}") from error
        if table.is_mapping and not (table.names_images or table.has_stems):
            self._db.execute("DELETE FROM names WHERE row IN (SELECT id FROM rows WHERE file = ?)", (table.number,))
            self._db.execute("DELETE FROM rows WHERE file = ?", (table.number,))
            table.rows = 0
            return reason_of(shown)
        self._has_rows = self._has_rows or table.rows > 0
        self._has_stems = self._has_stems or table.has_stems
        return "" if table.rows else NO_ROWS

    def claim(self, paths: list[tuple[int, str]]) -> None:
        """Records the rows that may name an image. All images claim before the first `match`.

        Args:
            paths: (step, path) by which a row may refer to the image. Smaller steps are nearer. The first is of this
                image alone.
        """
        for number, (near, *_) in self._candidates(paths).items():
            best, owner, formats, owners = self._db.execute(
                "SELECT near, owner, formats, owners FROM rows WHERE id = ?", (number,)
            ).fetchone()
            # A row with a name without extension describes a.png and a.webp as a text does.
            row = Text("", number)
            if best is not None:
                row.near, row.owner, row.formats = best, from_bytes(owner), formats
                row.other = "" if owners > 1 else None
            if row.claim(near, paths[0][1]):
                values = (row.near, to_bytes(row.owner), row.formats, 1 if row.other is None else 2, number)
                self._db.execute("UPDATE rows SET near = ?, owner = ?, formats = ?, owners = ? WHERE id = ?", values)

    def match(self, paths: list[tuple[int, str]]) -> Matched:
        """The captions of one image; `paths` as in `claim`."""
        if not self:
            return Matched([])
        near_of = self._candidates(paths)
        own = {number: one for number, one in near_of.items() if one.near == one.best}
        if not own:
            return Matched([])
        nearest = min(one.near for one in own.values())
        captions: list[str] = []
        no_column = ambiguous = unreadable = ""
        first: _Candidate | None = None
        for number, one in own.items():
            if one.near > nearest:
                continue
            table, where = self._tables[one.file], self._where(one)
            if not one.used:
                self._db.execute("UPDATE rows SET used = 1 WHERE id = ?", (number,))
                table.used += 1
            first = first or one
            if one.owners > 1:
                ambiguous = ambiguous or f"{where}, may name several images"
            elif nearest and one.said != first.said:
                ambiguous = ambiguous or f"{self._where(first)}, and {where}, may both name it"
            unreadable = unreadable or (f"{where}, {one.problem}" if one.problem else "")
            captions += json.loads(one.captions)
            no_column = no_column or table.no_column
        return Matched(list(dict.fromkeys(captions)), ambiguous, unreadable, "" if captions else no_column)

    def _where(self, row: _Candidate) -> str:
        return f"{self._tables[row.file].locator}, line {row.line}"

    def _candidates(self, paths: list[tuple[int, str]]) -> dict[int, _Candidate]:
        """The rows that may name an image, at their nearest."""
        keys = list({_key(path, is_stem=False) for _, path in paths})
        if self._has_stems:
            stems = [(step + STEM_STEP, stem(path)) for step, path in paths]
            keys += {_key(path, is_stem=True) for _, path in stems}
            paths = paths + stems
        marks = ", ".join("?" * len(keys))
        query = f"SELECT row, name, step, file, line, said, near, owners, captions, problem, used FROM names JOIN rows ON id = row WHERE fold IN ({marks}) ORDER BY row LIMIT {MAX_ROWS_PER_IMAGE + 1}"  # noqa: S608
        found = self._db.execute(query, keys).fetchall()
        if len(found) > MAX_ROWS_PER_IMAGE:
            shown, line = self._tables[found[-1][3]].shown, found[-1][4]
            raise ValueError(f"{shown}, line {line}: more than {MAX_ROWS_PER_IMAGE:,} rows name {visible(paths[0][1])}")
        candidates: dict[int, _Candidate] = {}
        for number, name, step, file, line, said, *rest in found:
            near = _nearness(from_bytes(name), step, paths)
            if near is not None and (number not in candidates or near < candidates[number].near):
                candidates[number] = _Candidate(near, file, line, name if step == 0 else said, *rest)
        return candidates

    def finish(self, account: Account) -> None:
        """Counts the rows that named no image.

        Raises:
            ValueError: no row of a table named an image. A .json file whose keys are stems may be something else.
        """
        for table in self._tables:
            unused = table.rows - table.used
            if not unused:
                continue
            said, line = self._db.execute(
                "SELECT said, line FROM rows WHERE file = ? AND NOT used ORDER BY id LIMIT 1", (table.number,)
            ).fetchone()
            example = f"{shortened(visible(from_bytes(said)))} (line {line})"
            if not table.used and not table.has_stems:
                raise ValueError(
                    f"{count_of(unused, 'row')} of {table.shown} name no image, such as {example}; file_name is a path "
                    f"from the folder of {base_name(table.shown)}"
                )
            account.skip(UNMATCHED, f"{table.locator}: {example}", unused)


class _Candidate(NamedTuple):
    """A row that may name an image. said: its path, or what it says if that is read in another way. best: the nearest
    that any image is to the row. owners: how many pictures are so near, at most 2. used: whether it was matched with another image."""

    near: int
    file: int
    line: int
    said: bytes
    best: int | None
    owners: int
    captions: str
    problem: str
    used: int


def _plain(path: str) -> str:
    """A path with \\ read as /, and without blanks around names."""
    if (
        "\\" in path
    ):  # as tables that were written on Windows have it, and archives of Windows that are unpacked elsewhere
        path = posixpath.normpath(path.replace("\\", "/"))
    if len(path.split(None, 1)) > 1 or path[:1].isspace() or path[-1:].isspace():
        path = "/".join(part.strip() for part in path.split("/"))
    return path


def _key(path: str, is_stem: bool) -> bytes:
    """Names with equal keys may be of one image."""
    return digest(fold(_plain(path)) + ("\0" if is_stem else ""))


def _nearness(name: str, step: int, paths: list[tuple[int, str]]) -> int | None:
    """Compares a name of a row with the paths of an image: first by their steps, then by separators and blanks, then
    by `spelling`. 0 is equal."""
    near: list[int] = []
    for other_step, path in paths:
        level = spelling(name, path)
        if level is None and (plain := spelling(_plain(name), _plain(path))) is not None:
            level = 3 + plain
        if level is not None:
            near.append(6 * (step + other_step) + level)
    return min(near, default=None)


def _readings(file_name: str, folder: str, inside: set[str], own_name: str) -> list[tuple[int, str]]:
    """(step, path from the root) that a row may mean: as it is written, or behind the name of the table's own folder."""
    parts = [part for part in file_name.split("/") if part not in ("", ".")]
    readings = [(0, posixpath.normpath(posixpath.join(folder, *parts)) if parts else folder)]
    parts = [part for part in _plain(file_name).split("/") if part not in ("", ".")]
    folds = [fold(part) for part in parts]
    if len(parts) > 1 and folds[0] not in inside:
        behind = [at for at, name in enumerate(folds[:-1]) if name == own_name]
        readings += [(1, posixpath.normpath(posixpath.join(folder, *parts[at + 1 :]))) for at in behind[-MAX_READINGS:]]
    return readings
